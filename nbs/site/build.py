"""`build.py` makes the site of the notebooks in .site/html; nothing is executed, nothing is downloaded."""

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from book import ROOT, Pages, write_book, write_navigation  # noqa: E402
from names import write_names, write_parameters  # noqa: E402


def gather(folder: Path):
    "Everything that Sphinx reads."
    from asyproxy.study.parameters import STUDIES

    pages = Pages(folder)
    write_book(pages, list(STUDIES))
    write_names(pages)
    write_parameters(pages, STUDIES)
    write_navigation(pages)
    pages.clean()


def build(folder: Path) -> Path:
    "Makes the site; a warning of Sphinx is an error."
    gather(folder / "source")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-j", "2", "-b", "html",
               "-c", Path(__file__).parent, "-d", folder / "doctrees", folder / "source", folder / "html"]
    subprocess.run(list(map(str, command)), check=True)
    return folder / "html"


if __name__ == "__main__":
    made = build(Path(sys.argv[1]).resolve() if sys.argv[1:] else ROOT / ".site")
    print(f"The site is in {made}: open {made / 'index.html'}")

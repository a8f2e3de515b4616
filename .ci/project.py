"""`project.py test` checks the project; `project.py build` makes what is made from the notebooks."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from filecmp import cmp
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = sorted((ROOT / "nbs").glob("*.ipynb"))
STUDIES = sorted((ROOT / "nbs" / "studies").glob("*.ipynb"))
DIGITS = {"data_name": "digits"}
SMALLEST = {  # in this order: the report reads the records of the others
    "toy": {"num_epochs": 2, "seeds": 1, "temperatures": "0.1", "momenta": "0.5"},
    "benchmark": {**DIGITS, "backbone_type": "convnet", "weights": "random", "feature_dim": 8, "lr": 0.001, "num_epochs": 2, "validation": 0.3, "oracle": True},
    "input_pipeline": {"images": 8, "rounds": 1, "batch_size": 4},
    "collapse": {**DIGITS, "backbone_type": "convnet", "weights": "random", "feature_dim": 8, "num_epochs": 1, "validation": 0.3, "momenta": "0.05,0.5", "lrs": "0.001,0.5"},
    "evaluation_speed": {"sizes": "cub", "scale": "1000,2000", "rounds": 1},
    "training_speed": {"classes": "50,500", "rounds": 1, "steps": 1, "backbone_type": "convnet", "image_size": 16, "batch_size": 4},
    "report": DIGITS,
}
# A test sees no GPU, no hub and none of the user's own results.
ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def call(*command, **options) -> str:
    "The output of a command; a RuntimeError with its end if it fails."
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **{"env": ENVIRONMENT, "cwd": ROOT, **options})
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} ended with code {done.returncode}\n{done.stdout[-6000:]}")
    return done.stdout


def readme() -> str:
    "README.md, from the cells and stored outputs of nbs/index.ipynb: `#| hide` leaves a cell out, `#| echo: false` its source."
    notebook = nbformat.read(ROOT / "nbs" / "index.ipynb", 4)
    notebook.cells = [cell for cell in notebook.cells if "#| hide" not in cell.source]
    for cell in notebook.cells:
        if "#| echo: false" in cell.source:
            cell.source, cell.metadata.tags = "", ["echo"]
    notebook.metadata["language_info"] = {"name": "python"}
    text = MarkdownExporter(exclude_input_prompt=True, exclude_output_prompt=True).from_notebook_node(notebook)[0]
    text = text.replace("```python\n\n```\n", "").replace("../figures/", "figures/")
    lines = [line.rstrip() for line in text.strip().splitlines()]
    kept = [line for i, line in enumerate(lines) if line or (i and lines[i - 1])]
    return "<!-- Built from nbs/index.ipynb by `make build`; edit that. -->\n" + "\n".join(kept) + "\n"


def build():
    call("nbdev_export")
    for path in LIBRARY:
        print(path.name, flush=True)
        call(sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--inplace", path)
        notebook = nbformat.read(path, 4)
        for cell in notebook.cells:  # progress bars and warnings are noise in a file that is read
            if cell.cell_type == "code":
                cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        notebook.metadata.pop("language_info", None)
        nbformat.write(notebook, path)
    call("nbdev_clean", "--fname", ROOT / "nbs")
    (ROOT / "README.md").write_text(readme())


def copy_of_sources(folder: str) -> Path:
    "The notebooks, the package and their settings, to be cleaned and exported without touching the checkout."
    for name in ("nbs", "asyproxy"):
        shutil.copytree(ROOT / name, Path(folder, name), ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return Path(folder)


def notebooks_clean():
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_of_sources(folder)
        call("nbdev_clean", "--fname", copy / "nbs", cwd=copy)
        if dirty := [path.name for path in LIBRARY + STUDIES if not cmp(path, copy / path.relative_to(ROOT), shallow=False)]:
            raise RuntimeError(f"expected notebooks as nbdev_clean leaves them, got {', '.join(dirty)}: run nbdev_clean")


def export_in_step():
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_of_sources(folder)
        for module in (copy / "asyproxy").glob("*.py"):
            if module.name != "__init__.py":
                module.unlink()
        call("nbdev_export", cwd=copy)
        ours, exported = ({path.name for path in (base / "asyproxy").glob("*.py")} for base in (ROOT, copy))
        if stale := sorted(ours - exported):
            raise RuntimeError(f"expected a notebook for every module, got none for {', '.join(stale)}: delete it")
        if changed := sorted(name for name in exported if not cmp(ROOT / "asyproxy" / name, copy / "asyproxy" / name, shallow=False) or name not in ours):
            raise RuntimeError(f"expected modules as the notebooks export them, got others: {', '.join(changed)}: run nbdev_export")


def readme_in_step():
    if (ROOT / "README.md").read_text() != readme():
        raise RuntimeError("expected README.md as nbs/index.ipynb gives it: run make build")


def studies_have_parameters():
    for path in STUDIES:
        notebook = json.loads(path.read_text())
        tagged = [cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", [])]
        if len(tagged) != 1 or notebook["metadata"]["kernelspec"]["name"] != "python3":
            raise RuntimeError(f"expected one cell tagged parameters and the kernel python3 in {path.name}")
        if path.stem not in SMALLEST:
            raise RuntimeError(f"expected smallest parameters for {path.name} in .ci/project.py")


def lock_agrees():
    "Every dependency of the package is locked, to a version in its range."
    locked = {r.name.lower(): r for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#") for r in [Requirement(line)]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in map(Requirement, project["dependencies"] + project["optional-dependencies"]["dev"]):
        pin = locked.get(requirement.name.lower())
        if pin is None or not requirement.specifier.contains(str(pin.specifier).removeprefix("==")):
            raise RuntimeError(f"expected a version of {requirement} in requirements.txt, got {pin}")
    if "-r requirements.txt" not in (ROOT / "environment.yml").read_text():
        raise RuntimeError("expected environment.yml to use requirements.txt")


def library_notebook(path: Path):
    output = call("nbdev_test", "--path", path, "--n_workers", 0)
    if "Success" not in output:
        raise RuntimeError(output)


def study_notebook(name: str, output: str) -> dict:
    values = [part for pair in SMALLEST[name].items() for part in ("-p", *map(str, pair))]
    call("asyproxy", "run", name, *values, env=ENVIRONMENT | {"ASYPROXY_OUTPUT": output})
    return json.loads(max(Path(output, "figures", "records").glob(f"{name}-*.json"), key=lambda path: path.stat().st_mtime).read_text())


def benchmark_repeats(output: str):
    "The same command twice gives the same metrics, to the bit."
    one, other = (study_notebook("benchmark", output) for _ in range(2))
    if any(one[key] != other[key] for key in ("metrics", "history", "data")):
        raise RuntimeError(f"expected the same metrics from the same command, got {one['metrics']} and {other['metrics']}")
    if list(one["metrics"]) != ["before", "last", "selected", "oracle"]:
        raise RuntimeError(f"expected the last, the selected and the oracle's epoch in the record, got {', '.join(one['metrics'])}")


def two_processes(output: str):
    "The benchmark with devices=2 ends near the one with a single process."
    values = [part for pair in (SMALLEST["benchmark"] | {"devices": 2}).items() for part in ("-p", *map(str, pair))]
    call("asyproxy", "run", "benchmark", *values, env=ENVIRONMENT | {"ASYPROXY_OUTPUT": output})
    records = [json.loads(path.read_text()) for path in Path(output, "figures", "records").glob("benchmark-digits-*.json")]
    recalls = {record["parameters"]["devices"]: record["metrics"]["last"]["dense"]["recall@1"] for record in records}
    if set(recalls) != {1, 2} or abs(recalls[1] - recalls[2]) > 0.01:
        raise RuntimeError(f"expected nearly the same Recall@1 from one process and from two, got {recalls}")


def images_from_disk(output: str):
    "`asyproxy prepare`, then the benchmark on what it found: boxes, a query and a gallery, the decoded cache, two workers."
    with tempfile.TemporaryDirectory() as folder:
        environment = ENVIRONMENT | {"ASYPROXY_OUTPUT": output, "ASYPROXY_CACHE": str(Path(folder, "cache"))}
        call(sys.executable, "-c", "import sys; from asyproxy.fixtures import write_fixture; write_fixture(sys.argv[1], 'isc', 'official')", Path(folder, "isc"))
        printed = call("asyproxy", "prepare", "isc", "--data_path", folder, "--cropped", "--allow_incomplete", "--cache", env=environment)
        command = printed.strip().splitlines()[-1].removeprefix("next: ").split()
        smallest = SMALLEST["benchmark"] | {"data_name": "isc", "validation": 0.0, "batch_size": 4, "recalls": "1,2", "num_workers": 2}
        call(*command, *(part for pair in smallest.items() for part in ("-p", *map(str, pair))), env=environment)
    record = json.loads(next(Path(output, "figures", "records").glob("benchmark-isc-*.json")).read_text())
    expected = {"complete": False, "cropped": True, "query": {"images": 3, "classes": 3}, "gallery": {"images": 6, "classes": 3}}
    if got := {key: record["data"].get(key) for key, value in expected.items() if record["data"].get(key) != value}:
        raise RuntimeError(f"expected {expected} in the record, got {got}")


def toy_on_photographs(output: str):
    "The same notebook on STL10: only data_name and data_path change."
    with tempfile.TemporaryDirectory() as folder:
        call(sys.executable, "-c", "import sys; from asyproxy.fixtures import write_stl10; write_stl10(sys.argv[1])", Path(folder, "stl10"))
        values = SMALLEST["toy"] | {"data_name": "stl10", "data_path": folder, "allow_incomplete": True}
        call("asyproxy", "run", "toy", *(part for pair in values.items() for part in ("-p", *map(str, pair))), env=ENVIRONMENT | {"ASYPROXY_OUTPUT": output})
    record = json.loads(next(Path(output, "figures", "records").glob("toy-stl10-*.json")).read_text())
    if (record["data"]["train"]["classes"], record["data"]["test"]["classes"], record["data"]["complete"]) != (7, 3, False):
        raise RuntimeError(f"expected 7 classes to train on, 3 to test and a set that is not complete, got {record['data']}")


def test() -> int:
    results = []

    def check(name, function, *arguments):
        start = time.perf_counter()
        try:
            function(*arguments)
            failure = None
        except Exception as error:
            failure = str(error)
        results.append(failure is None)
        print(f"{'ok    ' if failure is None else 'FAILED'} {name} ({time.perf_counter() - start:.0f} s)" + (f"\n{failure}" if failure else ""), flush=True)

    with ThreadPoolExecutor(2) as pool, tempfile.TemporaryDirectory() as output:
        for name, function in {"notebooks are clean": notebooks_clean, "export is in step, no module is stale": export_in_step, "README is in step with nbs/index.ipynb": readme_in_step,
                               "studies have parameters": studies_have_parameters, "the lock agrees with pyproject.toml": lock_agrees}.items():
            pool.submit(check, name, function)
        for path in LIBRARY:
            pool.submit(check, f"nbs/{path.name}", library_notebook, path)
        waiting = [pool.submit(check, f"nbs/studies/{name}.ipynb", study_notebook, name, output) for name in SMALLEST if name != "report"]
        waiting.append(pool.submit(check, "the toy on STL10", toy_on_photographs, output))
        waiting.append(pool.submit(check, "images from disk: prepare, then the benchmark", images_from_disk, output))
        for future in waiting:
            future.result()
        check("nbs/studies/report.ipynb", study_notebook, "report", output)
        check("the benchmark twice gives the same bits", benchmark_repeats, output)
        check("the benchmark in two processes", two_processes, output)
    print(f"{sum(results)} passed, {len(results) - sum(results)} failed")
    return 0 if all(results) else 1


if __name__ == "__main__":
    commands = {"build": build, "test": test}
    if sys.argv[1:] not in [[name] for name in commands]:
        sys.exit(f"usage: project.py {'|'.join(commands)}")
    sys.exit(commands[sys.argv[1]]())

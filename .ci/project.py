"""`project.py build` makes what is made from the notebooks; `test_project.py` checks it."""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]


def hear():
    "For `preexec_fn`: below nohup or in the background of a shell, signals are ignored that a test sends."
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def try_notebook(path: str, said: str):
    "`nbdev_test` in a process that has the libraries already; what it says goes to a file."
    hear()
    multiprocessing.set_start_method(None, force=True)  # that of this system, as a notebook has it
    with open(said, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from nbdev.test import nbdev_test

    nbdev_test(path=path, n_workers=0)


def library() -> list[Path]:
    "The notebooks that define and test the package, and those that are read."
    others = ("studies", ".ipynb_checkpoints")
    return [path for path in sorted((ROOT / "nbs").rglob("*.ipynb")) if path.parent.name not in others]


def studies() -> list[Path]:
    "The notebooks with parameters."
    return sorted((ROOT / "nbs" / "studies").glob("*.ipynb"))


def drop_noise(notebook):
    "Leaves progress bars, the warnings of libraries and widgets, which live in a kernel, out of the outputs."
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"
                            and "application/vnd.jupyter.widget-view+json" not in output.get("data", {})]


def readme(path: Path = ROOT / "nbs" / "index.ipynb") -> str:
    "README.md, from the outputs of an index: `#| hide` leaves a cell out, `#| echo: false` its source."
    notebook = nbformat.read(path, 4)
    notebook.cells = [cell for cell in notebook.cells if "#| hide" not in cell.source]
    drop_noise(notebook)
    for cell in notebook.cells:
        if "#| echo: false" in cell.source:
            cell.source, cell.metadata.tags = "", ["echo"]
    notebook.metadata["language_info"] = {"name": "python"}
    text = MarkdownExporter(exclude_input_prompt=True, exclude_output_prompt=True).from_notebook_node(notebook)[0]
    text = text.replace("```python\n\n```\n", "").replace("../figures/", "figures/")
    lines = [line.rstrip() for line in text.strip().splitlines()]
    kept = [line for i, line in enumerate(lines) if line or (i and lines[i - 1])]
    return "<!-- Built from nbs/index.ipynb by `make build`; edit that. -->\n" + "\n".join(kept) + "\n"


def write_parameters(path: Path):
    "Puts the parameters of a study into its cell."
    from asyproxy.experiment import parameters_cell
    from asyproxy.study.parameters import STUDIES

    notebook = nbformat.read(path, 4)
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = parameters_cell(STUDIES[path.stem])
    nbformat.write(notebook, path)


def execute(path: Path):
    "Runs a notebook and keeps its outputs, without progress bars and warnings, which are noise when it is read."
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--inplace", path]
    subprocess.run(command, check=True)
    notebook = nbformat.read(path, 4)
    drop_noise(notebook)
    for name in ("language_info", "widgets"):
        notebook.metadata.pop(name, None)
    nbformat.write(notebook, path)


def build(paths: list[Path]):
    subprocess.run(["nbdev_export"], check=True, cwd=ROOT)
    for path in studies():
        write_parameters(path)
    for path in paths or library():
        print(path.relative_to(ROOT), flush=True)
        execute(path)
    subprocess.run(["nbdev_clean", "--fname", ROOT / "nbs"], check=True, cwd=ROOT)
    (ROOT / "README.md").write_text(readme())


if __name__ == "__main__":
    if sys.argv[1:2] != ["build"]:
        sys.exit("usage: project.py build [NOTEBOOK ...]")
    build([Path(path).resolve() for path in sys.argv[2:]])

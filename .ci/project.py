"""`project.py build` makes what is made from the notebooks, `project.py outputs` shows in the studies what their runs
found, `project.py retell` does so where a machine found something else; `test_project.py` checks them."""

import base64
import io
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from os.path import normpath
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from PIL import Image

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


def pages() -> list[Path]:
    "Those that are read and tell what is on record."
    return [path for path in library() if path.parent.name in ("nbs", "guides")
            and "study import read_records" in path.read_text()]


def studies() -> list[Path]:
    "The notebooks with parameters."
    return sorted((ROOT / "nbs" / "studies").glob("*.ipynb"))


def joined(outputs: list) -> list:
    "What was printed in one piece: where a kernel cuts it is a matter of time."
    kept = []
    for output in outputs:
        if kept and output.output_type == kept[-1].output_type == "stream" and output.name == kept[-1].name:
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def drop_noise(notebook):
    "Leaves progress bars, the warnings of libraries and widgets, which live in a kernel, out of the outputs."
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = joined([output for output in cell.outputs if output.get("name") != "stderr"
                                   and "application/vnd.jupyter.widget-view+json" not in output.get("data", {})])


def from_the_top(text: str) -> str:
    "Links of a notebook in nbs as README has them; Markdown outside of code."
    def link(match) -> str:
        target = match[1]
        return match[0] if re.match(r"\w+:|#", target) else f"]({normpath(f'nbs/{target}')})"

    parts = re.split(r"(^```.*?^```|`[^`\n]+`)", text, flags=re.S | re.M)
    return "".join(part if number % 2 else re.sub(r"\]\(([^()\s]+)\)", link, part) for number, part in enumerate(parts))


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
    text = from_the_top(text.replace("```python\n\n```\n", ""))
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
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stderr}\n{path.name} did not run to its end: see above")
    notebook = nbformat.read(path, 4)
    drop_noise(notebook)
    for name in ("language_info", "widgets"):
        notebook.metadata.pop(name, None)
    nbformat.write(notebook, path)


def in_few_colours(png: str) -> str:
    "A figure as small as it can be read."
    picture, file = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), io.BytesIO()
    picture.thumbnail((900, 900))
    picture.quantize(64, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def outputs_of(path: Path, root: Path) -> dict[str, list]:
    "The outputs of a notebook that ran below a folder, by cell; figures are small and paths begin at that folder."
    notebook = nbformat.read(path, 4)
    drop_noise(notebook)
    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    for output in (one for some in outputs.values() for one in some):
        if output.output_type != "stream":
            output.metadata = nbformat.NotebookNode()
        if "text" in output:
            output["text"] = output["text"].replace(f"{root}/", "")
        if png := output.get("data", {}).get("image/png"):
            output.data["image/png"] = in_few_colours(png)
            output.data.pop("text/plain", None)
    return outputs


def default_run(study: str) -> str:
    "Id of the run of a study with its default parameters that is on record; empty if none is."
    from asyproxy.study.record import figures_folder, read_records

    records = read_records(study)
    return next((record["run_id"] for record in records
                 if figures_folder(study, record["run_id"], record["parameters"]).name == study), "")


REDRAW = """
import sys
from asyproxy.study import read_records
from asyproxy.study.run import redraw
redraw(next(record for record in read_records() if record["run_id"] == sys.argv[1]))
"""


def executed(study: Path, run_id: str, output: Path) -> Path:
    "The notebook of a run: drawn from its record, or as it ran where it measures while it draws."
    from asyproxy.study.run import draws_again

    folder, record = output / "runs" / run_id, output / "figures" / "records" / f"{run_id}.json"
    if not draws_again(study):
        return folder / study.name
    if (drawn := folder / "drawn.ipynb").exists() and drawn.stat().st_mtime >= record.stat().st_mtime:
        return drawn
    folder.mkdir(parents=True, exist_ok=True)  # or what is drawn there goes
    environment = os.environ | {"ASYPROXY_OUTPUT": str(output)}
    subprocess.run([sys.executable, "-c", REDRAW, run_id], check=True, cwd=ROOT, env=environment)
    return drawn


def show(paths: list[Path]):
    "Gives studies the outputs of their default runs."
    for path in paths or studies():
        if not (run_id := default_run(path.stem)) or not (ran := executed(path, run_id, ROOT)).exists():
            print(f"{path.name}: run it first, asyproxy run {path.stem}", flush=True)
            continue
        notebook, outputs = nbformat.read(path, 4), outputs_of(ran, ROOT)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs = outputs[cell.id]
        nbformat.write(notebook, path)
    subprocess.run(["nbdev_clean", "--fname", ROOT / "nbs"], check=True, cwd=ROOT)


def tell(paths: list[Path]):
    "Executes notebooks, and makes README of the index."
    for path in paths:
        print(path.relative_to(ROOT), flush=True)
        execute(path)
    subprocess.run(["nbdev_clean", "--fname", ROOT / "nbs"], check=True, cwd=ROOT)
    (ROOT / "README.md").write_text(readme())


def ended() -> str:
    "The settings that the study ends with, as a file."
    from asyproxy.study import read_records
    from asyproxy.study.contest import entries, shipped_plan
    from asyproxy.study.ending import endings, settings_text

    return settings_text(endings(entries(shipped_plan("embedded"), read_records("benchmark"))))


def build(paths: list[Path]):
    "All that is made from the notebooks, and the outputs of these or of the whole library."
    subprocess.run(["nbdev_export"], check=True, cwd=ROOT)
    for path in studies():
        write_parameters(path)
    (ROOT / "asyproxy" / "settings.json").write_text(ended())
    tell(paths or library())


def repeated(root: Path = ROOT) -> set[str]:
    "Runs whose record is no longer what was committed; none where git can't say."
    asked = ["git", "diff", "--name-only", "--diff-filter=M", "HEAD", "--", "figures/records"]
    said = subprocess.run(asked, cwd=root, capture_output=True, text=True)
    return {Path(line).stem for line in said.stdout.splitlines()}


def retell(paths: list[Path]):
    "Lets outputs, pages and README tell what this machine found, if that is not what was committed."
    if runs := repeated():
        print(f"{len(runs)} record{'s are' if len(runs) > 1 else ' is'} not as committed: another processor or number of "
              "threads rounds otherwise. Pages that tell of them:", flush=True)
        show([path for path in paths or studies() if path.stem == "report" or default_run(path.stem) in runs])
        tell(pages())


if __name__ == "__main__":
    if sys.argv[1:2] not in (["build"], ["outputs"], ["retell"]):
        sys.exit("usage: project.py build|outputs|retell [NOTEBOOK ...]")
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # of nbdev's commands
    {"build": build, "outputs": show, "retell": retell}[sys.argv[1]]([Path(path).resolve() for path in sys.argv[2:]])

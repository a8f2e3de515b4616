"""What `make test` checks: the files of the project, every library notebook, and every study on small parameters."""

import ast
import io
import json
import multiprocessing
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
import tokenize
import tomllib
from filecmp import cmp
from importlib.metadata import metadata
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from project import (
    ROOT, default_run, ended, executed, hear, library, outputs_of, pages, readme, repeated, studies, try_notebook,
)
from wheels import WITHOUT, wanted

from asyproxy.experiment import Experiment, parameters_cell, smallest
from asyproxy.fixtures.notebooks import write_study
from asyproxy.study.parameters import STUDIES
from asyproxy.study.record import record_text

# A test sees no GPU, no hub and none of the user's own results; two run at a time, so each has one thread.
ENVIRONMENT = os.environ | {
    "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1", "OMP_NUM_THREADS": "1",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def call(*command, **options) -> str:
    "The output of a command; fails with its end where the command does."
    command, output = list(map(str, command)), {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    options = {"env": ENVIRONMENT, "cwd": ROOT, "preexec_fn": hear, **output, **options}
    done = subprocess.run(command, check=False, **options)
    assert not done.returncode, f"{' '.join(command)} ended with code {done.returncode}\n{done.stdout[-6000:]}"
    return done.stdout


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


# What is made from the notebooks is in step with them.


@pytest.fixture
def copy(tmp_path) -> Path:
    "The sources, to be cleaned and exported without touching the checkout."
    left_out = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for folder in ("nbs", "asyproxy"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=left_out)
    for file in ("settings.ini", "pyproject.toml"):
        shutil.copy(ROOT / file, tmp_path)
    return tmp_path


def test_notebooks_are_clean(copy):
    call("nbdev_clean", "--fname", copy / "nbs", cwd=copy)
    dirty = [name(path) for path in library() + studies() if not cmp(path, copy / name(path), shallow=False)]
    assert not dirty, f"expected notebooks as nbdev_clean leaves them, got {', '.join(dirty)}: run nbdev_clean"


def test_package_is_what_the_notebooks_export(copy):
    for module in (copy / "asyproxy").rglob("*.py"):
        if module != copy / "asyproxy" / "__init__.py":
            module.unlink()
    call("nbdev_export", cwd=copy)
    ours, exported = ({str(path.relative_to(base)) for path in base.glob("asyproxy/**/*.py")} for base in (ROOT, copy))
    stale = sorted(ours - exported)
    assert not stale, f"expected a notebook for every module, got none for {', '.join(stale)}: delete it"
    changed = [file for file in exported if file not in ours or not cmp(ROOT / file, copy / file, shallow=False)]
    assert not changed, f"expected modules as exported, got others: {', '.join(changed)}: run nbdev_export"


@pytest.mark.parametrize("path", pages(), ids=name)
def test_pages_say_what_the_records_say(path, tmp_path):
    "They are run again: a number that was typed, in the page or in the notebook's outputs, is another one then."
    call("jupyter", "nbconvert", "--to", "notebook", "--execute", "--output-dir", tmp_path, path)
    assert readme(path) == readme(tmp_path / path.name), f"expected other outputs of {name(path)}: make build"


def test_records_of_another_machine_are_noticed(tmp_path):
    "Changed records, not new ones; outside of a repository there are none."
    records = tmp_path / "figures" / "records"
    records.mkdir(parents=True)
    for run_id in ("one-0", "two-0"):
        (records / f"{run_id}.json").write_text("{}")
    assert repeated(tmp_path) == set()
    for words in ("init", "add .", "-c user.name=test -c user.email= commit -m first"):
        call("git", *words.split(), cwd=tmp_path)
    assert repeated(tmp_path) == set()
    for run_id in ("two-0", "three-0"):
        (records / f"{run_id}.json").write_text('{"other": 1}')
    assert repeated(tmp_path) == {"two-0"}


def test_settings_are_those_that_the_study_ends_with():
    assert (ROOT / "asyproxy" / "settings.json").read_text() == ended(), "expected settings as the records say: make build"


def test_readme_is_the_index():
    assert (ROOT / "README.md").read_text() == readme(), "expected README.md as nbs/index.ipynb gives it: make build"
    targets = re.findall(r"\]\(([^()\s]+)\)", readme())
    missing = [target for target in targets if not (ROOT / target).exists()]
    assert len(targets) > 20 and not missing, f"expected links to files, got {', '.join(missing)}"


@pytest.mark.parametrize("path", studies(), ids=name)
def test_parameters_are_those_of_the_dataclass(path):
    notebook = json.loads(path.read_text())
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    tagged = [cell["source"] for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    expected = parameters_cell(STUDIES[path.stem])
    assert ["".join(source) for source in tagged] == [expected], \
        f"expected as the only cell tagged parameters in {path.name}:\n{expected}"


# Imports go one way.

STREAM = (  # a wing imports from the lines above its own, and from no other wing in its line
    ("files", "experiment", "settings", "uncertainty", "children", "text"),
    ("processes",),
    ("data", "model", "loss", "evaluation"),
    ("retrieval",),
    ("training",),
    ("figures", "study", "fixtures", "measuring"),
    ("page",),
    ("__main__",),
)
ONLY = {"matplotlib": "figures", "seaborn": "figures", "scienceplots": "figures", "anywidget": "page",
        "voila": "page"}  # package: the wing that imports it


def imports(path: Path) -> set[str]:
    "Modules that a module imports, at its head or later, with their full names."
    module, found = ("asyproxy", *path.relative_to(ROOT / "asyproxy").with_suffix("").parts), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            start = ".".join(module[:-node.level]) + "." if node.level else ""
            source = (start + (node.module or "")).rstrip(".")
            found |= {f"{source}.{alias.name}" if is_room(f"{source}.{alias.name}") else source for alias in node.names}
    return found


def is_room(module: str) -> bool:
    return (ROOT / Path(*module.split("."))).with_suffix(".py").exists()


def against_the_stream(graph: dict[str, set[str]]) -> list[str]:
    "What is wrong in module -> the modules that it imports."
    floor = {wing: number for number, line in enumerate(STREAM) for wing in line}
    wrong = []
    for module, targets in graph.items():
        wing = module.split(".")[1]
        for target in targets:
            first, _, rest = target.partition(".")
            other = rest.partition(".")[0]
            if first == "asyproxy" and other and other != wing and floor[other] >= floor[wing]:
                wrong.append(f"{module} imports {target}, which is not above {wing}")
            if ONLY.get(first, wing) != wing:
                wrong.append(f"{module} imports {first}, which only {ONLY[first]} does")
    return wrong + circles(graph)


def circles(graph: dict[str, set[str]]) -> list[str]:
    "Modules that can't be put in an order, because they import each other."
    left = {module: targets & graph.keys() - {module} for module, targets in graph.items()}
    while free := [module for module, targets in left.items() if not targets & left.keys()]:
        for module in free:
            del left[module]
    return [f"a circle of imports: {', '.join(sorted(left))}"] if left else []


def rooms() -> dict[str, set[str]]:
    graph = {}
    for path in sorted((ROOT / "asyproxy").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if module not in ("asyproxy", "asyproxy._modidx"):
            graph[module] = imports(path)
    return graph


def test_imports_go_one_way():
    assert not against_the_stream(rooms())


@pytest.mark.parametrize("module, target", (
    ("asyproxy.loss.moving", "asyproxy.model"), ("asyproxy.evaluation.levels", "asyproxy.training.loop"),
    ("asyproxy.evaluation.levels", "asyproxy.evaluation.retrieval"), ("asyproxy.study.record", "matplotlib.pyplot")))
def test_an_import_against_the_stream_is_seen(module, target):
    graph = rooms()
    assert against_the_stream({**graph, module: graph[module] | {target}})


def test_no_nbdev_in_the_package():
    imported = {target.split(".")[0] for targets in rooms().values() for target in targets}
    assert not imported & {"nbdev", "fastcore"}


# Lines and cells can be read.


def code_cells(path: Path) -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def is_exported(source: str) -> bool:
    return any(line.replace(" ", "").startswith("#|export") for line in source.splitlines())


def length(source: str) -> int:
    "Lines of a cell without imports, blank lines and directives."
    imported = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    left_out = {number for node in imported for number in range(node.lineno, node.end_lineno + 1)}
    lines = enumerate(source.splitlines(), 1)
    return sum(1 for number, line in lines if line.strip() and not line.startswith("#|") and number not in left_out)


def uncommented(source: str) -> list[str]:
    "Public arguments and fields that have no comment on their line."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    commented, bare = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}, []
    for node in ast.parse(source).body:
        public = not getattr(node, "name", "_").startswith("_")
        for item in [node, *node.body] if public and isinstance(node, ast.ClassDef) else [node] if public else []:
            if isinstance(item, ast.FunctionDef) and (item.name == "__init__" or not item.name.startswith("_")):
                arguments = [a for a in ast.walk(item.args) if isinstance(a, ast.arg) and a.arg not in ("self", "cls")]
                bare += [f"{item.name}({a.arg})" for a in arguments if a.lineno not in commented]
            described = isinstance(getattr(item, "value", None), ast.Call)  # a field of `asyproxy.experiment.parameter`
            if isinstance(item, ast.AnnAssign) and not described and item.lineno not in commented:
                bare.append(f"{node.name}.{item.target.id}")
    return bare


def test_exported_cells_are_short():
    lengths = [length(source) for path in library() for source in code_cells(path) if is_exported(source)]
    lengths = [number for number in lengths if number]
    over = sum(number > 20 for number in lengths) / len(lengths)
    assert statistics.median(lengths) <= 12 and over < 0.1 and max(lengths) <= 45, \
        f"{statistics.median(lengths)} lines in the median, {over:.0%} over 20, {max(lengths)} at most"


@pytest.mark.parametrize("path", library() + studies(), ids=name)
def test_notebook_can_be_read(path):
    cells, problems = json.loads(path.read_text())["cells"], []
    for before, cell in zip([{}, *cells], cells):
        source = "".join(cell["source"])
        claims = [line for line in source.splitlines() if line.startswith("> ")]  # head the module
        lines = source.splitlines() if cell["cell_type"] == "code" else claims[:1]
        problems += [f"over 120 columns: {line}" for line in lines if len(line) > 120]
        if cell["cell_type"] == "code" and is_exported(source):
            problems += [f"no comment: {argument}" for argument in uncommented(source)]
            if length(source) and before.get("cell_type") != "markdown":
                problems.append(f"no prose before {source.splitlines()[1]}")
    assert not problems, "\n".join(problems)


def test_ruff():
    call("ruff", "check", ".ci", "asyproxy", "nbs/site")


def test_types(tmp_path):
    "The hints fit each other, and a call that does not fit one is seen."
    mypy, wrong = (sys.executable, "-m", "mypy", "--cache-dir", tmp_path), tmp_path / "wrong.py"
    call(*mypy)
    wrong.write_text("import asyproxy.loss\n\nasyproxy.loss.build_loss(3, num_classes=10, feature_dim=8)\n")
    with pytest.raises(AssertionError, match='wrong.py:3: error: Argument 1 to "build_loss" has incompatible type "int"'):
        call(*mypy, wrong, env=ENVIRONMENT | {"MYPYPATH": str(ROOT)})


# The site is made of the notebooks.


def test_site(tmp_path, monkeypatch):
    """It builds without a warning or a network; links, anchors and alternative texts are there, nothing is loaded from
    another host, and every public name has a page that says what each argument means. What is broken is seen."""
    monkeypatch.syspath_prepend(ROOT / "nbs" / "site")
    import check

    call(sys.executable, ROOT / "nbs" / "site" / "build.py", tmp_path)
    html = tmp_path / "html"
    found = check.problems(html)
    assert not found, "\n".join(found)
    (html / "names" / "loss" / "build_loss.html").unlink()
    page = html / "method.html"
    page.write_text(page.read_text() + '<a href="loss/moving.html#nowhere">x</a><img src="https://example.org/x.png">')
    check.tags.cache_clear()
    seen = "\n".join([*check.page_problems(page), *check.page_problems(html / "names" / "loss" / "index.html"),
                      *check.name_problems(html, check.public())])
    for problem in ("moving.html#nowhere: there is no such anchor", "x.png: expected nothing to be loaded from another",
                    "x.png: expected an alternative text", "build_loss.html: there is no such file",
                    "asyproxy.loss.build_loss: expected a page"):
        assert problem in seen, seen


def test_citation_and_changelog_name_this_version():
    version = re.search(r"^version = (.*)", (ROOT / "settings.ini").read_text(), re.M)[1]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version}" in (ROOT / "nbs" / "site" / "changelog.md").read_text()


# What is installed is what is asked for.


def locked() -> dict[str, Requirement]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return {pin.name.lower(): pin for line in lines if line and not line.startswith("#") for pin in [Requirement(line)]}


def test_lock_agrees_with_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    for requirement in map(Requirement, wanted):
        pin = locked().get(requirement.name.lower())
        if requirement.name != "asyproxy":
            assert pin and requirement.specifier.contains(str(pin.specifier).removeprefix("==")), \
                f"expected a version of {requirement} in requirements.txt, got {pin}"
    assert "-r requirements.txt" in (ROOT / "environment.yml").read_text()


def test_lock_installs_on_every_python_that_is_named():
    oldest, newest = re.search(r"Python (\d+\.\d+\.\d+) to (\d+\.\d+)", readme()).groups()
    for package in locked():
        needs = SpecifierSet(metadata(package).get("Requires-Python") or "")
        assert needs.contains(oldest) and needs.contains(f"{newest}.0"), \
            f"expected {package} to install on Python {oldest} to {newest}, it needs {needs}"


WITHOUT_EXTRAS = """
import torch
from asyproxy.evaluation import retrieval_metrics, retrieval_per_query
from asyproxy.files import load_tensors
from asyproxy.loss import AsymptoticProxyLoss
from asyproxy.uncertainty import compare
embeddings, labels = torch.randn(64, 16, requires_grad=True), torch.arange(64) % 8
AsymptoticProxyLoss(8, 16)(embeddings, labels).backward()
assert 0 <= retrieval_metrics(embeddings, labels)["recall@1"] <= 1
try:
    import pandas
except ImportError:
    pass
else:
    raise AssertionError("expected no pandas here")
try:
    compare(*[retrieval_per_query(embeddings, labels)] * 2)
except (ValueError, ImportError) as error:
    assert "asyproxy[tables]" in str(error), error
else:
    raise AssertionError("expected an error that names the extra")
"""


def test_loss_and_evaluation_need_little(tmp_path):
    "As after `pip install asyproxy` without an extra: all other packages of the lock are hidden."
    core = {"torch", "numpy", "scipy", "safetensors", "tqdm", "sympy", "mpmath", "networkx", "jinja2", "markupsafe",
            "filelock", "fsspec", "typing_extensions", "setuptools", "packaging"}  # with what torch brings
    hidden = {name.replace("-", "_") for name in locked()} - core | {"sklearn", "pil"}
    for path in Path(torch.__file__).parents[1].iterdir():
        if path.name.split(".")[0].lower() not in hidden:
            (tmp_path / path.name).symlink_to(path)
    paths = os.pathsep.join([str(ROOT), str(tmp_path)])
    call(sys.executable, "-S", "-c", WITHOUT_EXTRAS, env=ENVIRONMENT | {"PYTHONPATH": paths})


def test_wheel_holds_what_users_need(copy):
    for file in ("README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    call(sys.executable, "-c", "from setuptools.build_meta import build_wheel; print(build_wheel('dist'))", cwd=copy)
    listed = call(sys.executable, "-m", "zipfile", "-l", next(copy.glob("dist/*.whl")))
    assert "asyproxy/evaluation/retrieval.py" in listed and "asyproxy/__main__.py" in listed
    assert "asyproxy/published/recall.csv" in listed
    assert "asyproxy/fixtures" not in listed and "asyproxy/measuring" not in listed


def test_wheels_for_a_machine_without_a_network():
    has = WITHOUT | {"timm", "numba"}
    names = wanted("asyproxy", {"study"}, has, "3.12")
    assert {"papermill", "ipykernel", "nbclient", "munch", "six", "simplejpeg", "scienceplots"} < names
    assert not names & (has | {"llvmlite", "sphinx", "nbdev", "pytest"})


# Every study runs.


def run_study(study: str, output: Path, **values) -> dict:
    "The record of a run with the smallest parameters, and those that differ."
    options = [part for pair in (smallest(STUDIES[study]) | values).items() for part in ("-p", *map(str, pair))]
    call("asyproxy", "run", study, *options, env=ENVIRONMENT | {"ASYPROXY_OUTPUT": str(output)})
    newest = max((output / "figures" / "records").glob(f"{study}-*.json"), key=lambda path: path.stat().st_mtime)
    return json.loads(newest.read_text())


@pytest.mark.parametrize("study", sorted(STUDIES.keys() - {"benchmark", "gpu_check", "report", "retrieval"}))
def test_study(study, tmp_path):
    run_study(study, tmp_path)


def test_benchmark_and_report(tmp_path):
    "The same command twice gives the same bits, two processes end near one, and the report reads all of it."
    one, other = (run_study("benchmark", tmp_path) for _ in range(2))
    assert all(one[key] == other[key] for key in ("metrics", "history", "data"))
    assert set(one["metrics"]) == {"before", "last", "selected", "oracle"}
    options = [part for pair in smallest(Experiment).items() for part in ("-p", *map(str, pair))]
    drawn = call("asyproxy", "run", "benchmark", *options, "--draw", env=ENVIRONMENT | {"ASYPROXY_OUTPUT": tmp_path})
    assert other["run_id"] in drawn and "epoch 1/" not in drawn
    gallery = next((tmp_path / "figures" / "benchmark").glob("retrieval-*.png"))
    assert gallery.stat().st_mtime_ns > (tmp_path / "figures" / "records" / f"{one['run_id']}.json").stat().st_mtime_ns
    both = run_study("benchmark", tmp_path, devices=2)
    recalls = [record["metrics"]["last"]["dense"]["recall@1"] for record in (one, both)]
    assert both["run_id"] != one["run_id"] and abs(recalls[0] - recalls[1]) <= 0.01, recalls
    anchored = run_study("benchmark", tmp_path, loss="proxy_anchor", loss_options="margin=0.2")
    trial = run_study("benchmark", tmp_path, with_test=False, oracle=False)  # the same training, and the test set stays shut
    assert trial["metrics"] == {} and [entry["loss"] for entry in trial["history"]] == [entry["loss"] for entry in one["history"]]
    kept = {path.name for path in (tmp_path / "runs" / trial["run_id"]).glob("*.*")}
    assert "log.csv" in kept and not any(name.endswith("safetensors") for name in kept)
    assert not list(tmp_path.rglob("checkpoint-*")) and list((tmp_path / "runs" / one["run_id"]).glob("best.safetensors"))
    before = "benchmark-glyphs-lite0-asymptotic-512-0-94b0ecab"  # of `asymptotic` proxies
    shutil.copy(ROOT / ".ci" / "record_of_before.json", tmp_path / "figures" / "records" / f"{before}.json")
    odd = {"nothing": {"metrics": None}, "halves": {"metrics": {"selected": {"dense": None}}}, "undrawn": {"history": None}}
    for run_id, values in odd.items():
        path = tmp_path / "figures" / "records" / f"{run_id}.json"
        path.write_text(record_text({**one, "run_id": run_id, **values}))
    report = run_study("report", tmp_path)
    assert {one["run_id"], both["run_id"], anchored["run_id"], "undrawn"} <= set(report["records"])
    assert not {"nothing", "halves"} & set(report["records"])
    results = (tmp_path / "figures" / "report" / "results.csv").read_text()
    assert "proxy_anchor" in results and before in results
    assert '"asymptotic"' not in results


WITHOUT_NOTEBOOKS = """
import runpy, sys

sys.modules |= dict.fromkeys(sys.argv[1].split(","))  # whoever imports one of them is told that there is none
sys.argv[:2] = ["gpu_check"]
runpy.run_module("asyproxy.measuring.gpu_check", run_name="__main__", alter_sys=True)
"""


def test_gpu_check_needs_no_notebook(tmp_path):
    "As on a machine that is lent: every section runs to its end at its smallest size, and says what needs a GPU."
    hidden = ("papermill", "nbformat", "nbclient", "nbconvert", "ipykernel", "IPython", "jupyter_client", "simplejpeg",
              "pretrainedmodels", "submitit", "optuna", "seaborn", "scienceplots", "tabulate", "yaml")
    path = tmp_path / "check.json"
    call(sys.executable, "-c", WITHOUT_NOTEBOOKS, ",".join(hidden), path, "--size", "small", "--device", "cpu")
    check = json.loads(path.read_text())
    sections = check["sections"]
    assert list(sections) == ["parity", "rates", "feeding", "evaluation", "proxies", "precision", "endings"]
    rows = [row for section in sections.values() for row in section["rows"]]
    assert not [row for row in rows if "error" in row] and not [one for one in sections.values() if one["error"]]
    assert [row["what"] for row in rows if row.get("needs", "a GPU") != "a GPU"] == ["model inception"]
    assert {row["what"] for row in rows if row.get("needs") == "a GPU"} == {
        "products in tf32", "host waits", "tf32", "bf16 graphs", "bf16 compiled", "bf16 compiled graphs",
        "decoding on the card", "too large"}
    assert {row["met"] for row in check["aims"]} == {"met", "needs a GPU"}
    assert sum(section["seconds"] for section in sections.values()) < 60
    record = run_study("gpu_check", tmp_path)
    assert check.keys() - {"study", "parameters"} <= record.keys()
    said = [{name: [row["what"] for row in one["rows"]] for name, one in given.items()}
            for given in (record["sections"], sections)]
    assert "model inception" in said[0]["parity"]  # a row for each comparison; where it is missing one, which says so
    for one in said:
        one["parity"] = [what for what in one["parity"] if what != "model inception"]
    assert said[0] == said[1]


def out_of_step(path: Path, run_id: str, output: Path) -> list[str]:
    "What is wrong with the outputs that a study shows of its default run; output: where its record was drawn."
    shown = {cell.id: cell.outputs for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"}
    if bool(run_id) != any(shown.values()):
        return [f"{name(path)}: expected outputs of the default run, if there is one"]
    if not run_id:
        return []
    if not (ran := executed(path, run_id, output)).exists():  # it measures while it draws
        return [] if run_id in json.dumps(shown) else [f"{name(path)}: expected outputs of {run_id}: make outputs"]
    drawn, told = outputs_of(ran, output), "expected outputs as its record gives them: make outputs"
    said = [{one: [output.get("text") or output.get("data") for output in outputs[one]] for one in shown}
            for outputs in (shown, drawn)]
    return [f"{name(path)}, cell {one}: {told}" for one in shown
            if said[0][one] != said[1][one] and " is not drawn: " not in json.dumps(said[1][one])]


def test_records_draw_all_figures_and_outputs(tmp_path):
    "Of a checkout without runs and images: the same bytes, but for films and galleries, which their runs draw."
    shutil.copytree(ROOT / "figures" / "records", tmp_path / "figures" / "records")
    runs = {path: default_run(path.stem) for path in studies()}
    for run_id in filter(None, runs.values()):
        (tmp_path / "runs" / run_id).mkdir(parents=True)  # or what is drawn there goes
    call("asyproxy", "report", env=ENVIRONMENT | {"ASYPROXY_OUTPUT": str(tmp_path)})
    problems = [problem for path, run_id in runs.items() for problem in out_of_step(path, run_id, tmp_path)]
    assert not problems, "\n".join(problems)
    ours, drawn = (
        {path.relative_to(root / "figures"): path.read_bytes() for path in (root / "figures").glob("*/**/*")
         if path.is_file() and path.suffix != ".gif" and path.relative_to(root / "figures").parts[0] not in (
             "records", "benchmark")}
        for root in (ROOT, tmp_path))
    missing, more = sorted(map(str, ours.keys() - drawn.keys())), sorted(map(str, drawn.keys() - ours.keys()))
    other = sorted(str(path) for path in ours.keys() & drawn.keys() if ours[path] != drawn[path])
    assert not (missing or more or other), f"expected figures/ as drawn from figures/records by `asyproxy report`; " \
        f"only in figures: {missing}, only drawn: {more}, different: {other}"


OWN_FOLDER = """
from pathlib import Path
from PIL import Image
for number in range(16):
    path = Path(sys.argv[1], f"class {number // 2}", f"{number}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (30, 30), (9 * number, 99, 99)).save(path)
"""
WRONG = (
    ("loss", "learnabel", "got 'learnabel'; did you mean learnable?"), ("momentum", "1.5", "momentum to be in [0, 1]"),
    ("temperature", "inf", "temperature to be > 0, got inf"), ("lr", "nan", "lr to be > 0, got nan"),
    ("seed", "1.5", "seed to be of type int"), ("sead", "3", "got sead; did you mean seed?"),
    ("data_name", "../../../x", "got '../../../x'"), ("backbone_type", "resnet5", "did you mean resnet50?"),
    ("recalls", "1,1000", "expected each K of recalls in 1 ... 532"), ("recalls", "0", "recalls to be whole numbers"),
    ("validation", "0.9", "leaves at least two of the 7 training classes"), ("weights", "no.pth", "there is no such file"),
    ("device", "cuda", "expected a device of this machine"), ("precision", "tf32", "expected a GPU for precision tf32"),
    ("loss_options", "margn=1", "margn"), ("feature_dim", "0", "feature_dim to be at least 1"),
    ("schedule", "linear", "step, cosine, constant"), ("warm_up", "4", "fewer epochs than num_epochs (4), got 4"),
    ("with_test", "false", "with_test with oracle"),
)


def test_wrong_parameters_are_refused_before_work(tmp_path):
    "One line, exit code 2, nothing written; one process looks at all of them."
    own = tmp_path / "birds"
    call(sys.executable, "-c", "import sys\n" + OWN_FOLDER, own)
    images = {"data_name": "own", "data_path": str(own)}
    cases = [({name: value}, message) for name, value, message in WRONG]
    cases += [({"data_name": "own", "data_path": f"{own}s"}, "nothing at"), (images, "leaves at least two of the 4 training"),
              (images | {"validation": "0", "recalls": "1,10"}, "expected each K of recalls in 1 ... 7"),
              ({"validation": "0", "patience": "3"}, "a validation for patience 3"),
              (images | {"test_classes": "2"}, "test_classes to be a share"), (images | {"cropped": "true"}, "boxes")]
    script = f"""
import contextlib, io, json
from unittest.mock import patch
from asyproxy.study.command import main
from asyproxy.study.run import looking
small = {smallest(Experiment)!r}
with looking() as look, patch("asyproxy.study.run.looking", lambda: contextlib.nullcontext(look)):
    for given, message in json.loads({json.dumps(json.dumps(cases))}):
        options = [word for name, value in (small | given).items() for word in ("-p", name, str(value))]
        with contextlib.redirect_stderr(io.StringIO()) as said:
            code = main(["run", "benchmark", *options])
        said = said.getvalue()
        assert code == 2 and said.count("\\n") == 1 and said.startswith("asyproxy: ") and message in said, (given, code, said)
"""
    output = tmp_path / "output"
    call(sys.executable, "-c", script, env=ENVIRONMENT | {"ASYPROXY_OUTPUT": str(output)})
    assert not output.exists()


def test_runs_that_are_ended_come_to_the_same():
    "Ended three times; `ASYPROXY_FUZZ=13` tries 39 times."
    script = "import sys; sys.path.insert(0, '.ci'); import signals; signals.ended(int(sys.argv[1]), 0)"
    call(sys.executable, "-c", script, round(3 * float(os.environ.get("ASYPROXY_FUZZ", "1"))))


FATES = """
import resource, time
from tqdm import tqdm
if seed == 0:
    for epoch in range(5):
        for batch in tqdm(range(1000), desc=f"epoch {epoch + 1}/5", mininterval=0):
            pass
    print("the last line")
if seed == 1:
    raise ArithmeticError("seed 1")
if seed == 2:
    resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
held = bytearray(2**32 if seed == 2 else 2**28)
run.finish(metrics={"held": len(held)})
"""


@pytest.fixture
def four(tmp_path) -> Path:
    "A plan of four runs in a folder with braces; the kernel of its notebook is unknown, and a merge broke what is beside it."
    folder = tmp_path / "run{a}"
    kernel = {"name": "py39_new", "display_name": "of another machine", "language": "python"}
    (folder / "figures" / "records").mkdir(parents=True)
    begin = "from asyproxy.study import Run\nrun = Run('four', globals())"
    write_study(folder / "four.ipynb", "seed: int = 0", begin, FATES, kernel=kernel)
    for broken in ("broken.ipynb", "figures/records/broken.json"):
        (folder / broken).write_text("<<<<<<< HEAD\n{}\n=======\n{}\n>>>>>>> theirs")
    part = {"name": "seeds", "notebook": str(folder / "four.ipynb"), "grid": {"seed": [0, 1, 2, 3]}}
    (folder / "plan.yaml").write_text(json.dumps([part]))
    return folder


def test_a_run_that_fails_stops_no_other(four):
    "The second of four runs raises an error, the third takes too much memory; what they came to is listed and cleaned."
    environment = ENVIRONMENT | {"ASYPROXY_OUTPUT": str(four)}

    def asyproxy(*words, code=0) -> list[str]:
        command = [sys.executable, "-m", "asyproxy", *map(str, words)]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout.splitlines()

    said = asyproxy("batch", four / "plan.yaml", "--workers", 2, code=1)
    table = [line.split() for line in said[-5:-1]]
    assert [(row[0], row[1][:6]) for row in table] == [
        ("done", "four-0"), ("failed", "four-1"), ("failed", "four-2"), ("done", "four-3")], said
    assert " ArithmeticError: seed 1. See " in said[-4] and " MemoryError" in said[-3]
    assert said[-1].startswith("plan.yaml: 2 of 4 done, 2 failed") and "broken.json" in said[0]
    executed, = four.glob("runs/four-0-*/four.ipynb")
    assert "the last line" in executed.read_text() and executed.stat().st_size < 1_000_000
    again = asyproxy("batch", four / "plan.yaml", "--dry-run")
    assert [line.split()[:3] for line in again[1:3]] == [["would", "run", row[1]] for row in table[1:3]]
    states = {line.split()[1]: line for line in asyproxy("runs")}
    assert [states[row[1]].split()[0] for row in table] == ["complete", "failed", "failed", "complete"]
    assert states["broken"].startswith("damaged") and "ArithmeticError: seed 1" in states[table[1][1]]
    assert len(asyproxy("runs", "--clean", "failed", "--yes")) == 4
    assert sorted(path.name for path in four.glob("runs/*")) == sorted(row[1] for row in table if row[0] == "done")
    differing = asyproxy("runs", table[0][1], "four-3")
    assert ["seed", "0", "3"] in [line.split() for line in differing] and "lr" not in " ".join(differing)


@pytest.mark.parametrize("notebook", ("quick", "benchmark"))
def test_batches_that_are_ended_come_to_the_same(notebook):
    "Ended twice, with a notebook that only pretends to train; `ASYPROXY_FUZZ=20` tries 40 times, and 20 with another one."
    factor = float(os.environ.get("ASYPROXY_FUZZ", "1"))
    if number := round(2 * factor) if notebook == "quick" else int(factor) if factor > 1 else 0:
        script = "import sys; sys.path.insert(0, '.ci'); import batches; batches.ended(int(sys.argv[1]), 0, eval(sys.argv[2]))"
        call(sys.executable, "-c", script, number, notebook == "quick")
    else:
        pytest.skip("takes minutes")


ON_SLURM = """
import json, os, time
from asyproxy.files import write_atomically
if seed == 3:
    raise ArithmeticError("seed 3")
path, history = run.folder / "state.json", []
if path.exists():
    history = json.loads(path.read_text())
while len(history) < (60 if seed in (0, 5) else 2):
    time.sleep(0.2)
    history.append({"epoch": len(history) + 1, "start": int(os.environ.get("SLURM_RESTART_COUNT", "0"))})
    with write_atomically(path) as temporary:
        temporary.write_text(json.dumps(history))
run.finish(history=history, metrics={"nodes": int(os.environ["SLURM_JOB_NUM_NODES"])})
"""


def why_not_slurm() -> str:
    "Why no job can be submitted from here; empty if one can."
    if not shutil.which("sinfo"):
        return "Slurm is not on this machine"
    done = subprocess.run(["sinfo"], capture_output=True, text=True)
    return f"Slurm does not answer: {done.stderr.strip()}" if done.returncode else ""


def until(what, seconds: float = 120):
    "Waits for something to be there, and gives it."
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return found


def test_batch_on_slurm(tmp_path):
    """Six runs on the Slurm of this machine: one fails, one is requeued in the middle and goes on, one is cancelled. The
    batch is ended and started again: it finds what runs, and queues the one that was cancelled."""
    if reason := why_not_slurm():
        pytest.skip(reason)
    begin = "from asyproxy.study import Run\nrun = Run('six', globals())"
    write_study(tmp_path / "six.ipynb", "seed: int = 0", begin, ON_SLURM)
    part = {"name": "seeds", "notebook": str(tmp_path / "six.ipynb"), "grid": {"seed": [0, 5, 1, 2, 3, 4]}}
    (tmp_path / "plan.yaml").write_text(json.dumps([part]))
    command = [sys.executable, "-m", "asyproxy", "batch", str(tmp_path / "plan.yaml"), "--on", "slurm"]
    options = {"env": ENVIRONMENT | {"ASYPROXY_OUTPUT": str(tmp_path)}, "cwd": ROOT, "text": True}
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}

    first = subprocess.Popen(command, **options)
    path = until(lambda: next(tmp_path.glob("runs/slurm/*/submission.json"), None))
    numbers = until(lambda: json.loads(path.read_text())["jobs"])
    runs = {name[4]: (name, job) for name, job in zip(json.loads(path.read_text())["names"], numbers)}  # by seed
    state = tmp_path / "runs" / runs["0"][0] / "state.json"
    until(lambda: state.exists() and len(json.loads(state.read_text())) > 3)
    call("scontrol", "requeue", runs["0"][1])
    call("scancel", runs["5"][1])
    cancelled = next((line for line in first.stdout if "cancelled" in line), "nobody was cancelled")
    assert cancelled.split()[:2] == ["failed", runs["5"][0]]
    first.terminate()
    said = first.communicate()[0]
    assert first.returncode == 143 and f"`scancel {runs['0'][1].partition('_')[0]}` cancels them" in said, said

    second = subprocess.run(command, check=False, **options)
    assert second.returncode == 1 and "5 of 6 done" in second.stdout and "1 failed" in second.stdout, second.stdout
    failed = [line for line in second.stdout.splitlines() if line.startswith("failed")]
    assert {line.split()[1] for line in failed} == {runs["3"][0]} and "ArithmeticError: seed 3" in failed[0]
    records = {path.stem[4]: json.loads(path.read_text()) for path in tmp_path.glob("figures/records/*.json")}
    assert sorted(records) == sorted("01245") and all(record["metrics"] == {"nodes": 1} for record in records.values())
    assert [entry["epoch"] for entry in records["0"]["history"]] == list(range(1, 61))
    assert {entry["start"] for entry in records["0"]["history"]} == {0, 1}, "expected it to go on after it was requeued"
    submitted = [name for path in tmp_path.glob("runs/slurm/*/submission.json") for name in json.loads(path.read_text())["names"]]
    assert submitted.count(runs["0"][0]) == 1 and submitted.count(runs["5"][0]) == 2


ISC = "from asyproxy.fixtures import write_fixture; write_fixture(sys.argv[1], 'isc', 'official')"
OWN = """
from pathlib import Path
from PIL import Image
for number in range(48):
    path = Path(sys.argv[1], f"${number // 4} or $5", f"{number}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), (20 * (number // 4), 60 * (number % 4), 99)).save(path)
"""


@pytest.mark.parametrize("data_name, script, options, expected", (
    ("isc", ISC, ("--cropped", "--allow_incomplete", "--cache"),
     {"complete": False, "cropped": True, "query": {"images": 3, "classes": 3}, "gallery": {"images": 6, "classes": 3}}),
    ("own", OWN, (), {"complete": True, "train": {"images": 24, "classes": 6}, "test": {"images": 24, "classes": 6}})))
def test_images_from_disk(tmp_path, data_name, script, options, expected):
    "`asyproxy prepare`, then the command that it prints: boxes, query and gallery, cache; twelve folders of one's own."
    environment = ENVIRONMENT | {"ASYPROXY_OUTPUT": str(tmp_path), "ASYPROXY_CACHE": str(tmp_path / "cache")}
    folder = tmp_path / "it's $5; my data"
    call(sys.executable, "-c", "import sys\n" + script, folder / data_name)
    path = folder if data_name == "isc" else folder / data_name
    printed = call("asyproxy", "prepare", data_name, "--data_path", path, *options, env=environment)
    command = shlex.split(printed.strip().splitlines()[-1].removeprefix("next: "))
    quick = {"backbone_type": "convnet", "weights": "random", "feature_dim": 8, "batch_size": 4, "num_epochs": 1,
             "num_workers": 2}
    call(*command, *(part for pair in quick.items() for part in ("-p", *map(str, pair))), env=environment)
    record = json.loads(next((tmp_path / "figures" / "records").glob("benchmark-*.json")).read_text())
    assert {key: record["data"].get(key) for key in expected} == expected
    if data_name == "own":
        ask_for_a_photo(path, record["run_id"], tmp_path, environment)


def ask_for_a_photo(photos: Path, run_id: str, output: Path, environment: dict):
    "All photographs become a database, and the command that is printed then finds one of them, and others."
    shelf = output / "my shelf"
    printed = call("asyproxy", "index", photos, "--model", run_id, "--to", shelf, "--data_name", "own", env=environment)
    assert "48 images of 12 classes" in printed, printed
    photo = next(photos.rglob("17.png"))
    command = shlex.split(printed.strip().splitlines()[-1].replace("PHOTO", shlex.quote(str(photo))))
    said = call(*command, "-p", "retrieval_num", "3", env=environment)
    assert "17.png: $4 or $5 (0.000" in said, said
    folder = next((output / "runs").glob("retrieval-*"))
    answers = pd.read_csv(folder / "answers.csv")
    assert len(answers) == 3 and answers["path"][0].endswith("/17.png") and answers["class_name"][0] == "$4 or $5"
    assert {path.name for path in folder.glob("*.png")} == {"gallery.png"}
    for asked in (("-p", "query_img_name", photos / "*" / "1*.png", "-p", "binary", "true"), ("-p", "count", "3")):
        call("asyproxy", "run", "retrieval", "-p", "data_base", shelf, *asked, env=environment)
    assert {path.name for path in (output / "runs").glob("retrieval-*/*.csv")} == {
        "answers.csv", "judged.csv", "confused.csv"}
    assert len(list((output / "runs").glob("retrieval-*/worst.png"))) == 1
    metrics = [json.loads(path.read_text())["metrics"] for path in (output / "figures/records").glob("retrieval-*.json")]
    assert sorted(one["queries"] for one in metrics) == [1, 3, 11]


def test_toy_on_photographs(tmp_path):
    "The same notebook on STL10: only data_name and data_path change."
    script = "import sys; from asyproxy.fixtures import write_stl10; write_stl10(sys.argv[1])"
    call(sys.executable, "-c", script, tmp_path / "stl10")
    data = run_study("toy", tmp_path, data_name="stl10", data_path=tmp_path, allow_incomplete=True)["data"]
    assert (data["train"]["classes"], data["test"]["classes"], data["complete"]) == (7, 3, False)


# The page of a database.


def why_not_browser() -> str:
    "Why the page can't be tried; empty if it can."
    browsers = ("chromium", "chromium-browser", "google-chrome")
    missing = [] if any(map(shutil.which, browsers)) else ["CHROMIUM"]
    missing += [] if shutil.which("chromedriver") else ["CHROMEDRIVER"]
    return f"NO {' AND NO '.join(missing)} HERE, SO THE PAGE WAS NOT TRIED IN A BROWSER; on Debian, as root: " \
           "apt-get install chromium chromium-driver" if missing else ""


def test_page_in_a_browser(tmp_path):
    "A headless Chromium visits it: see `.ci/browser.py`."
    if reason := why_not_browser():
        pytest.skip(reason)
    call(sys.executable, ".ci/browser.py", tmp_path)


def test_page_is_refused_without_a_database(tmp_path):
    done = subprocess.run([sys.executable, "-m", "asyproxy.page.serving", str(tmp_path)], env=ENVIRONMENT, cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "which holds database.json" in done.stderr, done.stderr


# Every notebook runs; those that take minutes begin, so that the two processes end together.


def is_short(path: Path) -> bool:
    return path.stem not in ("protocol", "fuzz", "counting", "sharded", "run")


@pytest.mark.parametrize("path", sorted(set(library()) - set(pages()), key=lambda path: (is_short(path), path)), ids=name)
def test_library_notebook(path, tmp_path, monkeypatch):
    "As `nbdev_test` does it, in a process that is forked from one in which the libraries are: they take seconds a notebook."
    for variable, value in ENVIRONMENT.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.chdir(ROOT)
    context, said = multiprocessing.get_context("forkserver"), tmp_path / "said.txt"
    context.set_forkserver_preload(["nbdev.test", "torchvision", "pandas", "numba", "papermill", "scipy.stats", "timm"])
    process = context.Process(target=try_notebook, args=(str(path), str(said)))
    process.start()
    process.join()
    output = said.read_text(errors="replace")
    assert process.exitcode == 0 and "Success" in output, output[-6000:]

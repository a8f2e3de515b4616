"""Looks for holes in the tests: breaks one line of a notebook's exported code at a time and runs the notebook.

    python .ci/mutants.py evaluation/levels loss/moving --number 10 --seed 1 --out mutants.csv

A mutant that no cell notices survives, and is printed: either it changes no result, or a test is missing, which goes
into that notebook. `--only ID` tries one again. The cells are run in order up to the first that fails; other rooms
stay as the package has them, also in processes that a test starts: what only those run seems to survive.
Kernels are compiled anew for every mutant, for numba finds no file beside which to keep them.
"""

import argparse
import ast
import csv
import hashlib
import importlib
import io
import json
import linecache
import os
import random
import resource
import sys
import tempfile
import threading
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import NamedTuple

NBS = Path(__file__).resolve().parents[1] / "nbs"
HEAVY = ("torch", "numpy", "numba", "numba.core.registry", "pandas", "torchvision", "scipy.stats", "sklearn.datasets",
         "timm", "matplotlib.pyplot", "pytorch_metric_learning.losses", "IPython.display")  # imported once
SWAPS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitOr,
    ast.And: ast.Or, ast.Or: ast.And}
TWINS = {"min": "max", "any": "all", "floor": "ceil", "argmin": "argmax", "sum": "max", "sorted": "list",
         "minimum": "maximum", "amin": "amax", "zeros": "ones", "zeros_like": "ones_like", "startswith": "endswith"}
TWINS |= {other: one for one, other in TWINS.items() if other not in ("list", "max")} | {"max": "min"}
TEXT = {"tqdm", "print", "warn", "info", "warning", "debug"}  # calls whose arguments are for people


class Mutant(NamedTuple):
    id: str
    function: str
    operator: str
    cell: int  # of the notebook
    line: int  # of the cell
    before: str
    after: str
    source: str  # of the cell, broken


def changes(node: ast.AST, bound: set[str]):
    "What may be done to a node: operator, node to replace, its new source."
    match node:
        case ast.Compare(ops=[op]) if type(op) in SWAPS:
            yield "compare", node, ast.Compare(node.left, [SWAPS[type(op)]()], node.comparators)
        case ast.BinOp() if type(node.op) in SWAPS and not is_text(node.right) and not is_text(node.left):
            yield "arithmetic", node, ast.BinOp(node.left, SWAPS[type(node.op)](), node.right)
        case ast.BoolOp():
            yield "boolean", node, ast.BoolOp(SWAPS[type(node.op)](), node.values)
            yield "operand", node, ast.BoolOp(node.op, node.values[:-1]) if node.values[2:] else node.values[0]
            yield "operand", node, ast.BoolOp(node.op, node.values[1:]) if node.values[2:] else node.values[1]
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield "unary", node, node.operand
        case ast.IfExp():
            yield "branches", node, ast.IfExp(node.test, node.orelse, node.body)
        case ast.Constant(value=bool()):
            yield "constant", node, ast.Constant(not node.value)
        case ast.Constant(value=int()):
            yield "constant", node, ast.Constant(node.value + 1)
        case ast.Constant(value=float()):
            yield "constant", node, ast.Constant(node.value * 1.2 or 0.1)
        case ast.Call(func=ast.Name(id=name)) if name in TWINS:
            yield "call", node.func, ast.Name(TWINS[name])
        case ast.Call(func=ast.Attribute(attr=name)) if name in TWINS:
            yield "call", node.func, ast.Attribute(node.func.value, TWINS[name])
        case ast.Return(value=ast.Tuple(elts=[first, second, *rest])):
            yield "return", node.value, ast.Tuple([second, first, *rest])
        case ast.comprehension() if node.ifs:
            yield "filter", node.ifs[0], ast.Constant(True)
        case ast.AugAssign() | ast.Expr(value=ast.Call()) | ast.If(orelse=[]):
            yield "statement", node, ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield "statement", node, ast.Pass()
        case ast.Assign(targets=[ast.Name(id=name)]) if name in bound:
            yield "statement", node, ast.Pass()
    if isinstance(node, ast.Call):
        for keyword in node.keywords:
            if keyword.arg:
                yield "keyword", node, ast.Call(node.func, node.args, [k for k in node.keywords if k is not keyword])


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or isinstance(node, ast.Constant) and isinstance(node.value, str)


def parts(node: ast.AST):
    "The children that do something: no annotation, no text, nothing for people."
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "type_comment", "names"):
            continue
        for child in value if isinstance(value, list) else [value]:
            called = getattr(getattr(child, "func", None), "id", None) or getattr(getattr(child, "func", 0), "attr", 0)
            if isinstance(child, ast.AST) and not isinstance(child, ast.Raise | ast.JoinedStr) and called not in TEXT:
                yield child


def walk(node: ast.AST, function: str, bound: set[str]):
    "Every change below a node, with the name of what holds it."
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        function = f"{function}.{node.name}".strip(".")
        bound = bound | {arg.arg for arg in ast.walk(node) if isinstance(arg, ast.arg)}
    for change in changes(node, bound):
        yield function, *change
    for child in parts(node):
        yield from walk(child, function, bound)
        if isinstance(child, ast.Assign):
            bound = bound | {target.id for target in child.targets if isinstance(target, ast.Name)}


def replaced(source: str, node: ast.AST, new: ast.AST) -> str:
    "The source with other text for a node, on as many lines."
    text = ast.unparse(ast.fix_missing_locations(new))
    text = f"({text})" if isinstance(node, ast.expr) and not isinstance(new, ast.Name | ast.Attribute) else text
    lines = source.encode().splitlines(keepends=True)
    start, stop = (sum(map(len, lines[:line - 1])) + column for line, column in (
        (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)))
    filling = "\n" * (node.end_lineno - node.lineno) if isinstance(node, ast.expr) else ""
    text = text[:-1] + filling + ")" if text.endswith(")") else text
    return (source.encode()[:start] + text.encode() + source.encode()[stop:]).decode()


def mutants(cells: list[str]) -> list[Mutant]:
    "All of a notebook that are Python."
    found = {}
    for number, source in enumerate(cells):
        if "#| export" not in source:
            continue
        for function, operator, node, new in walk(ast.parse(source), "", set()):
            changed = replaced(source, node, new)
            with suppress(SyntaxError):
                compile(changed, "mutant", "exec")
                before, after = (" ".join(ast.unparse(one).split())[:160] for one in (node, new))
                key = f"{function} {operator} {node.lineno} {node.col_offset} {before} {after}"
                key = hashlib.sha256(key.encode()).hexdigest()[:8]
                found[key] = Mutant(key, function, operator, number, node.lineno, before, after, changed)
    return list(found.values())


def sample(all_of_them: list[Mutant], number: int, seed: int) -> list[Mutant]:
    "One of each function in turn, in random order, and another kind each time as long as there is one."
    rng, left, chosen = random.Random(seed), {}, []
    for mutant in rng.sample(all_of_them, len(all_of_them)):
        left.setdefault(mutant.function, []).append(mutant)
    taken = {}
    while left and len(chosen) < number:
        for function in list(left):
            one = min(left[function], key=lambda m: taken.get((function, m.operator), 0) * 10 + taken.get(m.operator, 0))
            left[function].remove(one)
            for key in ((function, one.operator), one.operator):
                taken[key] = taken.get(key, 0) + 1
            chosen.append(one)
            if not left[function]:
                del left[function]
    return chosen[:number]


def code_cells(room: str) -> list[str]:
    cells = json.loads((NBS / f"{room}.ipynb").read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def run_cells(cells: list[str], folder: Path) -> str:
    "What went wrong in which cell; nothing if nothing did."
    os.chdir(folder)
    space = sys.modules["__main__"].__dict__  # so that classes can be pickled
    for number, source in enumerate(cells):
        name = f"<cell {number}>"
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        try:
            exec(compile(source, name, "exec"), space)
        except BaseException as error:
            where = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == name]
            text = " ".join(f"{type(error).__name__}: {error}".split())[:120]
            return f"cell {number}, line {where[0] if where else 0}: {text}"
    return ""


def run(cells: list[str], folder: Path, cpu: float, wall: float) -> tuple[str, float]:
    "The same in a process of its own with limits in seconds, and the seconds of a CPU that it took."
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as temporary:
        result = Path(temporary) / "result"
        pid = os.fork()
        if not pid:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_CPU, (int(cpu) + 1, int(cpu) + 2))
            os.environ["TMPDIR"] = tempfile.tempdir = temporary
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                found = run_cells(cells, folder)
            result.write_text(found)
            os._exit(0)
        timer = threading.Timer(wall, lambda: os.killpg(pid, 9))
        timer.start()
        code = os.waitpid(pid, 0)[1]
        timer.cancel()
        with suppress(ProcessLookupError):
            os.killpg(pid, 9)  # what it has started
        found = result.read_text() if result.exists() else f"out of time, or ended with {code}"
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found, ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rooms", nargs="+", help="notebooks below nbs, without .ipynb")
    parser.add_argument("--number", type=int, default=8, help="of mutants per room")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="ids of mutants")
    parser.add_argument("--out", type=Path, help="a table of results, to which those that it lacks are added")
    asked = parser.parse_args()
    for module in HEAVY:
        with suppress(ImportError):
            importlib.import_module(module)
    for room in asked.rooms:
        cells, folder = code_cells(room), (NBS / room).parent
        started = time.time()
        wrong, cpu = run(cells, folder, 900, 1800)
        wall = time.time() - started
        print(f"{room}: {cpu:.0f} s of a CPU, {wall:.0f} s", wrong, flush=True)
        if wrong:
            continue
        every = mutants(cells)
        chosen = [m for m in every if m.id in asked.only] if asked.only else sample(every, asked.number, asked.seed)
        tried = {tuple(row[:2]) for row in csv.reader(asked.out.open())} if asked.out and asked.out.exists() else set()
        chosen = [m for m in chosen if (room, m.id) not in tried]
        survived = 0
        for mutant in chosen:
            broken = cells[:mutant.cell] + [mutant.source] + cells[mutant.cell + 1:]
            wrong, seconds = run(broken, folder, 2 * cpu + 10, 5 * wall + 60)
            survived += not wrong
            if asked.out:
                with asked.out.open("a") as file:
                    csv.writer(file).writerow([room, *mutant[:-1], "killed" if wrong else "SURVIVED", f"{seconds:.1f}", wrong])
            if not wrong:
                print(f"  {mutant.id} {mutant.function}, line {mutant.line}: {mutant.before}  ->  {mutant.after}", flush=True)
        print(f"{room}: {len(chosen) - survived} of {len(chosen)} killed, of {len(every)} that could be", flush=True)


if __name__ == "__main__":
    main()

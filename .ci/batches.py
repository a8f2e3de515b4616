"""`batches.py 40 0`, the number and a seed: batches that are ended by a signal, at a moment drawn at random, and started again.

Ended are the command, its group, everything at once, or a run or a kernel of it, with one worker and with two. What was
ended is gone three seconds later; a batch of which a run was ended goes on by itself. In the end there are the records
of a batch that was left alone, and no others. `batches.py 40 0 quick` takes a notebook that only pretends to train."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from project import hear
from signals import OWN, SIGNALS, finished, left, members

from asyproxy.fixtures.notebooks import write_study

TARGETS = ("command", "group", "all", "run", "kernel")
GOES_ON = ("run", "kernel")  # of which the command hears nothing
TRAINED = {"data_name": "digits", "backbone_type": "convnet", "weights": "random", "feature_dim": 8, "device": "cpu",
           "validation": 0.3}
CELLS = (
    "seed: int = 0\nlr: float = 0.1\nnum_epochs: int = 3\nvalidation: float = 0.3\nwith_test: bool = True\n"
    "retrieval_num: int = 0",
    "import json, time\nfrom asyproxy.files import write_atomically\nfrom asyproxy.study import Run\n"
    "run = Run('quick', globals())\nstate, history = run.folder / 'state.json', []\n"
    "if state.exists(): history = json.loads(state.read_text())",
    "while len(history) < num_epochs:\n"
    "    time.sleep(0.2)\n"
    "    history.append({'epoch': len(history) + 1, 'validation': {'recall@1': 1 / (1 + abs(lr - 0.1))}})\n"
    "    with write_atomically(state) as temporary: temporary.write_text(json.dumps(history))\n"
    "run.finish(history=history, metrics={'lr': lr} if with_test else {})")


def write_plan(folder: Path, quick: bool) -> Path:
    "A run, a search of two generations, and its winner with another seed: four runs, or seven with a rung."
    notebook = str(folder / "quick.ipynb") if quick else "benchmark"
    write_study(folder / "quick.ipynb", *CELLS)
    search = {"trials": 2, "generation": 1} if quick else {
        "trials": 3, "generation": 2, "rungs": {"num_epochs": [2, 3]}}
    search["space"] = {"lr": {"low": 1e-4, "high": 1e-1, "log": True}}
    fixed = {"validation": 0.2} if quick else TRAINED
    parts = [{"name": "alone", "notebook": notebook, "fixed": fixed | {"num_epochs": 3, "retrieval_num": 0}},
             {"name": "choose", "notebook": notebook, "fixed": fixed, "search": search},
             {"name": "test", "best_of": "choose", "fixed": {"retrieval_num": 0}, "grid": {"seed": [1]}}]
    path = folder / "plan.yaml"
    path.write_text(json.dumps(parts))
    return path


def start(folder: Path, workers: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "asyproxy", "batch", str(folder / "plan.yaml"), "--workers", str(workers)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "preexec_fn": hear}
    return subprocess.Popen(command, env=os.environ | {"ASYPROXY_OUTPUT": str(folder)}, start_new_session=True, **streams)


def one_of(folder: Path, target: str, rng: random.Random) -> int | None:
    "A process of a run or of a kernel."
    words = {"run": " -m asyproxy run ", "kernel": "ipykernel_launcher"}[target]
    found = [pid for pid, command in members(folder).items() if words in command and "asyproxy.children" not in command]
    return rng.choice(found) if found else None


def send(process: subprocess.Popen, folder: Path, name: str, target: str, rng: random.Random) -> bool:
    "Whether there was somebody to send it to."
    number = getattr(signal, name)
    while target in GOES_ON and one_of(folder, target, rng) is None and process.poll() is None:
        time.sleep(0.05)
    if process.poll() is not None:
        return False
    try:
        if target == "all":
            for pid in members(folder):
                os.kill(pid, number)
        elif target == "group":
            os.killpg(process.pid, number)
        else:
            os.kill(process.pid if target == "command" else one_of(folder, target, rng), number)
    except (ProcessLookupError, TypeError):
        return target == "all"
    return True


def records(folder: Path) -> dict[str, dict]:
    "What the records say, without what is their own."
    found = {}
    for path in (folder / "figures" / "records").glob("[!.]*.json"):
        found[path.stem] = {name: value for name, value in json.loads(path.read_text()).items() if name not in OWN}
    return found


def end_once(folder: Path, way: tuple, workers: int, moment: float, rng: random.Random) -> bool:
    "Whether a batch was ended at a moment; raises AssertionError where something of it lives on, or a run is lost."
    name, target = way
    process = start(folder, workers)
    time.sleep(moment)
    if not send(process, folder, name, target, rng):
        process.communicate()
        return False
    if target in GOES_ON:
        said, _ = process.communicate()
        assert process.returncode == 0, f"{way}: {said}"
        return True
    alive = left(folder)
    assert not alive, f"{way}: {alive}"
    said, _ = process.communicate()
    python_begins = said.strip().endswith("KeyboardInterrupt")  # later the command listens, and says it in a line
    assert target == "all" or "Traceback" not in said or python_begins, f"{way}: {said}"
    return True


def ended(count: int, seed: int, quick: bool) -> Counter:
    "Ends batches so often, each up to four times; raises AssertionError where the records are others then."
    rng, counts = random.Random(seed), Counter()
    ways = list(itertools.product(SIGNALS, TARGETS))
    rng.shuffle(ways)
    endless = itertools.cycle(ways)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_plan(folder, quick)
        length = finished(start(folder, 1))
        expected = records(folder)
        assert len(expected) == (4 if quick else 7), sorted(expected)
        for workers in itertools.cycle((2, 1)):
            if counts.total() >= count:
                return counts
            for name in ("runs", "figures"):
                shutil.rmtree(folder / name, ignore_errors=True)
            for way in itertools.islice(endless, min(4, count - counts.total())):
                if not end_once(folder, way, workers, rng.uniform(0, length / workers), rng):
                    break  # everything is complete
                counts[", ".join(way)] += 1
                print(f"{counts.total()}/{count} {way[0]} to {way[1]}, {workers} workers", flush=True)
                if way[1] in GOES_ON:
                    break
            finished(start(folder, workers))
            assert records(folder) == expected, f"other records with {workers} workers"
            kept = {path.name for path in (folder / "runs").iterdir()}
            assert len(kept) == 2, f"expected the folders of two runs, and none of a trial, got {kept}"
            print(f"the records of {workers} workers are those of a batch left alone", flush=True)


if __name__ == "__main__":
    counted = ended(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] == ["quick"])
    print(*sorted(counted.items()), sep="\n")

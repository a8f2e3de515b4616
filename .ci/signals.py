"""`signals.py 40 0`, the number and a seed: runs that are ended by a signal, at a moment drawn at random, and started again.

Ended are the command alone, its kernel alone, or the command's group of processes, with one and with two devices. Three
seconds later nothing of the run may live. The same command is given again, up to four times in vain, and has to come to
the record of a run that was left alone."""

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

import psutil

from project import hear

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGKILL")
TARGETS = ("command", "kernel", "group")
SMALL = {"data_name": "digits", "backbone_type": "convnet", "weights": "random", "feature_dim": 8, "num_epochs": 6,
         "validation": 0.3, "device": "cpu"}
OWN = ("environment", "seconds", "peak_memory_mb", "sha256")  # of a record: what differs between runs that agree


def command(devices: int, seed: int = 0) -> list[str]:
    given = SMALL | {"devices": devices, "seed": seed}
    words = [word for name, value in given.items() for word in ("-p", name, str(value))]
    return [sys.executable, "-m", "asyproxy", "run", "benchmark", *words]


def start(folder: Path, devices: int, seed: int = 0) -> subprocess.Popen:
    environment = os.environ | {"ASYPROXY_OUTPUT": str(folder)}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "preexec_fn": hear}
    return subprocess.Popen(command(devices, seed), env=environment, start_new_session=True, **streams)


def members(folder: Path) -> dict[int, str]:
    "Every process that has this folder for its results, whoever started it: its number and its command."
    found = {}
    for process in psutil.process_iter():
        try:
            if process.environ().get("ASYPROXY_OUTPUT") == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = " ".join(process.cmdline())
        except psutil.Error:
            pass
    return found


def kernel(folder: Path) -> int | None:
    return next((pid for pid, words in members(folder).items() if "ipykernel_launcher" in words), None)


def send(process: subprocess.Popen, folder: Path, name: str, target: str) -> bool:
    "Whether there was somebody to send it to."
    number = getattr(signal, name)
    while target == "kernel" and kernel(folder) is None and process.poll() is None:
        time.sleep(0.05)
    if process.poll() is not None:
        return False
    try:
        if target == "group":
            os.killpg(process.pid, number)
        else:
            os.kill(process.pid if target == "command" else kernel(folder), number)
    except (ProcessLookupError, TypeError):
        return False
    return True


def left(folder: Path, seconds: float = 3) -> dict[int, str]:
    "Who lives when the time is over."
    end = time.monotonic() + seconds
    while (alive := members(folder)) and time.monotonic() < end:
        time.sleep(0.1)
    return alive


def record(folder: Path, devices: int) -> dict:
    "What the one record of seed 0 and so many devices says, without what is its own."
    records = [json.loads(path.read_text()) for path in (folder / "figures" / "records").glob("[!.]*.json")]
    one, = (each for each in records if (each["parameters"]["seed"], each["parameters"]["devices"]) == (0, devices))
    return {name: value for name, value in one.items() if name not in OWN}


def finished(process: subprocess.Popen) -> float:
    "Seconds of what was started just now and is left alone."
    begun = time.monotonic()
    said, _ = process.communicate()
    assert process.returncode == 0, said
    return time.monotonic() - begun


def others(folder: Path) -> dict[Path, bytes]:
    "The files of the run with seed 9."
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "-9-" in str(path)}


def end_once(folder: Path, way: tuple, moment: float) -> bool:
    "Whether a run was ended at a moment; raises AssertionError where something of it lives on."
    name, target, devices = way
    process = start(folder, devices)
    time.sleep(moment)
    if not send(process, folder, name, target):
        process.communicate()
        return False
    alive = left(folder)
    if alive and (name, target) == ("SIGINT", "kernel"):  # an idle kernel does not hear it, and the run goes on; one
        process.wait(300)  # that hears it stops when Python comes to it, which may take longer on a busy machine
        alive = left(folder)
    said, _ = process.communicate()
    assert not alive, f"{way}: {alive}"
    assert target == "kernel" or "Traceback" not in said, f"{way}: {said}"
    return True


def ended(count: int, seed: int) -> Counter:
    "Ends runs so often, each of them up to four times; raises AssertionError where its record is another one then."
    rng, counts = random.Random(seed), Counter()
    ways = list(itertools.product(SIGNALS, TARGETS))
    rng.shuffle(ways)
    endless = itertools.cycle(ways)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        finished(start(folder, 1, seed=9))
        untouched, expected, length = others(folder), {}, {}
        for devices in itertools.cycle((1, 2)):
            if counts.total() >= count:
                return counts
            if devices not in expected:
                length[devices] = finished(start(folder, devices))
                expected[devices] = record(folder, devices)
            for path in [*folder.glob("runs/*-0-*"), *folder.glob("figures/records/*-0-*")]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            for name, target in itertools.islice(endless, min(4, count - counts.total())):
                if end_once(folder, (name, target, devices), rng.uniform(0, length[devices])):
                    counts[f"{name}, {target}"] += 1
                    print(f"{counts.total()}/{count} {name} to the {target}, devices {devices}", flush=True)
            finished(start(folder, devices))
            assert record(folder, devices) == expected[devices], f"another record with {devices} devices"
            assert others(folder) == untouched, "other runs were touched"
            print(f"the record of {devices} devices is that of a run left alone", flush=True)


if __name__ == "__main__":
    print(*sorted(ended(*map(int, sys.argv[1:])).items()), sep="\n")

"""The page in a real Chromium: what a visitor does, step by step, and what the page says to it.

`python .ci/browser.py FOLDER` ends with an error where something is wrong; its screenshots stay in the folder."""

import base64
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from project import ROOT, hear
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from asyproxy.data import ImageSet
from asyproxy.data.digits import load_digits
from asyproxy.model import EmbeddingModel, embed
from asyproxy.retrieval import ask_images, ask_items, build_database, calibrate, load_database, save_database

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
EVIL = "<img src=x onerror=window.hacked=1>"
DESKTOP, PHONE = 1280, 360


# What is tried with.


def make_database(folder: Path):
    "Digits under an untrained network, with a threshold; the first class has an evil name."
    torch.manual_seed(0)
    digits, model = load_digits(), EmbeddingModel("convnet", 16, weights="random")
    rows = np.flatnonzero(digits.table["split"] == "test")[::4]
    made = build_database(model, digits, np.isin(np.arange(len(digits.table)), rows))
    items = made.items.assign(class_name=made.items["class_name"].replace("7", f"7{EVIL}"))
    saved = save_database(replace(made, items=items), folder, model=model)
    calibrate(saved, embed(model, ImageSet(digits, "train"))[0][::3])


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def make_files(folder: Path, database) -> dict[str, Path]:
    "An image that is in a database, others, and what is none."
    folder.mkdir()
    pixels, rng = load_digits().source.pixels, np.random.default_rng(0)
    names = {"digit": "digit.png", "noise": "noise.jpg", "evil": f"{EVIL}.png", "text": "text.png",
             "large": "large.png", "bomb": "bomb.png", "half": "half.png"}
    files = {name: folder / file for name, file in names.items()}
    Image.fromarray(pixels[database.items["row"][7]]).save(files["digit"])
    Image.fromarray(rng.integers(0, 256, (80, 80, 3), np.uint8)).save(files["noise"])
    Image.fromarray(pixels[1400]).save(files["evil"])
    files["text"].write_text("no picture")
    files["half"].write_bytes(files["digit"].read_bytes()[:-60])
    with open(files["large"], "wb") as file:
        file.truncate(20_000_001)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 1, 0, 0, 0, 0))
    content = chunk(b"IDAT", zlib.compress(bytes(999))) + chunk(b"IEND", b"")
    files["bomb"].write_bytes(b"\x89PNG\r\n\x1a\n" + header + content)
    return files


class Server:
    "The page of a database, until the block ends."

    def __init__(self, folder: Path, *arguments: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.environment = os.environ | {
            "ASYPROXY_PORT": str(port), "ASYPROXY_CACHE": str(folder / "cache"),
            "ASYPROXY_OUTPUT": str(folder / "output"), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "DISPLAY": "",
            "WAYLAND_DISPLAY": ""}
        self.command, self.log = [sys.executable, "-m", "asyproxy.page.serving", *arguments], folder / f"{port}.log"

    def __enter__(self):
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(self.command, cwd=ROOT, env=self.environment, stdout=subprocess.PIPE,
                                            stderr=log, text=True, preexec_fn=hear)
        line = self.process.stdout.readline()
        assert "The page is at http://127.0.0.1:" in line, line + self.log.read_text()
        self.url = line.split()[4]
        return self

    def __exit__(self, *_):
        kernels = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGINT)
        try:
            assert self.process.wait(30) == 0, self.log.read_text()
            assert kernels and not psutil.wait_procs(kernels, 10)[1], "expected no kernel to outlive the server"
        finally:
            self.process.kill()
            self.process.stdout.close()

    def status(self, path: str, **headers: str) -> int:
        "What a request gets."
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, headers=headers), timeout=20) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code


class Visitor:
    "A Chromium, its first page open."

    def __init__(self, profile: Path):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
                     "disable-background-networking", "disable-component-update", "disable-dev-shm-usage",
                     f"user-data-dir={profile}", f"window-size={DESKTOP},900"):
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.browser = webdriver.Chrome(options, Service(DRIVER))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.browser.quit()

    def ask(self, script: str, *values):
        return self.browser.execute_script(f"return {script}", *values)

    def find(self, selector: str):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def part(self, name: str) -> str:
        return self.ask("document.querySelector(`[data-part=${arguments[0]}]`)?.textContent ?? ''", name)

    def until(self, *texts: str, part: str = "status", seconds: float = 60) -> str:
        "Waits for texts in a part of the page."
        end = time.monotonic() + seconds
        while not all(text in (said := self.part(part)) for text in texts):
            assert time.monotonic() < end, f"expected {texts}, the page says {said!r}"
            time.sleep(0.05)
        return said

    def bring(self, path: Path):
        self.ask("document.querySelector('[data-part=status]').textContent = ''")
        self.find("input[type=file]").send_keys(str(path))

    def answers(self) -> list[tuple[int, str]]:
        "Position and distance of each, as they are shown."
        return [tuple(one) for one in self.ask(
            "[...document.querySelectorAll('.found li')].map(li => [+li.dataset.position, "
            "li.querySelector('.distance').textContent])")]

    def width(self, pixels: int):
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": pixels, "height": 800, "deviceScaleFactor": 1, "mobile": pixels < 500})

    def picture(self, path: Path):
        "Of the whole page."
        size = {key: self.ask(f"document.documentElement.scroll{key.capitalize()}") for key in ("width", "height")}
        shot = self.browser.execute_cdp_cmd("Page.captureScreenshot", {
            "captureBeyondViewport": True, "clip": {"x": 0, "y": 0, "scale": 1, **size}})
        path.write_bytes(base64.b64decode(shot["data"]))


def shown(table, bits: int = 0) -> list[tuple[int, str]]:
    "What the page shows of a table of answers."
    return [(position, f"{distance:.0f} of {bits} bits" if bits else f"distance {max(distance, 0):.3f}")
            for position, distance in zip(table["position"], table["distance"])]


# What a visitor does.


def uploads(visitor: Visitor, database, files: dict[str, Path]):
    "An image of one's own, dense and binary, with another K: the answers of `ask_images`."
    visitor.bring(files["digit"])
    assert "8 answers to digit.png, by cosine" in visitor.until("answers to digit.png")
    assert visitor.answers() == shown(ask_images(database, files["digit"], 8))
    dense = visitor.find("input[value=dense]")
    dense.send_keys(Keys.ARROW_RIGHT)
    visitor.until("by sign codes")
    assert visitor.answers() == shown(ask_images(database, files["digit"], 8, binary=True), 16)
    visitor.find("input[value=binary]").send_keys(Keys.ARROW_LEFT)
    visitor.until("by cosine")
    visitor.find("[name=number]").send_keys(Keys.CONTROL, "a", Keys.NULL, "3", Keys.TAB)
    visitor.until("3 answers")
    assert visitor.answers() == shown(ask_images(database, files["digit"], 3))


def nothing_like_it(visitor: Visitor, database, files: dict[str, Path]):
    "Noise is like nothing, a digit is; the page says what the table says."
    for name in ("noise", "digit"):
        table = ask_images(database, files[name], 3)
        visitor.bring(files[name])
        said = visitor.until(f"answers to {files[name].name}")
        for text in (said, visitor.part("answer")):
            assert ("Nothing like it" in text) == (not table["match"].any())
        far = visitor.ask("[...document.querySelectorAll('.found li')].map(li => li.classList.contains('far'))")
        assert far == (~table["match"].astype(bool)).tolist()
        assert visitor.part("answer").count("beyond the threshold") == sum(far) + ("Nothing like it" in said)
        assert table["match"].any() == (name == "digit")


def wrong_files(visitor: Visitor, files: dict[str, Path]):
    "Each is refused in words, and what was shown stays."
    before = visitor.answers()
    for name, words in (("text", "Expected an image (JPEG"), ("large", "too large: at most 20 MB"),
                        ("bomb", "at most 60 million pixels"), ("half", "That image cannot be read")):
        visitor.bring(files[name])
        visitor.until(words)
        assert visitor.answers() == before


def evil_names(visitor: Visitor, files: dict[str, Path]):
    "Of a file and of a class: shown as text."
    visitor.bring(files["evil"])
    visitor.until(f"answers to {EVIL}.png")
    assert f"{EVIL}.png" in visitor.part("answer")
    visitor.find("[name=position]").send_keys(Keys.CONTROL, "a", Keys.NULL, "0", Keys.ENTER)
    visitor.until(f"image 0 of the database: 7{EVIL}")
    visitor.until(EVIL, part="plot")
    assert not visitor.ask("window.hacked")
    assert visitor.ask("document.querySelectorAll('[onerror], img[src=x]').length") == 0


def items(visitor: Visitor, database):
    "An image of the database, of which the class is known; its place is marked in the map."
    visitor.find("[name=position]").send_keys(Keys.CONTROL, "a", Keys.NULL, "5", Keys.ENTER)
    visitor.until("image 5 of the database")
    table = ask_items(database, [5], 3)
    assert visitor.answers() == shown(table)
    right = visitor.ask("[...document.querySelectorAll('.found li')].map(li => li.classList.contains('right'))")
    assert right == (table["label"] == database.labels[5]).tolist()
    assert visitor.part("answer").count("✓ same class") == sum(right)
    visitor.until(f"all {len(database)} images", "Ring with ticks", part="plot")
    assert visitor.ask("document.querySelectorAll('svg g.query').length") == 1
    assert visitor.ask("document.querySelectorAll('svg g.answer').length") == 3
    visitor.find("[name=random]").click()
    number = int(visitor.ask("document.querySelector('[name=position]').value"))
    visitor.until(f"image {number} of the database")
    visitor.find("[name=position]").send_keys(Keys.CONTROL, "a", Keys.NULL, "99999", Keys.ENTER)
    visitor.until(f"a whole number from 0 to {len(database) - 1}")


def drops(visitor: Visitor, database, files: dict[str, Path]):
    "A file that is dropped, and something that is none."
    drop = """(() => { const data = new DataTransfer(), bytes = Uint8Array.from(arguments[0]);
      if (bytes.length) data.items.add(new File([bytes], "dropped.png")); else data.setData("text/plain", "x");
      document.querySelector(".drop").dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true})); })()"""
    visitor.ask(drop, [])
    visitor.until("That was no file")
    visitor.ask(drop, list(files["digit"].read_bytes()))
    visitor.until("answers to dropped.png")
    assert visitor.answers() == shown(ask_images(database, files["digit"], 3))


def keyboard(visitor: Visitor):
    "On a fresh page Tab reaches everything, in the order in which it is read, and where one is can be seen."
    reached = []
    for _ in range(6):
        ActionChains(visitor.browser).send_keys(Keys.TAB).perform()
        reached.append(visitor.ask("document.activeElement.name || document.activeElement.textContent"))
        assert visitor.ask("getComputedStyle(document.activeElement).outlineStyle") != "none", reached
    assert reached == ["file", "position", "Find", "random", "number", "kind"], reached
    rest = visitor.ask("document.querySelectorAll('a[href], button, input, select, textarea, [tabindex]').length")
    assert rest == len(reached) + 1, "expected nothing else but the other choice of kind"


def readable(visitor: Visitor, folder: Path):
    "On a desk and on a telephone: nothing to scroll sideways, alternative text, labels, large enough to be touched."
    for width in (DESKTOP, PHONE):
        visitor.width(width)
        visitor.ask("window.scrollTo(0, 0)")
        visitor.picture(folder / f"page-{width}.png")
        assert visitor.ask("document.documentElement.scrollWidth") <= width
        beyond = visitor.ask("[...document.querySelectorAll('.asyproxy-page *')].filter(one => "
                             "one.getBoundingClientRect().right > innerWidth + 1).map(one => one.outerHTML)")
        assert not beyond, beyond
    assert visitor.ask("[...document.querySelectorAll('button, input[type=number]')].every(one => one.offsetHeight >= 44)")
    assert visitor.ask("document.documentElement.lang") == "en" and "most like it" in visitor.ask("document.title")
    assert visitor.ask("[...document.images].every(one => one.alt && one.naturalWidth)")
    assert visitor.ask("[...document.querySelectorAll('svg')].every(one => one.getAttribute('aria-label'))")
    assert visitor.ask("[...document.querySelectorAll('input')].every(one => one.labels.length)")
    assert visitor.ask("document.querySelectorAll('h1').length + document.querySelectorAll('[role=main]').length") == 2
    visitor.width(DESKTOP)


def quiet(visitor: Visitor, server: Server):
    "No error in the console, and no other server was asked for anything."
    errors = [entry["message"] for entry in visitor.browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not errors, errors
    events = [json.loads(entry["message"])["message"] for entry in visitor.browser.get_log("performance")]
    asked = {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}
    assert not {url for url in asked if url.startswith(("http", "ws")) and not url.startswith(server.url)}, asked


def closed(server: Server, folder: Path):
    "No files, no other host's pages, no sources, nothing of an upload left."
    assert server.status("voila/files/explore.ipynb") == server.status("voila/files/index.ipynb") == 403
    assert server.status("", Host="evil.example") == 403
    assert not list((folder / "cache" / "uploads").iterdir()) and not (folder / "output").exists()
    listening = {one.laddr.ip for one in psutil.Process(server.process.pid).net_connections() if one.status == "LISTEN"}
    assert listening == {"127.0.0.1"}


def visited(folder: Path):
    "All of it. Screenshots are kept in the folder."
    make_database(folder / "digits")
    database = load_database(folder / "digits")
    files = make_files(folder / "files", database)
    with Visitor(folder / "profile") as visitor:
        with Server(folder, str(folder / "digits")) as server:
            start = time.monotonic()
            visitor.browser.get(server.url)
            visitor.until("...", seconds=20)
            stands = time.monotonic() - start
            visitor.until("Ready")
            print(f"the page stands after {stands:.1f} s and is ready after {time.monotonic() - start:.1f} s")
            visitor.until(f"digits: {len(database)} images of digits, 3 classes, 16 dimensions.", part="about")
            keyboard(visitor)
            uploads(visitor, database, files)
            nothing_like_it(visitor, database, files)
            wrong_files(visitor, files)
            visitor.until("t-SNE", part="plot")  # once, while questions were answered
            evil_names(visitor, files)
            items(visitor, database)
            drops(visitor, database, files)
            readable(visitor, folder)
            assert str(folder) not in visitor.browser.page_source and str(ROOT) not in visitor.browser.page_source
            assert "import Page" not in visitor.browser.page_source
            quiet(visitor, server)
            closed(server, folder)
        with Server(folder) as server:
            visitor.browser.get(server.url)
            visitor.until("There is no database below runs/ yet. The command `asyproxy run benchmark` makes one")
            assert visitor.ask("document.querySelector('fieldset').disabled")


if __name__ == "__main__":
    visited(Path(sys.argv[1]))

"""The notebooks as the pages of a book: what a reader has to see of them, in the order of the indexes."""

import ast
import json
import re
from os.path import normpath, relpath
from pathlib import Path

NBS = Path(__file__).resolve().parents[1]
ROOT = NBS.parent

WINGS = ("data", "model", "loss", "evaluation", "training", "retrieval")  # the method, in the order of its chapters
BEHIND = ("study", "figures", "page", "fixtures", "measuring")  # what runs, draws, shows and checks it
GUIDES = ("understand", "experiments", "photographs", "python", "data_sets")
BESIDE = {"study": "main", "page": "explore"}  # wing -> what uses it, a notebook beside the folders
GROUND = tuple(path.stem for path in sorted(NBS.glob("*.ipynb"))
               if path.stem not in ("index", *BESIDE.values()))
PICTURES = (".png", ".gif", ".jpg", ".svg")
TEXTS = {".md": "", ".yaml": "yaml", ".csv": "text", ".tex": "latex"}  # shown as a page
TARGET = re.compile(r"(!?)(\[(?:[^\[\]]|\[[^\]]*\])*\])\(((?:[^()\s]|\([^()\s]*\))+)\)")  # [text](path#anchor)


def read(path: Path) -> list[dict]:
    "The cells of a notebook, each with its source as one text."
    return [cell | {"source": "".join(cell["source"])} for cell in json.loads(path.read_text())["cells"]]


def title(path: Path) -> str:
    "The first heading of a notebook or of a page, without marks."
    texts = [path.read_text()] if path.suffix == ".md" else [cell["source"] for cell in read(path)]
    heading = next(line for text in texts for line in text.splitlines() if line.startswith("# "))
    return heading.removeprefix("# ").replace("`", "")


def rooms(wing: str) -> list[str]:
    "The rooms of a wing in the order of its index. Raises ValueError on a room that the index leaves out."
    text = "\n".join(cell["source"] for cell in read(NBS / wing / "index.ipynb") if cell["cell_type"] == "markdown")
    named = list(dict.fromkeys(re.findall(r"\]\((\w+)\.ipynb(?:#[^)]*)?\)", text)))
    missing = {path.stem for path in (NBS / wing).glob("*.ipynb")} - {"index", *named}
    if missing:
        raise ValueError(f"expected nbs/{wing}/index.ipynb to name every room, "
                         f"got none of {', '.join(sorted(missing))}")
    return [name for name in named if name != "index"]


def slug(anchor: str) -> str:
    "The anchor of a heading: as Jupyter writes it (`Emoji-(emoji)`) -> as this site does (`emoji-emoji`)."
    return re.sub(r"[^\w-]", "", anchor.lower())


class Pages:
    "Pages on their way into the folder that Sphinx reads; what did not change is left alone for a quick build."

    def __init__(self, folder: Path):
        self.folder, self.written = folder, set()

    def write(self, name: str, content: str | bytes):
        path, content = self.folder / name, content.encode() if isinstance(content, str) else content
        self.written.add(path)
        if not path.exists() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def clean(self):
        "Removes what an earlier build wrote and this one did not."
        for path in self.folder.rglob("*"):
            if path.is_file() and path not in self.written:
                path.unlink()

    def file(self, path: Path) -> str:
        "Where a file of the repository is on the site; a text is a page."
        name = f"files/{path.relative_to(ROOT)}"
        if path.suffix not in TEXTS:
            self.write(name, path.read_bytes())
            return name
        text = path.read_text()
        if path.suffix != ".md":
            text = f"````{{code-block}} {TEXTS[path.suffix]}\n{text}\n````"
        self.write(f"{name.removesuffix('.md')}.md", f"---\norphan: true\n---\n# {path.relative_to(ROOT)}\n\n{text}\n")
        return f"{name.removesuffix('.md')}.md"

    def linked(self, text: str, source: Path, page: str) -> str:
        "Text with its links to notebooks and files of the repository as links of the site, except inside of code."
        def link(match) -> str:
            picture, words, target = match.groups()
            path, _, anchor = target.partition("#")
            anchor = f"#{slug(anchor)}" if anchor else ""
            if re.match(r"\w+:", target):
                return match[0]
            if not path:
                return f"{words}({anchor})"
            found = (source.parent / path).resolve()
            if not found.is_file():
                return match[0]  # Sphinx complains of it
            if found.suffix == ".ipynb":
                at = found.relative_to(NBS)
            else:  # a page of this folder lies at the top of the site
                own = found.suffix == ".md" and found.parent == Path(__file__).resolve().parent
                at = found.name if own else self.file(found)
            kind = "" if picture or found.suffix in (".ipynb", *TEXTS) else "path:"
            return f"{picture}{words}({kind}{relpath(at, Path(page).parent)}{anchor})"

        parts = re.split(r"(^```.*?^```)", text, flags=re.S | re.M)
        for number in range(0, len(parts), 2):
            spans = re.findall(r"`[^`\n]+`", parts[number])  # put aside: a link's text may hold one
            bare = re.sub(r"`[^`\n]+`", "\0", parts[number])
            bare, left = TARGET.sub(link, bare), iter(spans)
            parts[number] = re.sub("\0", lambda _: next(left), bare)
        return "".join(parts)


def given(node: ast.stmt) -> list[str]:
    "The names that a statement defines."
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [one.id for target in targets for one in ast.walk(target) if isinstance(one, ast.Name)]


def defined(source: str) -> list[str]:
    "Public names that an exported cell defines."
    if not re.search(r"^#\|\s*export", source, re.M):
        return []
    return [name for node in ast.parse(source).body for name in given(node) if not name.startswith("_")]


def label(module: str, name: str) -> str:
    "Where the book defines a name; labels know no capitals, and `Coded` is not `coded`."
    return f"in-{module}.{name}" + ("-capitals" if name.isupper() else "-capital" if name[0].isupper() else "")


def module(cells: list[dict]) -> str:
    "The module that a notebook exports; empty if none."
    found = [re.search(r"^#\| default_exp (\S+)", cell["source"], re.M) for cell in cells]
    return next((f"asyproxy.{match[1]}".removesuffix(".__init__") for match in found if match), "")


def directives(source: str) -> tuple[dict[str, str], str]:
    "The directives at the head of a cell, and the rest."
    lines = source.splitlines()
    heads = [line.removeprefix("#|").strip() for line in lines if line.startswith("#|")]
    pairs = [re.match(r"([\w-]+):?\s*(.*)", head).groups() for head in heads if head]
    return dict(pairs), "\n".join(line for line in lines if not line.startswith("#|")).strip("\n")


def spoken(prose: str) -> str:
    "The last paragraph before a picture as its alternative text, without marks."
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", prose.strip().split("\n\n")[-1])
    return re.sub(r"[*`$#>]|\s*\n\s*", " ", text).strip().rstrip(":")


def shown(cell: dict, prose: str) -> dict | None:
    "A code cell as it is read; None if there is nothing to read."
    known, source = directives(cell["source"])
    outputs = [output for output in cell["outputs"] if output.get("name") != "stderr"]
    if "hide" in known or not (source.strip() or outputs):
        return None
    metadata = dict(cell["metadata"])
    if known.get("echo") == "false":
        if not outputs:
            return None
        metadata["tags"] = [*metadata.get("tags", []), "remove-input"]
    if any(kind.startswith("image/") for output in outputs for kind in output.get("data", {})):
        metadata["mystnb"] = {"image": {"alt": known.get("fig-alt", "").strip('"') or spoken(prose)}}
    return cell | {"source": source, "outputs": outputs, "metadata": metadata}


def notebook(pages: Pages, path: Path, after_title: str = "", at_end: str = ""):
    "Writes a notebook as a page of the book: with anchors for what it defines, without what only nbdev reads."
    page, cells, prose, count = str(path.relative_to(NBS)), [], "", 0

    def say(text: str):
        nonlocal count
        count += 1
        cells.append({"cell_type": "markdown", "id": f"site-{count}", "metadata": {}, "source": text})

    read_cells = read(path)
    of = module(read_cells)
    for cell in read_cells:
        if cell["cell_type"] == "markdown":
            prose = cell["source"]
            cells.append(cell | {"source": pages.linked(prose, path, page)})
            if after_title and prose.startswith("# "):
                say(after_title)
        elif cell["cell_type"] == "code" and (kept := shown(cell, prose)):
            if labels := [f"({label(of, name)})=" for name in dict.fromkeys(defined(cell["source"]))]:
                say("\n".join(labels))
            for output in kept["outputs"]:
                for kind in ("text/markdown",):
                    if kind in output.get("data", {}):
                        output["data"][kind] = pages.linked("".join(output["data"][kind]), path, page)
            cells.append(kept)
    if at_end:
        say(at_end)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python", "pygments_lexer": "ipython3"}}
    pages.write(page, json.dumps({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}))


def toctree(entries: list[str], caption: str = "", hidden: bool = True) -> str:
    "A table of contents in MyST."
    options = [f":caption: {caption}"] * bool(caption) + [":hidden:"] * hidden
    return "\n".join(["```{toctree}", *options, "", *entries, "```"])


def write_book(pages: Pages, studies: list[str]):
    "All notebooks, the pages of this folder, and a table of contents for each wing."
    for wing in (*WINGS, *BEHIND):
        more = [f"../{BESIDE[wing]}"] if wing in BESIDE else []
        notebook(pages, NBS / wing / "index.ipynb", at_end=toctree([*rooms(wing), *more]))
        for room in rooms(wing):
            notebook(pages, NBS / wing / f"{room}.ipynb")
    for room in (*(f"guides/{guide}" for guide in GUIDES), *GROUND, *BESIDE.values()):
        notebook(pages, NBS / f"{room}.ipynb")
    for study in studies:
        of = f"[What it takes](../parameters/{study}.md): each parameter with its meaning, its range and its default."
        notebook(pages, NBS / "studies" / f"{study}.ipynb", after_title=of)
    for page in sorted(Path(__file__).parent.glob("*.md")):
        pages.write(page.name, pages.linked(page.read_text(), page, page.name))
    listed = "\n".join(f"- [{title(NBS / f'{room}.ipynb')}]({room}.ipynb)" for room in GROUND)
    head = "# The ground floor\n\nWhat every wing may import."
    pages.write("ground.md", f"{head}\n\n{listed}\n\n{toctree(list(GROUND))}\n")
    contents = [
        toctree(["method", *(f"guides/{guide}" for guide in GUIDES)], "Begin"),
        toctree([f"{wing}/index" for wing in WINGS], "The book"),
        toctree([*(f"studies/{study}" for study in studies), "parameters/index"], "The studies"),
        toctree(["names/index"], "Reference"),
        toctree([*(f"{wing}/index" for wing in BEHIND), "ground"], "Behind it"),
        toctree(["contributing", "changelog"], "The project")]
    notebook(pages, NBS / "index.ipynb", at_end="\n\n".join(contents))


def branch(folder: Path, page: str, words: str = "") -> dict:
    "A page with the pages below it, as its tables of contents say: title, name, parts."
    path = next(path for path in (folder / f"{page}.ipynb", folder / f"{page}.md") if path.exists())
    text = "\n".join(cell["source"] for cell in read(path)) if path.suffix == ".ipynb" else path.read_text()
    parts = []
    for table in re.findall(r"^```\{toctree\}\n(.*?)^```", text, re.S | re.M):
        caption = re.search(r"^:caption: (.*)$", table, re.M)
        below = []
        for entry in table.split("\n\n", 1)[1].strip().splitlines():
            called, name = re.match(r"(?:(.+) <)?([^<>]+)>?$", entry).groups()
            name = normpath(Path(page).parent / name)
            below.append(branch(folder, name, called or ""))
        parts.append({"caption": caption[1] if caption else "", "pages": below})
    pages = [page, *(name for part in parts for one in part["pages"] for name in one["names"])]
    return {"page": page, "title": words or title(path), "parts": parts, "names": pages}


def write_navigation(pages: Pages):
    "The table of contents that every page shows; that of the theme takes most of the time of a build."
    pages.write("navigation.json", json.dumps(branch(pages.folder, "index")["parts"]))

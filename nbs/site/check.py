"""What is wrong with a site that was built: links, anchors, pictures, other hosts, names without a page."""

import re
from functools import cache
from html import unescape
from pathlib import Path
from urllib.parse import unquote, urlsplit

from names import Named, public

TAG = re.compile(r"<([a-z][a-z0-9]*)\b((?:[^<>\"']|\"[^\"]*\"|'[^']*')*)>", re.I)
ATTRIBUTE = re.compile(r"([\w:-]+)\s*=\s*(?:\"([^\"]*)\"|'([^']*)')")
LOADS = dict.fromkeys(("script", "img", "iframe", "source", "video", "audio", "embed", "input"), "src") | {
    "link": "href", "object": "data"}  # what a browser fetches by itself


@cache
def tags(page: Path) -> list[tuple[str, dict[str, str]]]:
    "The elements of a page with their attributes."
    text = re.sub(r"<!--.*?-->|(<script\b[^>]*>).*?</script>", r"\1", page.read_text(), flags=re.S)
    return [(tag.lower(), {name.lower(): unescape(one or other) for name, one, other in ATTRIBUTE.findall(rest)})
            for tag, rest in TAG.findall(text)]


@cache
def anchors(page: Path) -> set[str]:
    return {known[name] for _, known in tags(page) for name in ("id", "name") if name in known}


def wrong_link(page: Path, target: str) -> str:
    "What is wrong with a link; empty if nothing is. A link to another host is looked at, not followed."
    parts = urlsplit(target)
    if parts.scheme or parts.netloc:
        good = parts.scheme == "mailto" or parts.scheme == "https" and re.fullmatch(r"[\w-]+(\.[\w-]+)+", parts.netloc)
        return "" if good else "expected an address that begins with https:// and a host"
    path = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if not path.is_file():
        return "there is no such file"
    anchor = unquote(parts.fragment)
    if anchor and path.suffix == ".html" and anchor not in anchors(path):
        return "there is no such anchor"
    return ""


def page_problems(page: Path) -> list[str]:
    found = []
    for tag, known in tags(page):
        if tag == "a" and "href" in known and (wrong := wrong_link(page, known["href"])):
            found.append(f"{known['href']}: {wrong}")
        if LOADS.get(tag) in known and (tag != "link" or known.get("rel") not in ("canonical", "next", "prev")):
            target = known[LOADS[tag]]
            if urlsplit(target).netloc:
                found.append(f"{target}: expected nothing to be loaded from another host")
            elif not target.startswith("data:") and (wrong := wrong_link(page, target)):
                found.append(f"{target}: {wrong}")
        if tag == "img" and not known.get("alt", "").strip():
            found.append(f"{known.get('src', '')[:60]}: expected an alternative text")
    return found


def style_problems(sheet: Path) -> list[str]:
    targets = re.findall(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)", sheet.read_text())
    return [f"{one or other}: expected nothing to be loaded from another host" for one, other in targets
            if urlsplit(one or other).netloc]


def name_problems(html: Path, names: list[Named]) -> list[str]:
    "Names without a page, and arguments or fields that nothing is said of."
    found = []
    for one in names:
        page = html / f"{one.page}.html"
        if not page.is_file():
            found.append(f"{one.full}: expected a page")
            continue
        text, wanted = page.read_text(), ["Source"] if one.kind == "data" else ["Errors", "Source"]
        found += [f"{one.full}: expected {part} on its page" for part in wanted if f"<h2>{part}" not in text]
        found += [f"{one.full}: expected a line about it"] * (not one.claim)
        arguments = list(one.fields if one.kind == "class" else ())
        for argument in sum((function.arguments for function in one.functions), arguments):
            found += [f"{one.full}: expected a meaning of {argument.name}"] * (not argument.meaning)
            found += [f"{one.full}: expected {argument.name} on its page"] * (f">{argument.name}<" not in text)
    return found


def problems(html: Path) -> list[str]:
    "All that is wrong, a line each."
    found = []
    for page in sorted(path for path in html.rglob("*.html") if "_static" not in path.parts):
        found += [f"{page.relative_to(html)}: {line}" for line in page_problems(page)]
    for sheet in sorted(html.rglob("*.css")):
        found += [f"{sheet.relative_to(html)}: {line}" for line in style_problems(sheet)]
    return found + name_problems(html, public())

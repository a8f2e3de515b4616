"""A page for each public name, made from its source: signature, comments beside the arguments, docstring."""

import ast
import io
import re
import tokenize
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path

from book import BEHIND, GROUND, ROOT, WINGS, Pages, defined, given, label, read, spoken, title, toctree

PACKAGE = ROOT / "asyproxy"


@dataclass
class Argument:
    "An argument of a function, or a field of a class."
    name: str
    type: str = ""
    default: str | None = None  # as written; None: it must be given
    meaning: str = ""  # the comment beside it
    kind: str = ""  # "*", "**": takes the rest


@dataclass
class Function:
    "A function or method."
    name: str
    signature: str
    claim: str
    arguments: list[Argument]
    returns: Argument
    errors: list[str]
    is_property: bool = False


@dataclass
class Named:
    "A public name, wherever it is defined."
    name: str
    module: str  # from which it is imported
    origin: str  # in which it is defined
    kind: str  # function, class or data
    claim: str = ""
    functions: list[Function] = field(default_factory=list)  # itself, or its methods
    fields: list[Argument] = field(default_factory=list)
    bases: list[str] = field(default_factory=list)  # of this package
    page: str = ""

    @property
    def full(self) -> str:
        return f"{self.module}.{self.name}"


@cache
def source(module: str) -> Path:
    path = ROOT / Path(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(source(module).read_text())


@cache
def comments(module: str) -> dict[int, str]:
    "What is said at the end of each line, or on a line of its own."
    tokens = tokenize.generate_tokens(io.StringIO(source(module).read_text()).readline)
    return {token.start[0]: token.string.lstrip("# ").strip() for token in tokens if token.type == tokenize.COMMENT}


@cache
def imported(module: str) -> dict[str, str]:
    "Name -> the module of this package from which a module imports it."
    found = {}
    package = module if source(module).name == "__init__.py" else module.rpartition(".")[0]
    for node in tree(module).body:
        if isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[:len(parts) - node.level + 1]) if node.level else ""
            full = ".".join(filter(None, [base, node.module]))
            if full.startswith("asyproxy"):
                found |= {alias.asname or alias.name: full for alias in node.names}
    return found


def all_names(module: str) -> list[str]:
    "What a module exports."
    for node in tree(module).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []


def node_of(module: str, name: str) -> tuple[str, ast.AST]:
    "Where a name is defined. Raises ValueError if it is not."
    for node in tree(module).body:
        if name in given(node):
            return module, node
    if name in imported(module):
        return node_of(imported(module)[name], name)
    raise ValueError(f"expected {name} to be defined in {module} or in what it imports")


def split_errors(text: str | None) -> tuple[str, list[str]]:
    "A docstring as its claim, and what it says of errors."
    claim, raises, errors = " ".join((text or "").split()).partition("Raises ")
    return claim.strip(), [f"{raises}{errors}"] * bool(raises)


def thrown(node: ast.AST) -> list[str]:
    "The errors that stand in the body of a function, with their words; what varies is an ellipsis."
    found = []
    for one in ast.walk(node):
        if isinstance(one, ast.Raise) and isinstance(one.exc, ast.Call) and one.exc.args:
            text = one.exc.args[0]
            values = text.values if isinstance(text, ast.JoinedStr) else [text]
            words = "".join(str(value.value) if isinstance(value, ast.Constant) else "…" for value in values)
            found.append(f"{ast.unparse(one.exc.func)}: {words}")
    return list(dict.fromkeys(found))


def plain_end(spec: ast.arguments) -> int:
    "The last line of the arguments."
    return max(one.end_lineno for one in ast.walk(spec) if hasattr(one, "end_lineno"))


def function_of(module: str, node: ast.FunctionDef, method: bool = False) -> Function:
    said, spec = comments(module), node.args
    plain = [*spec.posonlyargs, *spec.args]
    defaults = dict(zip(reversed(plain), reversed(spec.defaults))) | dict(zip(spec.kwonlyargs, spec.kw_defaults))
    kinds = {spec.vararg: "*", spec.kwarg: "**"}
    decorators = [ast.unparse(one).split("(")[0] for one in node.decorator_list]
    if method and plain and "staticmethod" not in decorators:
        plain = plain[1:]
    arguments = []
    for one in filter(None, [*plain, spec.vararg, *spec.kwonlyargs, spec.kwarg]):
        default = defaults.get(one)
        meaning = said.get(one.end_lineno) or said.get((default or one).end_lineno, "")
        kind = ast.unparse(one.annotation) if one.annotation else ""
        arguments.append(Argument(one.arg, kind, default and ast.unparse(default), meaning, kinds.get(one, "")))
    closing = node.body[0].lineno - 1  # the line of `) -> type:`, with what is said of it
    returned = Argument("", ast.unparse(node.returns) if node.returns else "")
    if closing > (arguments and plain_end(spec) or node.lineno - 1) or not arguments:
        returned.meaning = said.get(closing, "")
    signature = f"{node.name}({ast.unparse(spec)})" + (f" -> {ast.unparse(node.returns)}" if node.returns else "")
    if method:
        signature = re.sub(r"\((self|cls)(, )?", "(", signature, count=1)
    claim, errors = split_errors(ast.get_docstring(node))
    return Function(node.name, signature, claim, arguments, returned, errors + thrown(node), "property" in decorators)


def fields_of(module: str, node: ast.ClassDef) -> list[Argument]:
    said, found = comments(module), []
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and not item.target.id.startswith("_"):
            default = item.value and ast.unparse(item.value)
            meaning = said.get(item.end_lineno, said.get(item.lineno, ""))
            found.append(Argument(item.target.id, ast.unparse(item.annotation), default, meaning))
    return found


def is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(one) for one in node.decorator_list)


def line(module: str, node: ast.ClassDef) -> list[tuple[str, ast.ClassDef]]:
    "A class and those of this package that it derives from, itself first."
    found = [(module, node)]
    for base in node.bases:
        try:
            found += line(*node_of(module, ast.unparse(base)))
        except ValueError:
            pass  # of another package
    return found


def parameters_of(named: Named) -> list[Argument]:
    "The parameters of a study that a class describes."
    from asyproxy.experiment import Checked, expectation, parameters

    described = getattr(import_module(named.module), named.name)
    if not (isinstance(described, type) and issubclass(described, Checked) and described is not Checked):
        return []
    rows = []
    for one in parameters(described).values():
        expected = expectation(one)
        meaning = one.meaning + (f" ({expected})" if expected else "")
        rows.append(Argument(one.name, one.type.__name__, repr(one.default), meaning))
    return rows


def describe(module: str, name: str) -> Named:
    "All that the source says of a public name."
    origin, node = node_of(module, name)
    if isinstance(node, ast.FunctionDef):
        one = function_of(origin, node)
        return Named(name, module, origin, "function", one.claim, [one])
    if isinstance(node, ast.ClassDef):
        claim, errors = split_errors(ast.get_docstring(node))
        classes = line(origin, node)
        methods, fields = {}, {}
        for owner, one in classes:
            for item in one.body:
                if isinstance(item, ast.FunctionDef) and (item.name == "__init__" or not item.name.startswith("_")):
                    methods.setdefault(item.name, function_of(owner, item, method=True))
        for owner, one in reversed(classes):
            if is_dataclass(one):
                fields |= {argument.name: argument for argument in fields_of(owner, one)}
        init = methods.pop("__init__", Function("__init__", "", "", [], Argument(""), []))
        init.errors = errors + init.errors
        named = Named(name, module, origin, "class", claim, [init, *methods.values()], list(fields.values()),
                      [one.name for _, one in classes[1:] if not one.name.startswith("_")])
        named.fields = parameters_of(named) or named.fields
        return named
    said = comments(origin)
    above = []
    number = node.lineno - 1
    while number in said and not said[number].startswith(("%%", "|")):
        above.insert(0, said[number])
        number -= 1
    meaning = said.get(node.lineno) or said.get(node.end_lineno) or " ".join(above)
    kind = ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else ""
    return Named(name, module, origin, "data", meaning, fields=[Argument(name, kind, meaning=meaning)])


@cache
def prose_of(module: str) -> dict[str, str]:
    "Name -> the last paragraph before the cell that defines it, in the notebook of the module."
    found, prose = {}, ""
    for cell in read(notebook_of(module)):
        if cell["cell_type"] == "markdown":
            prose = spoken(cell["source"])
        elif cell["cell_type"] == "code":
            found |= dict.fromkeys(defined(cell["source"]), prose)
    return found


def public() -> list[Named]:
    "Every name that is imported from a wing or from a room of the ground floor; each has a page."
    found = []
    for module in (*WINGS, *BEHIND, *GROUND):
        names = [describe(f"asyproxy.{module}", name) for name in all_names(f"asyproxy.{module}")]
        for one in names:
            one.claim = one.claim or prose_of(one.origin)[one.name]
        taken = [one.name.lower() for one in names]
        for one in names:  # `Run` and `run` are one file on some disks
            twin = taken.count(one.name.lower()) > 1 and one.kind == "class"
            one.page = f"names/{module}/{one.name}{'-class' if twin else ''}"
        found += names
    return found


def escaped(text: str) -> str:
    "A comment as MyST: marks that are none in Python are kept as they are, code stays code."
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([\\*_$<>|\[\]{}#])", r"\\\1", part) for part in parts)


def sentence(text: str) -> str:
    text = escaped(text)
    return text if not text or text.endswith((".", "!", "?")) else f"{text}."


def listed(arguments: list[Argument]) -> list[str]:
    "A definition list: it is read on a phone, where a table of five columns is not."
    lines = []
    for one in arguments:
        marks = [f"`{one.kind}{one.name}`"]
        marks += [f"`{one.type}`"] if one.type else []
        marks += [f"= `{one.default}`"] if one.default is not None else []
        lines += [" ".join(marks), f": {sentence(one.meaning)}", ""]
    return lines


def directive(kind: str, signature: str) -> list[str]:
    return [f"```{{py:{kind}}} {signature}", "```", ""]


def errors_lines(errors: list[str]) -> list[str]:
    if not errors:
        return ["It names no error of its own.", ""]
    return [f"- {sentence(one)}" for one in errors] + [""]


def returned_lines(one: Argument) -> list[str]:
    if one.type and one.meaning:
        return [f"`{one.type}`", f": {sentence(one.meaning)}", ""]
    return [f"`{one.type}`" if one.type else sentence(one.meaning).capitalize(), ""]


def function_lines(one: Function, heading: str) -> list[str]:
    lines = [f"{heading} Arguments", "", *listed(one.arguments)] if one.arguments else []
    if one.returns.type or one.returns.meaning:
        lines += [f"{heading} Returns", "", *returned_lines(one.returns)]
    return lines + [f"{heading} Errors", "", *errors_lines(one.errors)]


def values_lines(named: Named) -> list[str]:
    "What is in a catalogue."
    value = getattr(import_module(named.module), named.name)
    if isinstance(value, dict):
        titles = {key: entry if isinstance(entry, str) else getattr(entry, "title", "") for key, entry in value.items()}
        lines = [f"- `{key}`" + (f": {escaped(str(text))}" if text else "") for key, text in titles.items()]
    else:
        lines = [f"- `{one}`" for one in value] if isinstance(value, tuple | list | set) else [f"`{value!r}`"]
    return ["## Values", "", *lines, ""]


def class_lines(named: Named, pages: dict[str, str]) -> list[str]:
    init, *methods = named.functions
    words = init.signature.removeprefix("__init__").partition(" -> ")[0]
    if named.fields and not init.signature:
        words = f"({', '.join(one.name + (f': {one.type}' if one.type else '') for one in named.fields)})"
    lines = [*directive("class", f"{named.full}{words or '()'}"), sentence(named.claim), ""]
    if known := [f"[{base}]({pages[base]})" if base in pages else f"`{base}`" for base in named.bases]:
        lines += [f"It is a {', '.join(known)}.", ""]
    if named.fields:
        lines += ["## Fields", "", *listed(named.fields)]
    if init.arguments:
        lines += ["## Arguments", "", *listed(init.arguments)]
    lines += ["## Errors", "", *errors_lines(init.errors)]
    for one in methods:
        kind = "property" if one.is_property else "method"
        signature = one.name if one.is_property else one.signature
        lines += [f"## {one.name}", "", *directive(kind, f"{named.full}.{signature}"), sentence(one.claim), ""]
        lines += function_lines(one, "###")
    return lines


def page_of(named: Named, pages: dict[str, str]) -> str:
    "The page of a name in MyST."
    lines = [f"# {escaped(named.name)}", ""]  # with its module in the signature below
    if named.kind == "function":
        one = named.functions[0]
        signature = one.signature.removeprefix(named.name)
        lines += [*directive("function", named.full + signature), sentence(named.claim), "", *function_lines(one, "##")]
    elif named.kind == "class":
        lines += class_lines(named, pages)
    else:
        lines += [*directive("data", named.full), sentence(named.claim), "", *values_lines(named)]
    notebook = notebook_of(named.origin)
    lines += ["## Source", "", f"Defined and tested in [{title(notebook)}](#{label(named.origin, named.name)}); "
              f"exported to `{source(named.origin).relative_to(ROOT)}`.", ""]
    return "\n".join(lines)


def notebook_of(module: str) -> Path:
    "The notebook that exports a module: its head names it."
    path = source(module)
    return (path.parent / re.search(r"File to edit: (.*\.ipynb)", path.read_text())[1]).resolve()


def write_names(pages: Pages) -> list[Named]:
    "The pages of all public names, an index of each wing, and every other name of every room."
    found = public()
    sheets = {one.name: f"/{one.page}.md" for one in found}
    for one in found:
        pages.write(f"{one.page}.md", page_of(one, sheets))
    modules = list(dict.fromkeys(one.module for one in found))
    for module in modules:
        names = [one for one in found if one.module == module]
        wing = module.removeprefix("asyproxy.")
        claim = ast.get_docstring(tree(module)) or ""
        rows = [f"- [`{one.name}`]({one.page.rpartition('/')[2]}.md): {sentence(one.claim)}" for one in names]
        entries = [f"{one.name} <{one.page.rpartition('/')[2]}>" for one in names]
        text = [f"# {module}", "", sentence(claim), "", *rows, "", toctree(entries)]
        pages.write(f"names/{wing}/index.md", "\n".join(text) + "\n")
    entries = [f"{module} <{module.removeprefix('asyproxy.')}/index>" for module in modules]
    rows = [f"- [{module}]({module.removeprefix('asyproxy.')}/index.md): "
            f"{sum(one.module == module for one in found)} names" for module in modules]
    text = ["# Names", "", "Each wing is imported as one module, with the names that a user needs; each has a page "
            "here. What else the rooms of a wing define is in [every name of every room](rooms.md).", "", *rows, "",
            toctree([*entries, "rooms"])]
    pages.write("names/index.md", "\n".join(text) + "\n")
    pages.write("names/rooms.md", rooms_page())
    return found


def rooms_page() -> str:
    "Every name that any room exports, with the place in the book where it is defined."
    lines = ["# Every name of every room", "", "In the order of the rooms; each leads to where it is defined.", ""]
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if path.name.startswith("_") or not all_names(module):
            continue
        names = [name for name in all_names(module) if node_of(module, name)[0] == module]
        where = [f"[`{name}`](#{label(module, name)})" for name in names]
        lines += [f"## {escaped(module)}", "", ", ".join(where), ""]
    return "\n".join(lines)


def write_parameters(pages: Pages, studies: dict[str, type]):
    "The parameters of each study, with meaning, range and default."
    from asyproxy.experiment import expectation, parameters

    for study, described in studies.items():
        lines = [
            f"# Parameters of {study}", "",
            f"Given as `asyproxy run {study} -p NAME VALUE`; the same names are the fields of `{described.__name__}`. "
            f"Beside each name are its type and its default. What it does with them is in "
            f"[the notebook](../studies/{study}.ipynb).", ""]
        for one in parameters(described).values():
            default = f"`{one.default}`" if one.default != "" else "empty"
            expected = f" Expected: {escaped(expectation(one))}." if expectation(one) else ""
            lines += [f"`{one.name}` `{one.type.__name__}`, {default}", f": {sentence(one.meaning)}{expected}", ""]
        pages.write(f"parameters/{study}.md", "\n".join(lines))
    text = ["# Parameters", "", "Every parameter has one description, in [experiment](../experiment.ipynb), and is "
            "checked before any work.", "", *(f"- [{study}]({study}.md)" for study in studies), "", toctree(list(studies))]
    pages.write("parameters/index.md", "\n".join(text) + "\n")

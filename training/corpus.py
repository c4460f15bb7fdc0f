"""Text that every machine with Python has: the source of CPython's standard library (PSF License 2.0).

Whole modules, and question-and-answer pairs cut out of them with `ast`. A module is held out by the md5 of its path, so
no function of a held-out module is ever trained on.
"""

from __future__ import annotations

import ast
import hashlib
import json
import random
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mlx_gemma_mtp.errors import UserError

SKIPPED = {
    "__pycache__", "encodings", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests", "turtledemo",
}  # fmt: skip
HELD_PERCENT = 4
SEED = 0


class Module(NamedTuple):
    path: str  # relative to the library, with slashes
    text: str


class Pair(NamedTuple):
    user: str
    model: str

    def render(self) -> str:
        """The pair in Gemma 4's chat format, without <bos>."""
        return f"<|turn>user\n{self.user}<turn|>\n<|turn>model\n{self.model}<turn|>\n"


class Corpus(NamedTuple):
    modules: list[Module]  # to train on
    pairs: list[Pair]
    held_modules: list[Module]
    held_pairs: list[Pair]


def library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def held_out(path: str) -> bool:
    return int(hashlib.md5(path.encode()).hexdigest(), 16) % 100 < HELD_PERCENT


def modules(root: Path) -> Iterator[Module]:
    """The library's modules in path order, without generated ones (very long files or lines)."""

    def files(folder: Path) -> Iterator[Path]:
        entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
        yield from (entry for entry in entries if entry.suffix == ".py" and entry.is_file())
        for entry in entries:
            if entry.is_dir() and entry.name not in SKIPPED and not entry.name.startswith("config-"):
                yield from files(entry)

    for file in files(root):
        text = file.read_text(encoding="utf-8", errors="ignore").replace("\t", "    ")
        if 200 < len(text) < 400_000 and max(map(len, text.splitlines())) < 400:
            yield Module(file.relative_to(root).as_posix(), text)


class Function(NamedTuple):
    name: str
    owner: str | None  # the class of a method
    signature: str  # of its arguments
    code: str
    doc: str | None


def functions(text: str) -> Iterator[Function]:
    """Functions and methods at module and class level, of 30 to 2,500 characters."""
    lines = text.splitlines()

    def walk(parent: ast.AST, owner: str | None) -> Iterator[Function]:
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, ast.ClassDef):
                yield from walk(node, node.name)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = min([node.lineno] + [decorator.lineno for decorator in node.decorator_list])
                code = textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno]))
                if 30 <= len(code) <= 2500:
                    yield Function(node.name, owner, ast.unparse(node.args), code, ast.get_docstring(node))

    try:
        yield from walk(ast.parse(text), None)
    except SyntaxError:  # templates and files for other versions
        return


def dotted(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def fenced(code: str) -> str:
    return f"```python\n{code}\n```"


def pairs(module: Module) -> Iterator[Pair]:
    """For each function: write it, from its docstring or its signature; and what does it do."""
    name = dotted(module.path)
    for f in functions(module.text):
        kind = "method" if f.owner else "function"
        where = f"class `{f.owner}`" if f.owner else f"module `{name}`"
        if not f.doc:
            yield Pair(f"Write the Python {kind} `{f.name}({f.signature})` for the {where}.", fenced(f.code))
            continue
        summary = " ".join(f.doc.strip().split("\n\n")[0].split())[:200]
        yield Pair(f"Write a Python {kind} `{f.name}` for the {where}. {summary}", fenced(f.code))
        if len(f.doc) < 1200:
            yield Pair(f"What does the Python {kind} `{f.owner or name}.{f.name}` do?", f.doc.strip())


def completions(module: Module, rng: random.Random) -> Iterator[Pair]:
    """For one function in four: its first line as the whole question, as people type it."""
    for f in functions(module.text):
        first = f.code.splitlines()[0]
        if rng.random() < 0.25 and first.startswith("def ") and first.endswith(":"):
            yield Pair(first, fenced(f.code))


def descriptions(module: Module) -> Iterator[Pair]:
    """Short English: the docstrings of the module and of its classes."""
    try:
        tree = ast.parse(module.text)
    except SyntaxError:
        return
    name = dotted(module.path)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    asked = [(f"What is the Python module `{name}` for?", tree)]
    asked += [(f"What is the Python class `{name}.{node.name}`?", node) for node in classes]
    for question, node in asked:
        doc = ast.get_docstring(node)
        if doc and 20 < len(doc) < 1200:
            yield Pair(question, doc.strip())


def topics(root: Path) -> Iterator[Pair]:
    """The language reference's prose as pydoc ships it (`help('with')`); nothing where it is not installed."""
    file = root / "pydoc_data" / "topics.py"
    if not file.exists():
        return
    tree = ast.parse(file.read_text(encoding="utf-8"))
    table = next(node.value for node in tree.body if isinstance(node, ast.Assign))
    for topic, text in ast.literal_eval(table).items():
        prose = text.strip().lstrip("*\n ").strip()
        yield Pair(f"Explain the Python topic `{topic}`.", prose[:6000])


def read(root: Path | None = None, limit: int | None = None) -> Corpus:
    """The corpus of a library; `limit` keeps so many modules of each split, for tests."""
    root = root or library()
    rng = random.Random(SEED)
    train: list[Module] = []
    held: list[Module] = []
    for module in modules(root):
        (held if held_out(module.path) else train).append(module)
    train, held = train[:limit], held[:limit]
    asked = [pair for module in train for pair in pairs(module)]
    asked += [pair for module in train for pair in completions(module, rng)]
    asked += [pair for module in train for pair in descriptions(module)]
    asked += [] if limit else topics(root)
    return Corpus(train, asked, held, [pair for module in held for pair in pairs(module)])


def read_files(files: list[Path]) -> Corpus:
    """A corpus of a user's own: `.jsonl` files of {"user": .., "model": ..}; any other file is a text.

    Questions and texts are held out as modules are, and at least one question. Raises UserError for a line that is no
    such object, and for fewer than two questions.
    """
    texts: list[Module] = []
    asked: list[Pair] = []
    for file in files:
        if file.suffix != ".jsonl":
            texts.append(Module(file.as_posix(), file.read_text(encoding="utf-8")))
            continue
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                entry = json.loads(line)
                asked.append(Pair(entry["user"], entry["model"]))
            except (ValueError, KeyError, TypeError):
                raise UserError(f'{file}, line {number}: expected {{"user": "..", "model": ".."}}') from None
    if len(asked) < 2:
        raise UserError(f"--text: {len(asked)} questions; give a .jsonl file with two or more, one object a line")
    held = [pair for pair in asked[1:] if held_out(pair.user)] or asked[-1:]
    return Corpus(
        [text for text in texts if not held_out(text.path)],
        [pair for pair in asked if pair not in held],
        [text for text in texts if held_out(text.path)],
        held,
    )

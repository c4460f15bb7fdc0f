"""Questions whose replies follow them, cut out of source code by program: write, continue, explain, copy and edit.

In a third of the pairs a function has a made-up name, so that a name is read in the question and not remembered.
`python -m training.following --text FILE` prints some.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import keyword
import random
import re
import sys
from collections.abc import Callable, Iterable
from importlib import import_module

from training.corpus import Function, Module, Pair, dotted, fenced, functions, held_out
from training.smalltalk import definition, small_function, talk

LONGEST = 800  # characters of a reply: it should end within 256 tokens
SHORT = 420  # of code that is copied or edited
IMPERATIVES = (
    "add adjust allow append apply ask assert assign attach begin bind build calculate call cancel cast change "
    "check choose clean clear clone close collect combine compare compile complete compress compute configure "
    "construct convert copy count create decode decompress decorate decrease define delete deliver delete describe "
    "detach determine disable discard dispatch display divide do draw drop dump emit enable encode ensure enter "
    "escape estimate evaluate examine execute exit expand export extend extract fetch fill filter find finish fit "
    "flatten flush force fork format forward free generate get give go group guess handle hash help hide hold "
    "identify import increase increment indicate initialize insert inspect install invoke iterate join keep kill "
    "list listen load locate lock log look lookup make map mark match measure merge modify move multiply normalize "
    "notify open order output override pack parse pass patch perform pick place play poll pop prepare press print "
    "process produce provide pull push put query quote raise read receive record reduce refresh register release "
    "reload remove rename render repeat replace report represent request reset resolve restore retrieve return "
    "reverse rotate round run sample save scan schedule search select send serialize set setup show shuffle shut "
    "skip sleep solve sort specify split start stop store strip submit subtract swap switch take tell terminate "
    "test throw tokenize transform translate traverse trim truncate try turn undo unescape unlock unpack unregister "
    "update upload use validate verify visit wait walk warn wrap write yield "
)
NOUNS = (
    "load read parse build make find count merge split check clean update remove render format select order collect "
    "item node list value name path file text line word key row column table index data token block page user "
    "message state cache queue event group label field size total score price color image frame result step level "
    "weight range "
)
VERBS, WORDS = frozenset(IMPERATIVES.split()), NOUNS.split()
PLACES = "alpha beta gamma delta left right first second other source target current start end count total value item "
PLACES = (PLACES + "entry record buffer temp data info number text name result limit flag mode extra option").split()
Write = Callable[[random.Random, Function, str], Pair | None]


# ------------------------------------------------------------------------------------------- words


def third_person(verb: str) -> str:
    if verb.endswith(("s", "sh", "ch", "x", "z", "o")):
        return verb + "es"
    return verb[:-1] + "ies" if verb.endswith("y") and verb[-2] not in "aeiou" else verb + "s"


def summary(doc: str) -> str:
    """The first sentence of a docstring in one line, without markup."""
    text = " ".join(doc.strip().split("\n\n")[0].split())
    text = re.sub(r":[a-z:]+:`[~!]?([^`<]*?)(?: <[^`]*>)?`", r"\1", text).replace("``", "`")
    return re.split(r"(?<=[a-z0-9)`'\"])\.(?:\s|$)", text)[0].strip()


def sentence(name: str, doc: str) -> str | None:
    """ "`name` returns ..": the docstring's first sentence about what was asked, where it begins with a verb."""
    text = summary(doc)
    first, _, rest = text.partition(" ")
    verb = first.lower().rstrip(",:")
    if not rest or not 12 < len(text) < 170 or "(" in first:
        return None
    if verb in VERBS:
        return f"`{name}` {third_person(verb)} {rest}."
    if verb.endswith("s") and (verb[:-1] in VERBS or verb[:-2] in VERBS):
        return f"`{name}` {verb} {rest}."
    if verb in ("a", "an", "the", "this") and first != "This":
        return f"`{name}` is {verb} {rest}."
    return None


def new_name(rng: random.Random) -> str:
    return "_".join(rng.choices(WORDS, k=rng.choice((1, 2, 2, 2, 3))))


def replaced(code: str, old: str, new: str) -> str:
    return re.sub(rf"(?<![\w.]){re.escape(old)}(?!\w)", new, code)


def renamed(rng: random.Random, f: Function) -> Function:
    """The same function under a made-up name, sometimes with other parameters."""
    name = new_name(rng)
    code = replaced(f.code, f.name, name)
    return Function(name, f.owner, f.signature, code, f.doc)


def parameters(f: Function) -> list[str]:
    """Names of the plain parameters."""
    try:
        args = ast.parse(f.code).body[0].args
    except (SyntaxError, AttributeError):
        return []
    return [arg.arg for arg in args.posonlyargs + args.args]


def parts(f: Function) -> tuple[str, str, str] | None:
    """Head (to the colon of def), docstring with its quotes or "", body; each ends without a newline."""
    try:
        node = ast.parse(f.code).body[0]
    except SyntaxError:
        return None
    lines = f.code.split("\n")
    start = node.body[0].lineno - 1
    if start == 0 or node.body[0].lineno == node.lineno:
        return None
    if ast.get_docstring(node) is None:
        return "\n".join(lines[:start]), "", "\n".join(lines[start:])
    end = node.body[0].end_lineno
    if len(node.body) < 2 or not lines[start].lstrip().startswith(('"""', 'r"""', "'''")):
        return None
    return "\n".join(lines[:start]), "\n".join(lines[start:end]), "\n".join(lines[end:]).strip("\n")


def short(rng: random.Random, f: Function) -> Function | None:
    """The function with its docstring cut to a line, or without one; None where it stays too long for a reply."""
    cut = parts(f)
    if cut is None or not f.code.lstrip().startswith(("def ", "async def ", "@")):
        return None
    head, doc, body = cut
    if doc:
        line = f'    """{summary(f.doc)}."""' if f.doc and rng.random() < 0.6 else ""
        line = line if "\\" not in line and line.count('"') == 6 else ""
        doc = line if len(line) < 120 else ""
    code = "\n".join(part for part in (head, doc, body) if part)
    return Function(f.name, f.owner, f.signature, code, f.doc) if len(code) <= LONGEST else None


# ----------------------------------------------------------------------------------- write, continue

NAMED = [
    "Write a function `{name}({args})`.", "Write a Python function `{name}`.", "Write a Python function called {name}.",
    "Write a function named `{name}` with the arguments ({args}).", "Implement `{name}({args})`.",
    "Implement the function {name}.", "Define a function `{name}`.", "Please write the Python function `{name}`.",
    "Can you write `{name}({args})` in Python?", "I need a function `{name}`.",
    "Give me a Python function {name}({args}).",
    "write a function {name}", "Write the Python {kind} `{name}({args})` for the {where}.",
    "Write code for `{name}({args})`.",
    "Write the {kind} `{name}` of the {where}.", "Show me a function called `{name}`.",
    "Create a function {name}({args}).",
]  # fmt: skip
TOLD = [
    "Write a Python {kind} `{name}` for the {where}. {doc}.", "Write a Python {kind} `{name}` for the {where}. {doc}.",
    "Write a Python function `{name}`. {doc}.", "Write a function {name}({args}) that does this: {doc}.",
    "Write a function `{name}({args})`. {doc}.", "{doc}. Write a function `{name}` for that.",
    "Implement `{name}`: {doc}.", "Write the function of this docstring and call it `{name}`:\n\"\"\"{doc}.\"\"\"",
    "I need a function called {name}. It should do this: {doc}.", "Docstring: {doc}.\nName: {name}\nWrite the code.",
    "Define `{name}({args})`. {doc}.", "Turn this docstring into a function `{name}`: {doc}.",
]  # fmt: skip
CONTINUE = [
    "{code}", "{code}", "{code}", "Continue this code:\n{code}", "Continue this code:\n```python\n{code}\n```",
    "Complete this function:\n```python\n{code}\n```", "Complete the function `{name}`:\n```python\n{code}\n```",
    "Finish this code.\n\n```python\n{code}\n```", "```python\n{code}\n```", "Please complete:\n{code}",
    "Fill in the body of `{name}`:\n```python\n{code}\n```", "Go on with this code:\n{code}",
]  # fmt: skip


def write(rng: random.Random, f: Function, module: str) -> Pair | None:
    f = short(rng, f)
    if f is None:
        return None
    kind, where = ("method", f"class `{f.owner}`") if f.owner else ("function", f"module `{module}`")
    asked = rng.choice(TOLD if f.doc and rng.random() < 0.6 else NAMED)
    doc = summary(f.doc)[:200] if f.doc else ""
    return Pair(asked.format(name=f.name, args=f.signature, kind=kind, where=where, doc=doc), fenced(f.code))


def go_on(rng: random.Random, f: Function, module: str) -> Pair | None:
    f = short(rng, f)
    cut = f and parts(f)
    if not cut:
        return None
    lines = f.code.split("\n")
    least = len(cut[0].split("\n"))
    shown = least if rng.random() < 0.6 else rng.randint(least, max(least, len(lines) - 1))
    code = "\n".join(lines[:shown])
    return Pair(rng.choice(CONTINUE).format(code=code.strip("\n"), name=f.name), fenced(f.code))


# ---------------------------------------------------------------------------------------- questions

DOES = [
    "What does the Python {kind} `{name}` do?", "What does the Python {kind} `{name}` do?", "What does `{name}` do?",
    "What is `{name}` for?", "Explain `{name}` in a sentence.", "Describe the {kind} `{name}`.", "What does {name} do?",
    "Tell me what the {kind} `{name}` does.", "What is the purpose of `{name}`?", "Can you explain {name}?",
    "What happens when I call `{name}`?", "Say in one sentence what `{name}` does.", "How would you describe `{name}`?",
]  # fmt: skip
EXPLAIN = [
    "What does this function do?", "Explain this code.", "Explain this function in a sentence.",
    "What is this code for?",
    "Describe this function.", "Write a docstring for this function.", "Summarize this function.", "What does this do?",
    "What does `{name}` do?", "Document this function.",
]  # fmt: skip
TAKES = ["Which arguments does this function take?", "What are the parameters of this function?",
         "List the arguments of `{name}`.", "What arguments does `{name}` have?"]  # fmt: skip
CALLED = ["What is the name of this function?", "How is this function called?", "Which function is defined here?",
          "Name this function.", "What does this code define?"]  # fmt: skip
COUNT = ["How many arguments does this function take?", "How many parameters does `{name}` have?"]
NUMBERS = ("no arguments", "one argument", "two arguments", "three arguments", "four arguments", "five arguments")


def about(rng: random.Random, f: Function, module: str) -> Pair | None:
    name = rng.choice((f"{f.owner or module}.{f.name}", f"{f.owner or module}.{f.name}", f.name))
    told = f.doc and sentence(name, f.doc)
    kind = "method" if f.owner else "function"
    return Pair(rng.choice(DOES).format(name=name, kind=kind), told) if told else None


def listed(names: list[str]) -> str:
    quoted = [f"`{name}`" for name in names]
    return quoted[0] if len(quoted) == 1 else ", ".join(quoted[:-1]) + " and " + quoted[-1]


def about_code(rng: random.Random, f: Function, module: str) -> Pair | None:
    cut = parts(f)
    if cut is None:
        return None
    code, names = "\n".join(part for part in (cut[0], cut[2]) if part), parameters(f)
    if len(code) > 600:
        return None
    kind = rng.random()
    if kind < 0.6:
        asked, told = rng.choice(EXPLAIN), f.doc and sentence(f.name, f.doc)
    elif kind < 0.75:
        asked, told = rng.choice(CALLED), f"The function is called `{f.name}`."
    elif kind < 0.9 and names:
        word = "argument" if len(names) == 1 else "arguments"
        asked, told = rng.choice(TAKES), f"`{f.name}` takes the {word} {listed(names)}."
    elif len(names) < len(NUMBERS):
        asked = rng.choice(COUNT)
        told = f"`{f.name}` takes {NUMBERS[len(names)]}" + (f": {listed(names)}." if names else ".")
    else:
        return None
    asked = asked.format(name=f.name)
    user = f"{asked}\n```python\n{code}\n```" if rng.random() < 0.8 else f"```python\n{code}\n```\n{asked}"
    return Pair(user, told) if told else None


def from_docs(rng: random.Random, entry: tuple[str, str, str]) -> Pair | None:
    """A question about a module, a class or a builtin, of (kind, name, docstring)."""
    kind, name, doc = entry
    told = sentence(name, doc)
    if told is None and kind in ("module", "class") and 12 < len(summary(doc)) < 170:
        told = f"The {kind} `{name}` is described so: {summary(doc)}."
    asked = [
        "What is the Python {kind} `{name}` for?",
        "What is the Python {kind} `{name}`?",
        "What is `{name}`?",
        "What does `{name}` do?",
        "Explain `{name}`.",
        "What is {name} for?",
        "Tell me about the {kind} `{name}`.",
    ]
    return Pair(rng.choice(asked).format(kind=kind, name=name), told) if told else None


# ------------------------------------------------------------------------------------- copy and edit

COPY = [
    "Copy this code.",
    "Repeat this code exactly.",
    "Copy the following code without changes:",
    "Print this code again.",
    "Give me this code back unchanged.",
    "Repeat the code below.",
    "Copy this function:",
    "Return this code as it is.",
]
RENAME = ["Rename `{old}` to `{new}` in this code.", "Rename the {what} `{old}` to `{new}`.",
          "Replace `{old}` by `{new}`.",
          "Change the name `{old}` to `{new}`.", "In this code, rename {old} to {new}.", "Replace {old} with {new}:",
          "Call the {what} `{new}` instead of `{old}`.", "Please rename {old} to {new} in the code below."]  # fmt: skip
CONSTANT = ["Change {old} to {new}.", "Replace {old} by {new} in this code.", "Use {new} instead of {old}.",
            "Change the value {old} to {new}:"]  # fmt: skip
DOCUMENT = ["Add the docstring \"{new}\" to this function.", "Give this function the docstring: {new}",
            "Add this docstring: {new}"]  # fmt: skip
UNDOCUMENT = [
    "Remove the docstring.",
    "Delete the docstring of this function.",
    "Write this function without its docstring.",
]
EXTRA = ["Add the parameter `{new}` to this function.", "Add an argument {new} at the end.",
         "Give this function one more argument, `{new}`."]  # fmt: skip
COMMENT = ["Add the comment \"{new}\" as the first line.", "Put the comment # {new} above this code.",
           "Add a comment at the top: {new}"]  # fmt: skip
SAY = ["Repeat after me: {text}", "Say \"{text}\".", "Repeat this sentence: {text}", "Copy this text: {text}",
       "Write this: {text}", "Print the text: {text}"]  # fmt: skip


def framed(rng: random.Random, asked: str, code: str) -> str:
    kind = rng.random()
    if kind < 0.65:
        return f"{asked}\n```python\n{code}\n```"
    return f"{asked}\n\n{code}" if kind < 0.8 else f"```python\n{code}\n```\n{asked}"


def snippet(rng: random.Random, f: Function) -> str | None:
    """The function without a long docstring, or some of its lines."""
    f = short(rng, f)
    if f is None or "```" in f.code:
        return None
    lines = f.code.split("\n")
    if rng.random() < 0.25 and len(lines) > 3:
        first = rng.randrange(1, len(lines) - 1)
        part = "\n".join(lines[first : first + rng.randint(1, 5)])
        part = inspect.cleandoc(part)
        return part if part.strip() and len(part) < SHORT else None
    return f.code if len(f.code) < SHORT else None


def edit(rng: random.Random, f: Function, module: str) -> Pair | None:
    """Copy given code, or copy it with one change."""
    code = snippet(rng, f)
    if not code:
        return None
    change = rng.choice((copied, copied, moved, moved, moved, moved, valued, documented, extended, commented))
    made = change(rng, f, code)
    if made is None:
        made = copied(rng, f, code) if rng.random() < 0.3 else moved(rng, f, code)
    return made and Pair(framed(rng, made[0], code), fenced(made[1]))


Edit = tuple[str, str] | None  # what is asked, and the code after it


def copied(rng: random.Random, f: Function, code: str) -> Edit:
    return rng.choice(COPY), code


def moved(rng: random.Random, f: Function, code: str) -> Edit:
    """Another name for one of the code's names."""
    names = set(re.findall(r"(?<![\w.\"'])[A-Za-z_]\w+", code)) - set(keyword.kwlist) - set(dir(builtins))
    choices = [name for name in (f.name, *parameters(f)) if name in names and name not in ("self", "cls")]
    if rng.random() < 0.3 or not choices:
        choices = sorted(names - {"self", "cls"})
    if not choices:
        return None
    old = rng.choice(choices)
    new = rng.choice((new_name(rng), rng.choice(PLACES), rng.choice(PLACES)))
    places = len(re.findall(rf"(?<!\w){re.escape(old)}(?!\w)", code))
    # An attribute or a text of the same name would leave open what is meant.
    if new in names or places != len(re.findall(rf"(?<![\w.\"']){re.escape(old)}(?![\w\"'])", code)):
        return None
    after = replaced(code, old, new)
    what = "function" if old == f.name else "variable"
    return rng.choice(RENAME).format(old=old, new=new, what=what), after


def valued(rng: random.Random, f: Function, code: str) -> Edit:
    """Another value for a number or a string that occurs once."""
    values = [value for value in re.findall(r"(?<![\w.\"'])(\d+|\"\w+\"|'\w+')(?![\w.\"'])", code)]
    values = [value for value in values if code.count(value) == 1]
    if not values:
        return None
    old = rng.choice(values)
    new = str(rng.randint(0, 100)) if old.isdigit() else f"{old[0]}{rng.choice(WORDS)}{old[0]}"
    return (rng.choice(CONSTANT).format(old=old, new=new), code.replace(old, new)) if new != old else None


def documented(rng: random.Random, f: Function, code: str) -> Edit:
    """A docstring more or less."""
    cut = parts(f._replace(code=code)) if code.startswith("def ") else None
    if cut is None:
        return None
    head, doc, body = cut
    if doc:
        return rng.choice(UNDOCUMENT), f"{head}\n{body}"
    new = f"{rng.choice(WORDS).capitalize()} the {rng.choice(WORDS)} of the {rng.choice(WORDS)}."
    if f.doc and rng.random() < 0.5:
        new = summary(f.doc) + "."
    if '"' in new or "\\" in new or len(new) > 90:
        return None
    return rng.choice(DOCUMENT).format(new=new), f'{head}\n    """{new}"""\n{body}'


def extended(rng: random.Random, f: Function, code: str) -> Edit:
    """One parameter more."""
    head = re.match(r"def \w+\(([^()*\n]*)\):\n", code)
    if not head:
        return None
    new = rng.choice(PLACES) + rng.choice(("", "=None", "=0", "=True"))
    if re.search(rf"(?<!\w){new.split('=')[0]}(?!\w)", code) or ("=" in head[1] and "=" not in new):
        return None
    end = head.end(1)
    return rng.choice(EXTRA).format(new=new), code[:end] + (", " if head[1].strip() else "") + new + code[end:]


def commented(rng: random.Random, f: Function, code: str) -> Edit:
    new = " ".join(rng.choices(WORDS, k=rng.randint(1, 4)))
    return rng.choice(COMMENT).format(new=new), f"# {new}\n{code}"


def said(rng: random.Random, f: Function, module: str) -> Pair | None:
    """A text said again."""
    text = summary(f.doc) if f.doc and rng.random() < 0.6 else " ".join(rng.choices(WORDS, k=rng.randint(1, 5)))
    return Pair(rng.choice(SAY).format(text=text), text) if 2 < len(text) < 120 and '"' not in text else None


# ------------------------------------------------------------------------------------------ mixtures

FROM_FUNCTION: tuple[tuple[float, Write], ...] = (
    (0.26, write), (0.22, go_on), (0.12, about), (0.13, about_code), (0.24, edit), (0.03, said),
)  # fmt: skip
MADE_UP = 0.35  # of the functions get another name


def wanted(f: Function) -> bool:
    """Whether a function teaches something: no stub, no name that is none."""
    return len(f.name) > 1 and "overload" not in f.code.split("\n")[0] and "```" not in f.code


class Source:
    """Pairs from modules, and from talk: `pair(rng)` draws one."""

    def __init__(self, modules: Iterable[Module], forbidden: frozenset[str] = frozenset()):
        """Only modules that are trained on; no question of `forbidden` is asked."""
        self.functions: list[tuple[Function, str]] = []
        self.taught: list[tuple[Function, str]] = []  # of a package of textbook algorithms
        self.docs: list[tuple[str, str, str]] = []
        self.forbidden = forbidden
        for module in modules:
            name, text = dotted(module.path), module.text
            if name.startswith(("builtin/", "topic/")):
                self.docs += [("function", name.removeprefix("builtin/"), text)] * name.startswith("builtin/")
                continue
            found = [(f, name) for f in functions(text) if wanted(f)]
            self.functions += found
            self.taught += found if name.startswith(("algorithms.", "more_itertools", "toolz", "boltons")) else []
            self.docs += described(name, text)

    def pair(self, rng: random.Random) -> Pair:
        while True:
            made = self._draw(rng)
            if not made or made.user in self.forbidden or len(made.model) > LONGEST + 30:
                continue
            if made.model and made.user == made.user.strip() and made.model == made.model.strip():
                return made

    def _draw(self, rng: random.Random) -> Pair | None:
        kind = rng.random()
        if kind < 0.05:
            return talk(rng)
        if kind < 0.09:
            return definition(rng)
        if kind < 0.17:
            return small_function(rng)
        if kind < 0.21 and self.docs:
            return from_docs(rng, rng.choice(self.docs))
        f, module = rng.choice(self.taught if self.taught and rng.random() < 0.1 else self.functions)
        build = rng.choices([way for _, way in FROM_FUNCTION], [share for share, _ in FROM_FUNCTION])[0]
        if build is not about and rng.random() < MADE_UP and len(f.name) > 2:
            f = renamed(rng, f)
        return build(rng, f, module)


def described(name: str, text: str) -> list[tuple[str, str, str]]:
    """The module and its classes with their docstrings."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return []
    found = [("module", name, ast.get_docstring(tree))]
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            found += [("class", label, ast.get_docstring(node)) for label in (f"{name}.{node.name}", node.name)]
    return [(kind, label, doc) for kind, label, doc in found if doc]


def builtin_docs() -> list[Module]:
    """The docstrings of Python's builtins and of modules written in C, as `help()` prints them."""
    found = {}
    homes = ["builtins", "math", "itertools", "functools", "time", "sys", "posix", "zlib", "array", "binascii", "gc",
             "unicodedata", "select", "socket", "struct", "cmath", "operator", "random", "re"]  # fmt: skip
    for home in homes:
        module = import_module(home)
        for name, value in inspect.getmembers(module):
            label = name if home == "builtins" else f"{'os' if home == 'posix' else home}.{name}"
            if not name.startswith("_") and callable(value) and isinstance(value.__doc__, str):
                found[label] = value.__doc__
    for kind in (str, bytes, list, dict, set, tuple, int, float):
        for name, value in inspect.getmembers(kind):
            if not name.startswith("_") and isinstance(value.__doc__, str):
                found[f"{kind.__name__}.{name}"] = value.__doc__
    return [Module(f"builtin/{label}", doc) for label, doc in sorted(found.items()) if not held_out(label)]


def main() -> None:
    rng = random.Random(0)
    source = Source(module for module in builtin_docs())
    source.functions = [(f, "textwrap") for f in functions(inspect.getsource(import_module("textwrap")))]
    for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 20):
        print(source.pair(rng).render())


if __name__ == "__main__":
    main()

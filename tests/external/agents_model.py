"""A model that is written down: it fixes the bug of a scratch repository, in Gemma's own call syntax.

The small bundled model cannot steer an agent. So what it would have to say is said here, a reply for each step; the
rest (prompts, tools, streams, ends) is the server's own.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from serving import Scripted, ids_of  # noqa: E402

CONTEXT = 1 << 18  # tokens; the bundled tokenizer makes many of an agent's prompt
PIECE = 7  # tokens a round
BUG, FIXED, WRONG = "return a - b", "return a + b", "return a * b"
FILES = {
    "calc.py": f'def add(a, b):\n    """Returns the sum."""\n    {BUG}\n',
    "test_calc.py": "from calc import add\n\nassert add(2, 3) == 5, add(2, 3)\nprint('good')\n",
}
TASK = "test_calc.py fails. Find the bug in calc.py, fix it, and run `python3 test_calc.py`."
QUOTE, CALL, END = '<|"|>', "<|tool_call>", "<turn|>"
SAID = "The bug is fixed: add returns the sum, and the test passes."
CHECK = "python3 test_calc.py"
FAILURE = "AssertionError: 6"  # what the test says of WRONG
LISTING = "*file listing*"  # Aider's word for what it wants of a reply that edits


def call(name: str, **arguments: str | int) -> str:
    """A call as Gemma writes it."""
    told = (f"{key}:{QUOTE}{value}{QUOTE}" if isinstance(value, str) else f"{key}:{value}"
            for key, value in sorted(arguments.items()))  # fmt: skip
    return f"{CALL}call:{name}{{{','.join(told)}}}<tool_call|>"


def claude(folder: Path) -> list[str]:
    """Steps of Claude Code: its tools want whole paths, and a file must be read before it is edited."""
    calc = str(folder / "calc.py")
    edit = call("Edit", file_path=calc, old_string=BUG, new_string=FIXED)
    return [call("Read", file_path=calc), edit, call("Bash", command=CHECK, description="Run the test"), SAID]


def codex(folder: Path) -> list[str]:
    """Steps of Codex, which has a shell alone, with its own apply_patch in it."""
    patch = f"*** Begin Patch\n*** Update File: calc.py\n@@\n-    {BUG}\n+    {FIXED}\n*** End Patch"
    edit = call("exec_command", cmd=f"apply_patch <<'EOF'\n{patch}\nEOF")
    return [call("exec_command", cmd="cat calc.py"), edit, call("exec_command", cmd=CHECK), SAID]


def opencode(folder: Path) -> list[str]:
    """Steps of opencode."""
    calc = str(folder / "calc.py")
    edit = call("edit", filePath=calc, oldString=BUG, newString=FIXED)
    return [call("read", filePath=calc), edit, call("bash", command=CHECK), SAID]


def continue_(folder: Path) -> list[str]:
    """Steps of Continue's command line, which wants to have read a file just before it edits it."""
    calc = str(folder / "calc.py")
    edit = call("Edit", file_path=calc, old_string=BUG, new_string=FIXED)
    look = call("Bash", command="cat test_calc.py")
    return [look, call("Read", filepath=calc), edit, call("Bash", command=CHECK), SAID]


def aider(folder: Path) -> list[str]:
    """Steps of Aider, which has no tools: a reply has whole files, and it runs the test itself. The first is wrong."""
    wrong, right = (FILES["calc.py"].replace(BUG, each) for each in (WRONG, FIXED))
    return [f"So.\n\ncalc.py\n```\n{text}```\n\n{said}" for text, said in ((wrong, "Done."), (right, SAID))]


STEPS: dict[str, Callable[[Path], list[str]]] = {
    "claude": claude,
    "codex": codex,
    "opencode": opencode,
    "continue": continue_,
    "aider": aider,
}
OTHER = {  # a second thing to look at, and an argument that has to be mended: a number as text
    "claude": lambda folder: (
        call("Read", file_path=str(folder / "test_calc.py")),
        call("Read", file_path=str(folder / "calc.py"), limit="50"),
    ),
    "codex": lambda folder: (
        call("exec_command", cmd="cat test_calc.py"),
        call("exec_command", cmd="cat calc.py", yield_time_ms="1000"),
    ),
    "opencode": lambda folder: (
        call("read", filePath=str(folder / "test_calc.py")),
        call("read", filePath=str(folder / "calc.py"), limit="50"),
    ),
    "continue": lambda folder: (
        call("List", dirpath=str(folder)),
        call("Bash", command="cat test_calc.py", timeout="50"),
    ),
}
WAYS = ("plain", "two", "repaired", "thought", "spent", "cut")
CALLING = ("two", "repaired")  # ways of clients that have tools
BARE = ("aider",)  # clients that have none


def ways_of(client: str) -> list[str]:
    """The ways that a client can go."""
    return [way for way in WAYS if client not in BARE or way not in CALLING]


def steps_of(client: str, way: str, folder: Path) -> list[str]:
    """The replies of a way through the task.

    two: two calls in the first reply. repaired: its call has a number as text. thought, spent: a thought that fills its
    budget comes before the first call, or fills the whole reply. cut: as plain; whoever serves cuts the stream.
    """
    steps = STEPS[client](folder)
    if way in CALLING:
        other, mended = OTHER[client](folder)
        steps[0] = mended if way == "repaired" else steps[0] + other
    return [step + END for step in steps]


class Agent(Scripted):
    """The engine of one run. steps: its replies, in order. way: one of WAYS. bare: whether its client has no tools.
    replies: those that were begun.
    """

    def __init__(self, engine: Any, steps: Sequence[str], way: str, bare: bool = False):
        super().__init__(engine, lambda number: [])
        config = replace(engine.target.config, context=CONTEXT)
        engine._intake.config, self.target = config, SimpleNamespace(config=config)
        self.steps, self.way, self.bare, self.replies = steps, way, bare, []

    async def astream(self, prompts: Any, params: Any, **options: Any) -> AsyncIterator[Any]:
        self._params, self._tools = params, options.get("tools")
        async for chunk in super().astream(prompts, params, **options):
            yield chunk

    def rounds_of(self, number: int, prompt: list[int]) -> Any:
        """A reply by the results in the prompt: an agent that asks again gets the same one again."""
        results = self._results(prompt)
        if results is None:
            text = "Fix calc.py" + END
        else:
            text = self._thought(results) + self.steps[min(results, len(self.steps) - 1)]
        if self.text.opens_thought(prompt):  # the template does, after results
            text = "So far.\n<channel|>" + text
        self.replies.append(text)
        ids = ids_of(self, text)
        return [ids[at : at + PIECE] for at in range(0, len(ids), PIECE)]

    def _results(self, prompt: list[int]) -> int | None:
        """How many replies had results, several calls of one counting once; None for a title, a summary, a probe."""
        if self.bare:  # what the test said is told in words
            text = self.text.tokenizer.decode(prompt)
            return text.count(FAILURE) if LISTING in text else None
        if self._tools is None:
            return None
        opens, closes = (self.text.template.control[each] for each in ("<|tool_response>", "<tool_response|>"))
        return sum(token == opens and before != closes for before, token in pairwise(prompt))

    def _thought(self, results: int) -> str:
        """A thought that takes all that it may, where this way has one."""
        if self.way not in ("thought", "spent") or results:
            return ""
        budget = self._params.thinking_budget or 4096
        if self.way == "spent" and not any(reply.startswith("<|channel>") for reply in self.replies):
            budget = self._params.max_tokens + 1  # and nothing else comes
        words = ids_of(self, " and so on" * 8)
        return "<|channel>thought\n" + " and so on" * (8 * budget // len(words)) + "\n<channel|>"

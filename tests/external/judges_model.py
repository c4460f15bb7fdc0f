"""A model that is written down for llmprobe: it does as it is told, so that what fails is the server's alone.

What the small models cannot do (end a string, recall a name, think when asked to) is said here, by the words of the
last turn; prompts, tools, streams, limits and ends are the server's own.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from serving import Scripted, ids_of  # noqa: E402

PIECE = 3  # tokens a round
QUOTE, END = '<|"|>', "<turn|>"
LONG = " and so on" * 100
# What is said, by a pattern of the last turn; a group of it goes into the reply.
SAID = (
    (r"exactly(?:, nothing else)?: (.+)", "{}"),
    (r"17 \* 3", "51"),
    (r"17 \* 23", "391"),
    (r"12 \+ 30", "42"),
    (r"2 \+ 2", "4"),
    (r"Add 3", "7"),
    (r"Count from 1 to (?:5|100)\.", ", ".join(map(str, range(1, 101)))),
    (r"capital of France", "Paris"),
    (r"essay|at length", LONG),
    (r'keys "name"', '{{"name": "Ada", "age": 36}}'),
)


def instance(schema: Mapping[str, Any], asked: str) -> Any:
    """Something that follows a schema. asked: the last turn, which may hold a text to be copied."""
    if "enum" in schema:
        return schema["enum"][0]
    if schema.get("type") == "object":
        told = asked.partition("content exactly:\n")[2]
        own = {"content": told} if told else {}
        return {key: own.get(key) or instance(each, asked) for key, each in schema.get("properties", {}).items()}
    return {"integer": 4, "number": 4.5, "boolean": True, "array": []}.get(schema.get("type"), "Paris")


def call(name: str, arguments: Mapping[str, Any]) -> str:
    """A call as Gemma writes it."""
    told = (f"{key}:{QUOTE}{value}{QUOTE}" if isinstance(value, str) else f"{key}:{json.dumps(value)}"
            for key, value in arguments.items())  # fmt: skip
    return f"<|tool_call>call:{name}{{{','.join(told)}}}<tool_call|>"


class Knowing(Scripted):
    """An engine that answers what llmprobe asks."""

    def __init__(self, engine: Any):
        super().__init__(engine, lambda number: [])

    async def astream(self, prompts: Any, params: Any, **options: Any) -> AsyncIterator[Any]:
        self._params, self._options = params, options
        async for chunk in super().astream(prompts, params, **options):
            yield chunk

    def rounds_of(self, number: int, prompt: list[int]) -> Any:
        """The reply to a prompt."""
        whole = self.text.tokenizer.decode(prompt)
        asked, _, begun = whole.rpartition("<|turn>user\n")[2].partition(END)
        schema = self._params.json_schema
        if schema is not None and json.loads(schema).get("properties"):
            parts = re.split(r"(?=\|)", json.dumps(instance(json.loads(schema), asked)))  # which spell no control token
            ids = [token for part in (*parts, END) for token in ids_of(self, part)]
        else:
            said = self._reply(whole, asked, begun)
            ids = ids_of(self, self._thought(whole, asked, prompt) + said + END)
        return [ids[at : at + PIECE] for at in range(0, len(ids), PIECE)]

    def _thought(self, whole: str, asked: str, prompt: list[int]) -> str:
        """A thought, where the template asks for one."""
        if self.text.opens_thought(prompt):
            return "So.\n<channel|>"
        thinks = "<|think|>" in whole and ("Think" in asked or "step by step" in asked)
        return f"<|channel>thought\nI think.{LONG if 'at length' in asked else ''}\n<channel|>" if thinks else ""

    def _reply(self, whole: str, asked: str, begun: str) -> str:
        """The text or the calls. begun: what the prompt has of the model's turn."""
        tools, choice = self._options.get("tools"), self._options.get("tool_choice")
        if tools is not None and choice != "none" and "<|tool_response>" not in begun:
            return self._calls(tools, choice, asked)
        if "quartz" in whole:
            return "quartz"
        if begun.endswith(" Par"):
            return "is."
        if "my name" in asked:
            return re.findall(r"[Mm]y name is (\w+)", whole)[-1]
        for pattern, reply in SAID:
            if found := re.search(pattern, asked):
                return reply.format(*found.groups())
        return "Hello."

    def _calls(self, tools: Any, choice: Any, asked: str) -> str:
        """A call of each tool, or of the one that is to be called."""
        named = (choice.get("function") or choice)["name"] if isinstance(choice, Mapping) else None
        functions = [each["function"] for each in tools.schemas if named in (None, each["function"]["name"])]
        if not self._options.get("parallel_tool_calls", True):
            functions = functions[:1]
        return "".join(call(each["name"], instance(each["parameters"], asked)) for each in functions)

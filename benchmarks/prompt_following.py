"""How often a pair follows its prompt: `python -m benchmarks.prompt_following [--model FOLDER] [--json FILE]`.

60 prompts whose functions lie in modules that training leaves out, or that were written for this; a program judges each
greedy reply:

  write, continue   the reply's code parses and defines the named function
  question          a sentence without code that names what was asked
  edit              the given code with the asked change, and nothing else
  chat              a short reply without code that has one of the words that fit

and every reply must have ended by itself. `--prompts FILE` asks others of the same form.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.command import command
from mlx_gemma_mtp import SamplingParams, load

PROMPTS = Path(__file__).parent.parent / "tests" / "data" / "prompt_following.json"
NEW_TOKENS = 256
MOST_WORDS = 60  # of a sentence


def code_of(reply: str) -> str:
    """The first fenced block of a reply, or all of it."""
    block = re.search(r"```[a-z]*\n(.*?)\n?```", reply, re.DOTALL)
    return block[1] if block else reply


def defines(reply: str, name: str) -> bool:
    """Whether the reply's code parses and defines a function `name`."""
    try:
        tree = ast.parse(code_of(reply))
    except (SyntaxError, ValueError):
        return False
    return any(
        isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name for node in ast.walk(tree)
    )


def is_sentence(reply: str) -> bool:
    """Whether a reply is short prose that does not go round in circles."""
    words = reply.split()
    runs = Counter(zip(words, words[1:], words[2:], strict=False))
    return "```" not in reply and 0 < len(words) <= MOST_WORDS and max(runs.values(), default=0) < 3


def same_code(reply: str, code: str) -> bool:
    lines = [[line.rstrip() for line in text.strip("\n").split("\n")] for text in (code_of(reply), code)]
    return lines[0] == lines[1]


def follows(entry: dict[str, Any], reply: str, ended: bool) -> bool:
    """Whether a reply has the property of its prompt."""
    if not ended:
        return False
    if "defines" in entry:
        return defines(reply, entry["defines"])
    if "code" in entry:
        return same_code(reply, entry["code"])
    if not is_sentence(reply):
        return False
    if "says" in entry:
        return all(word.lower() in reply.lower() for word in entry["says"])
    return any(word in reply.lower() for word in entry["any"])


def measure(entries: Sequence[dict[str, Any]], model: str | None, draft: str | None) -> list[dict[str, Any]]:
    """The entries with their `reply` and whether it follows, `good`."""
    engine = load(*([model] if model else []), *([draft] if draft else []))
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS)
    results = engine.generate([entry["prompt"] for entry in entries], params)
    judged = zip(entries, results, strict=True)
    return [
        entry | {"reply": one.text, "good": follows(entry, one.text, one.finish_reason == "stop")}
        for entry, one in judged
    ]


def table(judged: Sequence[dict[str, Any]]) -> str:
    kinds = list(dict.fromkeys(entry["kind"] for entry in judged))
    rows = [(kind, [entry["good"] for entry in judged if entry["kind"] == kind]) for kind in kinds]
    rows.append(("all", [entry["good"] for entry in judged]))
    return "\n".join(f"{kind:9} {sum(good):3} of {len(good):3}  {sum(good) / len(good):4.0%}" for kind, good in rows)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.prompt_following", description=__doc__.split("\n")[0])
    made.add_argument("--model", help="target; default: the bundled pair")
    made.add_argument("--draft", help="drafter")
    made.add_argument("--prompts", type=Path, default=PROMPTS)
    made.add_argument("--json", type=Path, help="file for the prompts with their replies")
    made.add_argument("--show", action="store_true", help="print the replies that do not follow")
    return made


def run(args: argparse.Namespace) -> int:
    judged = measure(json.loads(args.prompts.read_text()), args.model, args.draft)
    if args.json:
        args.json.write_text(json.dumps(judged, indent=1) + "\n")
    if args.show:
        for entry in judged:
            if not entry["good"]:
                print(f"--- {entry['prompt']}\n>>> {entry['reply']}\n")
    print(table(judged))
    return 0


def main(argv: list[str] | None = None) -> int:
    return command(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())

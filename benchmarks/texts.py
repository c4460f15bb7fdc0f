"""Classes of text for the draft length: code that the drafter knows, prose at temperature 1, words without order; and
for sources of drafts: summaries, JSON by schemas, arguments of tools.

Imports no MLX, so that a BLAS can still be put before it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import replace
from itertools import count as numbers
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from mlx_gemma_mtp import SamplingParams

from .schemas import schema_of

ROOT = Path(__file__).parent.parent
PROMPTS = ROOT / "tests" / "data" / "prompts.json"
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True, seed=0)
SAMPLED = SamplingParams(temperature=1.0, top_k=64, top_p=0.95, ignore_eos=True, seed=3)
WILD = SamplingParams(temperature=1.5, top_k=-1, top_p=1.0, ignore_eos=True, seed=3)
ENDING = SamplingParams(temperature=0.0, top_k=-1, top_p=1.0, seed=0)  # a bound text ends by itself
BINDING = "Describe the function open().", "def area(width, height):"  # prompts of bound texts
SCHEMA = 450  # characters of a schema at least, for texts that are not too short
SUMMARY = 1200  # characters of a text that is summed up


class Asked(NamedTuple):
    """A request. chat: whether the chat template goes round the prompt. options: of the engine's call."""

    prompt: str
    chat: bool
    params: SamplingParams
    options: Mapping[str, Any] = MappingProxyType({})


def texts(count: int) -> dict[str, list[Asked]]:
    """Requests of each class of free text."""
    prompts = [each["prompt"] for each in json.loads(PROMPTS.read_text())]
    code = [p for p in prompts if p.startswith("Write") or p.startswith("def ")][:count]
    prose = [p for p in prompts if p.startswith("What") or p.startswith("Explain")][:count]
    words = " ".join(prompts).split()
    random.Random(0).shuffle(words)
    shuffled = [" ".join(words[i * 40 : (i + 1) * 40]) for i in range(count)]
    return {
        "code": [Asked(p, True, GREEDY) for p in code],
        "prose": [Asked(p, True, SAMPLED) for p in prose],
        "shuffled": [Asked(p, False, WILD) for p in shuffled],
    }


def tasks(count: int) -> dict[str, list[Asked]]:
    """Requests of each class: a page of the documentation to be summed up, JSON by a schema, a call of one of two
    tools.
    """
    pages = [page.read_text()[:SUMMARY] for page in sorted((ROOT / "docs").glob("*.md"))[:count]]
    large = (schema for schema in map(schema_of, numbers()) if len(str(schema)) >= SCHEMA)
    schemas = list(islice(large, count + 1))
    tools = [_tool(f"set_{i}", schema) for i, schema in enumerate(schemas)]
    return {
        "summary": [Asked(f"Sum up this text.\n\n{page}", True, SAMPLED) for page in pages],
        "json": [
            Asked(BINDING[i % 2], True, replace(ENDING, json_schema=schema)) for i, schema in enumerate(schemas[:count])
        ],
        "tools": [
            Asked(BINDING[i % 2], True, ENDING, {"tools": tools[i : i + 2], "tool_choice": "required"})
            for i in range(count)
        ],
    }


def _tool(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": "Sets values.", "parameters": parameters}}

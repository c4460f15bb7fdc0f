"""What a vocabulary costs before the first token, beside what the libraries below need alone."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import full_vocabulary
from benchmarks.experts import interleaved, report
from mlx_gemma_mtp.text.tokenizer_files import check_tokenizer

SCHEMA = json.dumps({"type": "object", "properties": {"name": {"type": "string"}, "size": {"type": "integer"}},
                     "required": ["name", "size"], "additionalProperties": False})  # fmt: skip
READ, LLGUIDANCE = "`tokenizers` reads the file", "llguidance's LLTokenizer"
LIMITS = {"Text(folder)": (READ, 1.3), "first constrained request": (LLGUIDANCE, 1.2)}


def full_start(repeats: int) -> list[dict[str, Any]]:
    """Returns `start` of a made-up vocabulary of Gemma 4's size. A turn takes seconds."""
    with tempfile.TemporaryDirectory() as folder:
        full_vocabulary.write(Path(folder))
        return start(Path(folder), repeats)


def start(folder: Path, repeats: int) -> list[dict[str, Any]]:
    """Returns a record for each start with the tokenizer in `folder`: see experts.report, and `limit`, of the ratio.

    The first constrained request is a schema's first mask. Raises UserError for a folder without a tokenizer.
    """
    check_tokenizer(folder)
    from llguidance import LLTokenizer
    from tokenizers import Tokenizer

    from mlx_gemma_mtp.text.encode import Text
    from mlx_gemma_mtp.text.grammar import Grammars

    path, ends = str(folder / "tokenizer.json"), [1]
    vocab = Tokenizer.from_file(path).get_vocab_size()
    text = Text(folder, vocab)

    def constrained() -> object:
        return Grammars(text.fast_tokenizer, vocab, ends).compile("json_schema", SCHEMA).mask()

    calls = {
        READ: lambda: Tokenizer.from_file(path),
        "Text(folder)": lambda: Text(folder, vocab),
        LLGUIDANCE: lambda: LLTokenizer(path, n_vocab=vocab, eos_token=ends),
        "first constrained request": constrained,
        "token_id, 1,000 times": lambda: [text.tokenizer.get_vocab().get("<|channel>") for _ in range(1000)],
        "a stream of text, 1,000 times": lambda: [text.stream(()) for _ in range(1000)],
    }
    times = interleaved(calls, repeats)
    by_reference = {name: {each["path"]: each for each in report(times, name, {"part": "start"})}
                    for name in (READ, LLGUIDANCE)}  # fmt: skip
    limits = {name: LIMITS.get(name, (LLGUIDANCE if name == LLGUIDANCE else READ, None)) for name in calls}
    return [by_reference[over][name] | {"limit": limit} for name, (over, limit) in limits.items()]

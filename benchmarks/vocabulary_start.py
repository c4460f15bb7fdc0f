"""What a vocabulary of 262,144 costs at the start, beside what the libraries below need alone.

`python -m benchmarks.vocabulary_start`. On a made-up tokenizer of Gemma 4's size (full_vocabulary.py), or on that of
--model. Times are the CPU's for this process, which other work on the machine hardly changes; both sides of a ratio are
measured in turn, and it is that of the least times.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any

from benchmarks import full_vocabulary
from benchmarks.command import command
from mlx_gemma_mtp.cli.command import Parser
from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.text.tokenizer_files import check_tokenizer

SCHEMA = json.dumps({"type": "object", "properties": {"name": {"type": "string"}, "size": {"type": "integer"}},
                     "required": ["name", "size"], "additionalProperties": False})  # fmt: skip
MOST = {"tokenizer": 1.3, "grammar": 1.2}  # the ratios that are aimed at


def measure(folder: Path, repeats: int) -> dict[str, Any]:
    """Returns the CPU seconds of each start in `folder`, run by run, and their ratios.

    tokenizer: `Text(folder)` beside the `tokenizers` library reading the same file. grammar: a schema's first mask
    beside llguidance's own LLTokenizer of the same file. token_id, stream: microseconds of one call.
    Raises UserError for a folder without a tokenizer.
    """
    from llguidance import LLTokenizer
    from tokenizers import Tokenizer

    from mlx_gemma_mtp.text.encode import Text
    from mlx_gemma_mtp.text.grammar import Grammars

    check_tokenizer(folder)
    path = folder / "tokenizer.json"
    ends = [1]
    seconds: dict[str, list[float]] = {name: [] for name in ("read", "tokenizer", "llguidance", "grammar")}
    for _ in range(repeats):
        took, plain = _timed(lambda: Tokenizer.from_file(str(path)))
        seconds["read"].append(took)
        vocab = plain.get_vocab_size()
        del plain
        took, text = _timed(lambda vocab=vocab: Text(folder, vocab))
        seconds["tokenizer"].append(took)
        took, _ = _timed(lambda vocab=vocab: LLTokenizer(str(path), n_vocab=vocab, eos_token=ends))
        seconds["llguidance"].append(took)
        fast = text.fast_tokenizer
        took, _ = _timed(
            lambda vocab=vocab, fast=fast: Grammars(fast, vocab, ends).compile("json_schema", SCHEMA).mask()
        )
        seconds["grammar"].append(took)
    least = {name: min(runs) for name, runs in seconds.items()}
    return {
        "vocabulary": vocab,
        "file_bytes": path.stat().st_size,
        "seconds": {name: [round(run, 4) for run in runs] for name, runs in seconds.items()},
        "ratios": {
            "tokenizer": round(least["tokenizer"] / least["read"], 3),
            "grammar": round(least["grammar"] / least["llguidance"], 3),
        },
        "token_id_us": round(1e3 * _timed(lambda: [text.token_id("<bos>") for _ in range(1000)])[0], 2),
        "stream_us": round(1e3 * _timed(lambda: [text.stream(()) for _ in range(1000)])[0], 2),
    }


def measure_full(repeats: int) -> dict[str, Any]:
    """Returns `measure` of a made-up vocabulary of Gemma 4's size."""
    with tempfile.TemporaryDirectory() as folder:
        full_vocabulary.write(Path(folder))
        return measure(Path(folder), repeats)


def table(found: dict[str, Any]) -> Any:
    """Returns what `measure` found as a rich table."""
    from rich.table import Table

    size = f"{found['vocabulary']:,} tokens, {found['file_bytes'] / 1e6:.0f} MB"
    shown = Table(
        "start", "CPU ms, least", "CPU ms, most", "times", "at most", title=f"The start of a vocabulary: {size}"
    )
    names = {
        "read": "`tokenizers` reads tokenizer.json",
        "tokenizer": "Text(folder)",
        "llguidance": "llguidance's LLTokenizer",
        "grammar": "the first constrained request",
    }
    for key, name in names.items():
        runs, ratio = found["seconds"][key], found["ratios"].get(key)
        least, most = (f"{1000 * edge(runs):.0f}" for edge in (min, max))
        shown.add_row(name, least, most, *("", "") if ratio is None else (f"{ratio:.2f}", f"{MOST[key]:g}"))
    for key, name in (("token_id_us", "token_id()"), ("stream_us", "a stream of text")):
        shown.add_row(name, f"{found[key] / 1000:.3f}", "", "", "")
    return shown


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """(CPU seconds, what the call returned)"""
    begin = process_time()
    value = call()
    return process_time() - begin, value


def parser() -> argparse.ArgumentParser:
    p = Parser("benchmarks.vocabulary_start", description=__doc__.splitlines()[0])
    p.add_argument("--model", type=Path, metavar="FOLDER", help="a folder with a tokenizer (default: a made-up one)")
    p.add_argument("--repeats", type=int, default=5, help="runs of each (default: 5)")
    return p


def run(args: argparse.Namespace) -> int:
    if args.repeats < 1:
        raise UserError(f"--repeats is {args.repeats}, expected at least 1")
    from benchmarks import terminal

    found = measure(args.model, args.repeats) if args.model else measure_full(args.repeats)
    terminal.out.print(table(found))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 2 for bad input, 130 after Ctrl-C."""
    return command(run, parser, argv)


if __name__ == "__main__":
    raise SystemExit(main())

"""Token streams on disk, and batches of windows as a pure function of the step; `python -m training.data`."""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from mlx_gemma_mtp.errors import UserError
from training import corpus, tokenizer
from training.cli import command, require

MAX_LENGTH = 8192


class Data(NamedTuple):
    """Flat token streams; every document begins with <bos>."""

    train: np.ndarray  # int64 [tokens]
    held: dict[str, np.ndarray]  # "chat": pairs, "modules": whole modules


def _stream(documents: Iterable[list[int]]) -> np.ndarray:
    return np.array([token for document in documents for token in document], dtype=np.uint32)


def prepare(folder: Path, text: corpus.Corpus, tok: Tokenizer) -> None:
    """Write the tokenizer, the token streams of `text` and the held-out questions to `folder`."""

    def chats(pairs: list[corpus.Pair]) -> list[list[int]]:
        return [[tokenizer.BOS, *tokenizer.ids(tok, pair.render())] for pair in pairs]

    def sources(modules: list[corpus.Module]) -> list[list[int]]:
        texts = (f"# {module.path}\n{module.text}" for module in modules)
        return [[tokenizer.BOS, *tokenizer.ids(tok, source), tokenizer.EOS] for source in texts]

    documents = chats(text.pairs) + sources(text.modules)
    random.Random(corpus.SEED).shuffle(documents)
    tokenizer.save(tok, folder, MAX_LENGTH)
    np.save(folder / "held_chat.npy", _stream(chats(text.held_pairs)))
    np.save(folder / "held_modules.npy", _stream(sources(text.held_modules)))
    (folder / "held_prompts.json").write_text(json.dumps([pair.user for pair in text.held_pairs], indent=1))
    np.save(folder / "train.npy", _stream(documents))  # last: where it lies, the folder is whole


def load(folder: Path) -> Data:
    require(folder, "train.npy", "--data", f"make it with python -m training.data --out {shlex.quote(str(folder))}")
    names = ("chat", "modules")
    held = {name: np.load(folder / f"held_{name}.npy").astype(np.int64) for name in names}
    held = {name: stream for name, stream in held.items() if len(stream)}
    return Data(np.load(folder / "train.npy").astype(np.int64), held)


def load_tokenizer(folder: Path) -> Tokenizer:
    require(folder, "tokenizer.json", "the tokenizer's folder", "give a folder with a tokenizer")
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def windows(stream: np.ndarray, length: int, limit: int | None = None) -> np.ndarray:
    """[n, length + 1] consecutive windows, each from the last token of the one before; a shorter stream is one."""
    length = min(length, len(stream) - 1)
    count = min((len(stream) - 1) // length, limit or len(stream))
    return np.stack([stream[i * length : (i + 1) * length + 1] for i in range(count)])


def batch(stream: np.ndarray, seed: int, index: int, rows: int, length: int) -> np.ndarray:
    """[rows, length + 1]: batch number `index` of shuffled passes over `stream`. The same arguments, the same batch.

    Each pass cuts the stream at another offset. Raises UserError for a stream shorter than a window.
    """
    if len(stream) <= length:
        raise UserError(f"the text has {len(stream)} tokens, expected more than {length}; give more text")
    per_pass = max(1, ((len(stream) - 1) // length - 1) // rows)
    turn, place = divmod(index, per_pass)
    rng = np.random.default_rng([seed, length, turn])
    offset = int(rng.integers(length))
    order = rng.permutation(max(rows, (len(stream) - 1) // length - 1))
    starts = np.minimum(offset + order[place * rows : (place + 1) * rows] * length, len(stream) - length - 1)
    return np.stack([stream[start : start + length + 1] for start in starts])


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.data", description="Make the token streams of a corpus.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--text", type=Path, nargs="+", help="your own files; default: CPython's standard library")
    parser.add_argument("--tokenizer", type=Path, help="target folder whose tokenizer to use; default: train one")
    args = parser.parse_args(argv)
    text = corpus.read_files(args.text) if args.text else corpus.read()
    made = load_tokenizer(args.tokenizer) if args.tokenizer else tokenizer.train(module.text for module in text.modules)
    prepare(args.out, text, made)


if __name__ == "__main__":
    sys.exit(main())

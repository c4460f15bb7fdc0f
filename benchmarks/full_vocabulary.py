"""A tokenizer of Gemma 4's size and make, with made-up pieces.

262,144 tokens and 30 MB of JSON with indents, as Google publishes it: BPE with byte fallback, spaces as U+2581,
no post-processor, control tokens at their ids. For each piece there is a merge for every split of it into two pieces,
as conversions from SentencePiece write them. The same bytes each time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

SIZE = 262_144
SPACE = "\u2581"
CONTROL = {
    0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 4: "<mask>", 46: "<|tool>", 47: "<tool|>", 48: "<|tool_call>",
    49: "<tool_call|>", 50: "<|tool_response>", 51: "<tool_response|>", 52: '<|"|>', 98: "<|think|>",
    100: "<|channel>", 101: "<channel|>", 105: "<|turn>", 106: "<turn|>", 255_999: "<|image>", 256_000: "<|audio>",
    258_880: "<|image|>", 258_881: "<|audio|>", 258_882: "<image|>", 258_883: "<audio|>", 258_884: "<|video|>",
}  # fmt: skip
WORDS = {2364: "user", 4368: "model", 9731: "system"}
NEWLINE, BYTES, PIECES, CHARACTERS, UNUSED = 107, 238, 494, 236_743, 255_999  # where each part begins
SCRIPTS = (  # the first and the last character of some alphabets
    (0x21, 0x7E), (0xA1, 0xAC), (0xAE, 0x24F), (0x391, 0x3A1), (0x3A3, 0x3C9), (0x400, 0x4FF), (0x5D0, 0x5EA),
    (0x621, 0x64A), (0x905, 0x939), (0xE01, 0xE30), (0x3041, 0x3096), (0x30A1, 0x30FA), (0x4E00, 0x9000),
    (0xAC00, 0xD7A3),
)  # fmt: skip
SETTINGS = {
    "tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>",
    "unk_token": "<unk>", "mask_token": "<mask>", "eot_token": "<turn|>", "sot_token": "<|turn>",
    "think_token": "<|think|>", "image_token": "<|image|>", "extra_special_tokens": ["<|video|>"],
    "padding_side": "left",
}  # fmt: skip


def tokens() -> list[str]:
    """Returns the token of each id."""
    singles = list(dict.fromkeys(_characters()))
    fixed = dict(CONTROL) | {NEWLINE + count: "\n" * (count + 1) for count in range(31)}
    fixed |= {BYTES + byte: f"<0x{byte:02X}>" for byte in range(256)}
    fixed |= {CHARACTERS + at: character for at, character in enumerate(singles)}
    fixed |= WORDS
    made = _pieces(singles, set(fixed.values()))
    unused = (f"<unused{number}>" for number in range(SIZE))
    return [fixed[id] if id in fixed else next(made if PIECES <= id < UNUSED else unused) for id in range(SIZE)]


def _characters() -> Iterator[str]:
    """As many characters as there is room for, each alphabet in turn, and the space."""
    yield SPACE
    every = (chr(code) for first, last in SCRIPTS for code in range(first, last + 1))
    yield from (character for character, _ in zip(every, range(UNUSED - CHARACTERS - 1), strict=False))


def _pieces(singles: list[str], taken: set[str]) -> Iterator[str]:
    """Pieces of two to sixteen characters, each the sum of two earlier ones, the first of which are used most. Half of
    them begin with a space.
    """
    random = Random(0).random
    inner = [character for character in singles if character.islower() and character.isascii()]
    rare = [character for character in singles[1:] if not character.isdigit()]
    first = [SPACE]

    def one_of(pieces: list[str]) -> str:
        return pieces[int(len(pieces) ** random()) - 1]

    while True:
        begin = one_of(first if random() < 0.5 else inner)
        piece = begin + one_of(inner if random() < 0.98 else rare)
        if len(piece) > 16 or piece in taken:
            continue
        taken.add(piece)
        (first if piece[0] == SPACE else inner).append(piece)
        yield piece


def merges(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Returns every pair of tokens that make up a third, in the order of the third's id."""
    plain = [token for token, id in vocabulary.items() if PIECES <= id < CHARACTERS or NEWLINE < id < NEWLINE + 31]
    return [
        (token[:at], token[at:])
        for token in plain
        for at in range(1, len(token))
        if token[:at] in vocabulary and token[at:] in vocabulary
    ]


def tokenizer() -> dict[str, Any]:
    """Returns what tokenizer.json holds."""
    vocabulary = {token: id for id, token in enumerate(tokens())}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    replaced = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "content": token, **flags} for id, token in CONTROL.items()],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": {
            "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False
        },
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [replaced, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": vocabulary, "merges": merges(vocabulary),
        },
    }  # fmt: skip


def write(folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json to `folder`."""
    text = json.dumps(tokenizer(), indent=2, ensure_ascii=False)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS, indent=2) + "\n", encoding="utf-8")

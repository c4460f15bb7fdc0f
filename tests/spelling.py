"""Replies as tokens: a vocabulary of single bytes and Gemma's control tokens, and the bundled one cut anywhere."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from mlx_lm.tokenizer_utils import SPMStreamingDetokenizer

from mlx_gemma_mtp.text.encode import Text
from mlx_gemma_mtp.text.reply import Controls, Reply
from mlx_gemma_mtp.text.tools import Tools

CONTROL = ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>')
AROUND = re.compile("(" + "|".join(map(re.escape, CONTROL)) + ")")


class Bytes:
    """A tokenizer with a token for every byte, and one for each of `control`."""

    def __init__(self, control: Sequence[str] = CONTROL):
        self.names = [f"<0x{byte:02X}>" for byte in range(256)] + list(control)
        self.ids = {name: id for id, name in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self.names)

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return [self.names[id] for id in ids]

    def encode(self, reply: str) -> list[int]:
        """The ids of a reply whose control tokens are spelled out."""
        pieces = AROUND.split(reply)
        return [id for piece in pieces for id in ([self.ids[piece]] if piece in self.ids else piece.encode())]

    def reply(self, tools: Tools | None, stop: Sequence[str] = (), in_thought: bool = False) -> Reply:
        detokenizer = SPMStreamingDetokenizer(self, trim_space=False)
        return Reply(lambda: detokenizer, stop, len(self), Controls.of(self.ids), tools, in_thought)


class Split(NamedTuple):
    """What a client gets of a reply. calls: names and arguments."""

    text: str
    reasoning: str
    calls: list[tuple[str, dict]]
    stopped: bool = False


def split(reply: Reply, tokens: Sequence[int]) -> Split:
    """Everything that a reply releases of these tokens, put together."""
    pieces = []
    for token in tokens:
        pieces.append(reply.push(token))
        if reply.stopped:
            break
    pieces.append(reply.finish())
    text, reasoning = ("".join(getattr(piece, name) for piece in pieces) for name in ("text", "reasoning"))
    return Split(text, reasoning, [(c.name, c.arguments) for p in pieces for c in p.tool_calls], reply.stopped)


def cut(text: Text, reply: str, places: Sequence[int]) -> list[int]:
    """The bundled ids of a reply, encoded in pieces that end at these places, never within a control token."""
    inside = {at for mark in AROUND.finditer(reply) for at in range(mark.start() + 1, mark.end()) if mark[0][1] != '"'}
    ends = sorted({place for place in places if place < len(reply) and place not in inside} | {len(reply)})
    starts = [0, *ends[:-1]]
    pieces = [reply[start:end] for start, end in zip(starts, ends, strict=True)]
    return [id for piece in pieces for id in text.tokenizer.encode(piece, add_special_tokens=False)]

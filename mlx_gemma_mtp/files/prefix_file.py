"""One prefix as a file: its name, and its bytes, from which nothing that was damaged is taken for whole.

It is a safetensors file of: "key" (32 bytes), "tokens", the arrays of each layer ("3.0" is the first of layer 3), and
"sha256", the digest of every byte before it. The name has the key's beginning, the number of tokens and a digest of
key, salt and tokens: a salt is nowhere in plain.
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError
from .safetensors import ITEM_BYTES, header_bytes, header_of

NAME = re.compile(r"prefix-(?P<key>[0-9a-f]{16})-(?P<tokens>[1-9]\d{0,8})-(?P<digest>[0-9a-f]{32})\.safetensors")
LAYER = re.compile(r"(?P<layer>0|[1-9]\d{0,5})\.(?P<place>\d)")
DIGEST = hashlib.sha256().digest_size
PIECE = 1 << 22  # bytes that are written, and hashed, at once


class HostArray(NamedTuple):
    """An array in the host's memory. dtype: safetensors' name of it ('BF16'). data: its bytes, C-contiguous, flat."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview


Layers = Sequence[Sequence[HostArray]]  # the arrays of each layer


@dataclass(frozen=True)
class Names:
    """The names of files of one key and salt. key: a SHA-256. salt: None is another one than ''."""

    key: bytes
    salt: str | None

    def of(self, tokens: Sequence[int]) -> str:
        """Returns the name of the file of all these tokens."""
        return self.beginnings(tokens, [len(tokens)])[len(tokens)]

    def beginnings(self, tokens: Sequence[int], lengths: Iterable[int]) -> dict[int, str]:
        """Returns length -> name of the file of so many first tokens, in one pass over the tokens."""
        salt = b"" if self.salt is None else hashlib.sha256(self.salt.encode("utf-8", "surrogatepass")).digest()
        digest = hashlib.sha256(struct.pack("<B", len(salt)) + salt + self.key)
        data, done, found = packed(tokens), 0, {}
        for length in sorted(lengths):
            digest.update(data[4 * done : 4 * length])
            done = length
            found[length] = f"{self.beginning}-{length}-{digest.hexdigest()[:32]}.safetensors"
        return found

    @property
    def beginning(self) -> str:
        """What the names of all files of the key begin with."""
        return f"prefix-{self.key.hex()[:16]}"


def packed(tokens: Sequence[int]) -> memoryview:
    """Returns token ids as little-endian int32."""
    return memoryview(struct.pack(f"<{len(tokens)}i", *tokens))


@dataclass(frozen=True)
class Image:
    """All bytes of a file but for the digest at its end."""

    parts: tuple[bytes | memoryview, ...]

    @classmethod
    def of(cls, key: bytes, tokens: Sequence[int], layers: Layers) -> Image:
        """Returns the image of a prefix. key: a SHA-256."""
        arrays = {"key": HostArray("U8", (DIGEST,), key), "tokens": HostArray("I32", (len(tokens),), packed(tokens))}
        arrays |= {f"{i}.{place}": each for i, layer in enumerate(layers) for place, each in enumerate(layer)}
        for name, (dtype, shape, data) in arrays.items():
            assert memoryview(data).nbytes == math.prod(shape) * ITEM_BYTES[dtype], f"{name}: {dtype} {shape}"
        described = [(name, dtype, tuple(shape)) for name, (dtype, shape, _) in arrays.items()]
        header, _ = header_bytes([*described, ("sha256", "U8", (DIGEST,))])
        return cls((header, *(each.data for each in arrays.values())))

    @property
    def bytes(self) -> int:
        """Of the file, digest included."""
        return sum(memoryview(part).nbytes for part in self.parts) + DIGEST

    def pieces(self) -> Iterator[bytes | memoryview]:
        """Yields the file from its first to its last byte, the digest included."""
        digest = hashlib.sha256()
        for part in self.parts:
            view = memoryview(part)
            for begin in range(0, view.nbytes, PIECE):
                piece = view[begin : begin + PIECE]
                digest.update(piece)
                yield piece
        yield digest.digest()


def layers_of(path: Path, data: memoryview, key: bytes, tokens: Sequence[int]) -> Layers:
    """Returns the layers in a file's bytes, as views of these.

    Raises ValueError, with the end of a sentence, for a file that is not whole, or another one than that of this key
    and these tokens.
    """
    if len(data) <= DIGEST or hashlib.sha256(data[:-DIGEST]).digest() != data[-DIGEST:]:
        raise ValueError("is damaged")
    try:
        tensors = header_of(path, data).items()
    except UserError:  # which speaks of models
        raise ValueError("is damaged") from None
    arrays = {n: HostArray(t.dtype, t.shape, data[t.offset : t.offset + t.nbytes]) for n, t in tensors}
    if arrays.pop("key", None) != HostArray("U8", (DIGEST,), key) or arrays.pop("sha256", None) is None:
        raise ValueError("is another model's, or another version's")
    if arrays.pop("tokens", None) != HostArray("I32", (len(tokens),), packed(tokens)):
        raise ValueError("has another file's name")
    layers: list[list[HostArray]] = []
    for name, array in arrays.items():
        match = LAYER.fullmatch(name)
        if match and match["place"] == "0":
            layers.append([])
        if not match or (int(match["layer"]), int(match["place"])) != (len(layers) - 1, len(layers[-1])):
            raise ValueError(f"has a strange tensor {name!r}")
        layers[-1].append(array)
    return layers

"""Zeroes a library's GPU code of other architectures: `python trim.py LIBRARY OUT 90`. Zeros compress to nothing.

CUDA's fat binaries in a library begin with a magic number, a version, the header's size and the size of what follows:
entries of PTX (kind 1) or machine code (kind 2), each with its own header, which tells its sizes and architecture.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from pathlib import Path

HEADER = struct.Struct("<IHHQ")  # magic, version, bytes of the header, bytes of the entries
BEGIN = struct.pack("<IHH", 0xBA55ED50, 1, HEADER.size)
ENTRY = struct.Struct("<HHIQ")  # kind, version, bytes of its header, bytes of its code
ARCHITECTURE_AT = 28
CODE = 2


def trimmed(library: bytes, architecture: int) -> bytearray:
    """Returns the library, as long as before. Raises ValueError where a fat binary has no code for the architecture."""
    out, start = bytearray(library), library.find(BEGIN)
    while start >= 0:
        size = HEADER.unpack_from(library, start)[3]
        first = start + HEADER.size
        kept = b"".join(_entries(library[first : first + size], architecture))
        if not kept:
            raise ValueError(f"the fat binary at {start:#x} has no code for sm_{architecture}")
        out[first : first + size] = kept.ljust(size, b"\0")
        struct.pack_into("<Q", out, start + 8, len(kept))
        start = library.find(BEGIN, first + size)
    return out


def _entries(data: bytes, architecture: int) -> Iterator[bytes]:
    """Yields the entries of machine code for an architecture."""
    at = 0
    while at < len(data):
        kind, _, head, body = ENTRY.unpack_from(data, at)
        if head < ARCHITECTURE_AT + 4 or at + head + body > len(data):
            raise ValueError(f"no entry of a fat binary at byte {at} of {len(data)}")
        if kind == CODE and struct.unpack_from("<I", data, at + ARCHITECTURE_AT)[0] == architecture:
            yield data[at : at + head + body]
        at += head + body


if __name__ == "__main__":
    source, target, architecture = sys.argv[1:]
    Path(target).write_bytes(trimmed(Path(source).read_bytes(), int(architecture)))

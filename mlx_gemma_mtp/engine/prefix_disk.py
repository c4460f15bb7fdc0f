"""Prefixes on disk, from the engine's side: what is kept goes there, what a caller's prompt begins with is read.

K/V leave the device in the worker's thread, as copies in the host's memory; a caller's thread reads a file into the
host's memory, and the worker makes arrays of it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakValueDictionary

import mlx.core as mx
import numpy as np

from .._version import __version__
from ..cache.saved import Saved
from ..cache.spec import KVSpec
from ..files.folder import fingerprint
from ..files.prefix_file import packed
from ..files.prefix_store import HostArray, Layers, PrefixStore
from ..machine import blas, device
from ..models.gemma4 import Gemma4
from ..models.linear import measured_rules
from ..models.loading import format_of
from ..ops import kernels
from .prefix import Prefixes
from .settings import Settings

FORMAT = 1  # of what the arrays of a layer mean
MOST_READ = 1_000_000_000  # bytes that were read for requests that wait; a single entry may be larger
DTYPES = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32, "U8": mx.uint8, "U32": mx.uint32}  # of K/V
NAMES = {dtype: name for name, dtype in DTYPES.items()}
POSITIONS = 2  # the axis of an array
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32}  # by the bytes of a number: NumPy has no bfloat16


@dataclass(frozen=True, eq=False)
class Restored:
    """K/V of the first `tokens` tokens of a prompt, in the host's memory."""

    tokens: int
    layers: Layers
    _made: WeakValueDictionary[None, Saved] = field(default_factory=WeakValueDictionary, init=False, repr=False)

    @property
    def bytes(self) -> int:
        return sum(memoryview(array.data).nbytes for layer in self.layers for array in layer)

    def saved(self) -> Saved:
        """Returns the K/V as arrays of their own, evaluated: the same ones while anybody holds them, since several
        requests may begin with them at once. Called in the worker's thread.
        """
        if (saved := self._made.get(None)) is None:
            layers = tuple(tuple(map(_array, layer)) for layer in self.layers)
            mx.eval(layers)
            saved = self._made[None] = Saved(self.tokens, layers)
        return saved


@dataclass(frozen=True)
class Shapes:
    """What the K/V of one engine look like. kinds: for each layer the dtype's name and the shape of each of its arrays,
    without the axis of positions. least: for each layer how many positions a sequence holds at least, None for all.
    """

    kinds: tuple[tuple[tuple[str, tuple[int, ...]], ...], ...]
    least: tuple[int | None, ...]

    @classmethod
    def of(cls, specs: Sequence[KVSpec], dtype: mx.Dtype, lookback: int) -> Shapes:
        """Returns those of caches made with these arguments."""
        least = tuple(None if spec.window is None else spec.window - 1 + lookback for spec in specs)
        return cls(
            tuple(tuple(map(_kind, map(_described, layer))) for layer in Saved.empty(specs, dtype).layers), least
        )

    def fit(self, tokens: int, layers: Layers) -> bool:
        """Returns whether layers can be the K/V of so many tokens."""
        if tuple(tuple(map(_kind, layer)) for layer in layers) != self.kinds:
            return False
        held = [{array.shape[POSITIONS] for array in layer} for layer in layers]
        least = [tokens if few is None else min(tokens, few) for few in self.least]
        return all(len(each) == 1 and few <= max(each) <= tokens for each, few in zip(held, least, strict=True))


def _kind(array: HostArray) -> tuple[str, tuple[int, ...]]:
    return array.dtype, (*array.shape[:POSITIONS], *array.shape[POSITIONS + 1 :])


class PrefixDisk:
    """The prefixes of one engine on disk. store: the folder."""

    def __init__(self, store: PrefixStore):
        self.store = store
        self._known: Callable[[Sequence[int], str | None], int] = lambda tokens, salt: 0
        self._reading = threading.Lock()  # one reads, and others with the same beginning take what it read
        self._read: WeakValueDictionary[tuple[bytes, str | None], Restored] = WeakValueDictionary()

    @classmethod
    def of_model(
        cls, model: Path, target: Gemma4, settings: Settings, notice: Callable[[str], None]
    ) -> PrefixDisk | None:
        """Returns those of a target that was loaded from the folder `model`, None where the settings name no folder for
        them. Raises UserError for what cannot be one.
        """
        if settings.prefix_cache is None:
            return None
        shapes = Shapes.of(settings.specs(target.config), target.dtype, settings.drafting.lookback)
        key = _key(model, target, settings)
        return cls(PrefixStore(settings.prefix_cache, key, settings.prefix_cache_limit, notice=notice, fits=shapes.fit))

    def join(self, prefixes: Prefixes) -> None:
        """Lets K/V in memory go before those on disk: what is kept there is written, what is known there is not read.
        Called in the worker's thread.
        """
        self._known, prefixes.on_keep = prefixes.known, self.keep

    # What any thread may ask.

    def read(self, tokens: Sequence[int], salt: str | None = None) -> Restored | None:
        """Returns the longest beginning of a prompt, but for its last token, of which a file holds K/V. None where
        memory holds as many, and where requests that wait hold much that was read already. Requests with the same
        beginning share it.
        """
        known = self._known(tokens, salt)
        tokens = tokens[:-1]  # at least one is computed
        if self.store.longest(tokens, salt) <= known:
            return None
        with self._reading:
            length = self.store.longest(tokens, salt)
            name = (bytes(packed(tokens[:length])), salt)
            if (found := self._read.get(name)) is not None:
                return found
            if sum(each.bytes for each in self._read.values()) >= MOST_READ:
                return None
            if (entry := self.store.read(tokens, salt)) is None or entry[0] <= known:
                return None
            restored = self._read[bytes(packed(tokens[: entry[0]])), salt] = Restored(*entry)
            return restored

    def close(self) -> None:
        """Writes what still waits, for some seconds at most."""
        self.store.close()

    # What the worker's thread tells.

    def keep(self, tokens: Sequence[int], saved: Saved, salt: str | None) -> None:
        """Has K/V written that were kept in memory, where they are not on disk already."""
        if self.store.wants(tokens, salt, saved.bytes):
            self.store.put(tokens, salt, [[_host(array) for array in layer] for layer in saved.layers])


def _key(model: Path, target: Gemma4, settings: Settings) -> str:
    """All that the bits of K/V depend on besides the tokens."""
    computed = {
        "format": FORMAT,
        "versions": {"mlx": mx.__version__, "mlx_gemma_mtp": __version__},
        "weights": [fingerprint(model), format_of(target), str(target.dtype)],
        "kv": [str(spec) for spec in settings.specs(target.config)],
        "grid": [settings.prefill_chunk, settings.drafting.lookback],
        "device": [device.kind(), device.name(), blas.name()],
        "kernels": [kernels.status(), measured_rules(target)],
        "row_invariant": settings.row_invariant,
    }
    return json.dumps(computed, sort_keys=True, default=str)


def _described(array: mx.array) -> HostArray:
    return HostArray(NAMES[array.dtype], array.shape, b"")


def _host(array: mx.array) -> HostArray:
    """A copy of an evaluated array."""
    return _described(array)._replace(data=memoryview(array).tobytes())


def _array(array: HostArray) -> mx.array:
    dtype = DTYPES[array.dtype]
    return mx.array(np.frombuffer(array.data, BITS[dtype.size]).reshape(array.shape)).view(dtype)

"""A model in float32, a layer at a time: weights are read when a layer is computed and dropped after it.

Both sides of a comparison run here, the source as published and the folder that was made of it: in the same order of
the same operations, so that what differs are the weights alone.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_gemma_mtp.cache.spec import KVSpec
from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.models.config import DrafterConfig, TargetConfig
from mlx_gemma_mtp.models.drafter import Drafter
from mlx_gemma_mtp.models.gemma4 import Block, build
from mlx_gemma_mtp.models.linear import finish_loading
from mlx_gemma_mtp.models.loading import file_path
from mlx_gemma_mtp.models.quantization import plain

from . import blocks
from .checkpoint import Checkpoint
from .names import Entry, is_integer
from .writer import parts

TABLE = "embed_tokens.weight"
CHILDREN = ("norm", "per_layer_model_projection", "per_layer_projection_norm", "pre_projection", "post_projection")


class Weights:
    """The tensors of a checkpoint by plain name, as float32 values.

    norms: of every tensor that was read whole so far, the root of its sum of squares.
    """

    def __init__(self, model: Checkpoint):
        """Raises UserError for a source that is not complete."""
        self.model = model
        written = [replace(e, source=e.name, source_shape=e.shape, rows=None) for e in model.entries]
        found = written if model.config.quantization else model.sources()
        self.entries = {plain(entry.name): entry for entry in found}
        self.norms: dict[str, float] = {}

    def read(self, name: str) -> mx.array:
        """Returns a whole tensor."""
        entry = self.entries[name]
        array = mx.concatenate(list(self.blocks(name)), axis=0).reshape(entry.shape)
        if not is_integer(name):
            self.norms[name] = mx.sqrt(mx.square(array).sum()).item()
        return array

    def blocks(self, name: str) -> Iterator[mx.array]:
        """Yields the rows of a tensor in order, [rows, columns], a few megabytes at a time."""
        entry = self.entries[name]
        step = max(1, blocks.BLOCK_BYTES // (4 * entry.shape[-1]))
        ranges = [(0, blocks.row_count(entry.shape))] if self._stored(entry) else blocks.row_ranges(entry)
        for first, last in ranges:
            for start in range(first, last, step):
                yield self._rows(entry, start, min(start + step, last))

    def rows(self, name: str, ids: mx.array) -> mx.array:
        """Returns rows of a table; only these are read. ids: [N] -> [N, columns]."""
        entry, numbers = self.entries[name], np.array(ids)
        unique, places = np.unique(numbers, return_inverse=True)
        table = mx.concatenate([self._rows(entry, int(row), int(row) + 1) for row in unique], axis=0)
        return table[mx.array(places.reshape(numbers.shape))]

    def _stored(self, entry: Entry) -> list[str]:
        """Names of the parts of a quantised tensor; none where it is stored as floats."""
        form = self.model.format(entry)
        return [name for name, _, _ in parts(entry, "BF16", form)] if form else []

    def _rows(self, entry: Entry, start: int, stop: int) -> mx.array:
        if stored := self._stored(entry):
            arrays = [blocks.read(self.model.tensors[name], start, stop) for name in stored]
            return self.model.format(entry).dequantize(*arrays)
        block = blocks.read(self.model.tensors[entry.source], start, stop)
        return block.astype(mx.int32 if is_integer(entry.name) else mx.float32)


class Table:
    """A table of embeddings that stays in its file."""

    def __init__(self, weights: Weights, name: str):
        self.weights, self.name = weights, name

    def __call__(self, tokens: mx.array) -> mx.array:
        """Returns the rows of tokens: [...] -> [..., columns]."""
        return self.weights.rows(self.name, tokens.reshape(-1)).reshape(*tokens.shape, -1)


class Whole:
    """Texts of one length that are computed at once, each from its beginning: what a span of the cache is elsewhere.

    ahead: how many tokens a query stands before the keys that are there: 0 where each token writes its own, 1 for a
    drafter, whose query at token t reads the keys before t.
    """

    is_prefill = True

    def __init__(self, rows: int, tokens: int, specs: tuple[KVSpec, ...], ahead: int = 0):
        self.specs, self.ahead = specs, ahead
        self.positions = mx.broadcast_to(mx.arange(ahead, ahead + tokens)[None], (rows, tokens))
        self.kept: dict[int, tuple[mx.array, mx.array]] = {}

    def write(self, layer: int, keys: mx.array, values: mx.array) -> None:
        self.kept[layer] = keys, values

    def attend(self, layer: int, queries: mx.array) -> mx.array:
        """Returns what the queries attend to, [B, heads, T, head_dim]."""
        keys, values = self.kept[layer]
        query = mx.arange(queries.shape[2])[:, None] + self.ahead
        key = mx.arange(keys.shape[2])[None]
        seen = key <= query - self.ahead
        window = self.specs[layer].window
        if window is not None:
            seen = seen & (query - key < window)
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=1.0, mask=seen)


class Layered:
    """A target or a drafter whose layers are filled one after the other."""

    def __init__(self, model: Checkpoint, config: TargetConfig | DrafterConfig):
        self.config, self.weights = config, Weights(model)
        self.model = Drafter(config) if isinstance(config, DrafterConfig) else build(config)
        self.model.embed_tokens = Table(self.weights, TABLE)
        if "embed_tokens_per_layer.weight" in self.weights.entries:
            self.model.embed_tokens_per_layer = Table(self.weights, "embed_tokens_per_layer.weight")
        for name in CHILDREN:
            if name in self.model:
                self._fill(self.model[name], f"{name}.")

    def layer(self, index: int) -> Block:
        """Returns a layer with its weights. It is not kept here: call it once."""
        layer, self.model.layers[index] = self.model.layers[index], None
        self._fill(layer, f"layers.{index}.")
        return layer

    def _fill(self, part: nn.Module, prefix: str) -> None:
        paths = [path for path, _ in tree_flatten(part.parameters())]
        part.load_weights([(path, self.weights.read(prefix + file_path(path))) for path in paths])
        finish_loading(part)

    def table(self) -> Iterator[mx.array]:
        """Yields the rows of the vocabulary's table, which is the head, in blocks [rows, hidden]."""
        return self.weights.blocks(TABLE)

    def capped(self, logits: mx.array) -> mx.array:
        """Returns logits as they count: the target's with its soft-cap."""
        cap = self.config.softcap
        return logits if cap is None else cap * mx.tanh(logits / cap)

    @cached_property
    def forms(self) -> list[tuple[str, ...]]:
        """What layers are made of, one a layer: its kind, and the formats of its tensors."""
        made = []
        for index, spec in enumerate(self.config.layers):
            mine = [e for name, e in self.weights.entries.items() if name.startswith(f"layers.{index}.")]
            made.append((spec.kind, *(str(self.weights.model.format(entry)) for entry in mine)))
        return made


def opened(model: Checkpoint) -> Layered:
    """Returns a target of which no layer is read yet. Raises UserError for a drafter."""
    if model.drafter:
        raise UserError(f"{model.where} is a drafter; expected a target; give its target, and it as --draft-model")
    return Layered(model, model.config)


def opened_drafter(model: Checkpoint, target: TargetConfig) -> Layered:
    """Returns the drafter of a target. Raises UserError where it is none, or another target's."""
    if not model.drafter:
        raise UserError(f"{model.where} is a target; expected an MTP drafter as --draft-model")
    return Layered(model, DrafterConfig.from_dict(model.raw, target))

"""What a forward holds beside weights and K/V: upper bounds in bytes, from a target's config alone.

MLX frees an array once nothing reads it, so that a forward holds what lives through all its layers and the work of one
layer. Metal has no fused attention for heads of 512, and a CPU has none at all: there the scores of all heads, tokens
and slots stand in memory, which for a long text is more than all else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..cache.spec import KVSpec, capacity, ring_slots
from ..machine.device import Traits
from ..ops import lanes
from ..ops.attention import queries_at_once
from .config import LayerSpec, TargetConfig

FUSED = (64, 80, 128)  # widths of heads that MLX's fused attention on Metal takes for more tokens than a verify's
FLOAT32 = 4
BLOCK_STEPS = 6  # the mask, the scores, and what ops/exponentials.py makes of them


@dataclass(frozen=True)
class Transients:
    """The bytes of forwards of one target.

    specs: of its K/V, one for each layer that owns some, in the bits that they are kept in. item_size: bytes of a
    number of the dtype that it computes in. block: prompt tokens of the longest chunk, which says how many slots a ring
    has. traits: of the device.
    """

    config: TargetConfig
    specs: tuple[KVSpec, ...]
    item_size: int
    block: int
    traits: Traits

    def chunk(self, tokens: int, context: int) -> int:
        """Returns the most bytes of a forward over `tokens` prompt tokens, whose longest prompt has `context` tokens.

        Behind the last layer that owns K/V one token of each prompt goes on, which is counted as one here.
        """
        last = len(self.config.kv) - 1
        whole, rest = self.config.layers[:last], self.config.layers[last:]
        projected = self._projected(rest[0], tokens)
        blocks = not self.traits.fused_attention
        return _ahead(
            self._through(whole, tokens, context, blocks=blocks) + projected + self._through(rest, 1, context)
        )

    def verify(self, rows: int, width: int, context: int) -> int:
        """Returns the most bytes of a verify of `rows` rows of `width` tokens each, its logits and draws included.
        context: tokens of the longest row.
        """
        tokens, room = rows * width, context + 2 * width  # a row has room for the verify after this one
        return _ahead(self._through(self.config.layers, tokens, room, rows) + self.logits(tokens))

    def logits(self, tokens: int) -> int:
        """Returns the bytes of the logits of so many tokens, [tokens, vocabulary] in float32, as the model's dtype
        brings them, and with scores and probabilities beside.
        """
        return tokens * self.config.vocab_size * (self.item_size + 3 * FLOAT32)

    def _through(
        self, layers: tuple[LayerSpec, ...], tokens: int, context: int, rows: int = 1, blocks: bool = False
    ) -> int:
        """Returns what `tokens` tokens of so many rows take on their way through these layers. blocks: their queries
        are attended to block by block.
        """
        kinds = {(layer.kv, layer.heads): layer for layer in layers}.values()
        kept = self._stream(tokens) + sum(self._tables(layer, tokens, context, blocks) for layer in kinds)
        work = [
            max(self._attention(layer, tokens, context, rows, blocks), self._feedforward(layer, tokens))
            for layer in layers
        ]
        return kept + max(work, default=0)

    def _stream(self, tokens: int) -> int:
        """Returns the residual stream with what a norm and a sum make of it, and the per-layer inputs of all layers:
        looked up, projected and mixed.
        """
        per_layer = 3 * len(self.config.layers) * self.config.per_layer_size
        return tokens * (4 * self.config.hidden_size + per_layer) * self.item_size

    def _tables(self, layer: LayerSpec, tokens: int, context: int, blocks: bool) -> int:
        """Returns what all layers of a kind share: cosines and sines, and the mask: a bool for each slot, where nothing
        is fused one number for each head, too. The masks of blocks are counted with their scores.
        """
        seen = 0 if blocks else tokens * self._slots(layer, context)
        if self.traits.fused_attention:
            return seen
        return seen * (1 + FLOAT32 * (1 + layer.heads)) + 2 * tokens * layer.kv.head_dim * FLOAT32

    def _attention(self, layer: LayerSpec, tokens: int, context: int, rows: int, blocks: bool) -> int:
        """Returns queries, keys and values, the scores, what the heads bring, and copies of what is read packed."""
        brought = 3 * tokens * layer.heads * layer.kv.head_dim * self.item_size
        copied = rows * self._copied(layer, context)
        return self._projected(layer, tokens) + self._scores(layer, tokens, context, blocks) + brought + copied

    def _projected(self, layer: LayerSpec, tokens: int) -> int:
        """Returns queries, keys and values: projected, normed, with their halves swapped, turned, and the slots that
        they are written to.
        """
        heads = layer.heads + 2 * layer.kv.kv_heads
        return 5 * tokens * heads * layer.kv.head_dim * self.item_size

    def _scores(self, layer: LayerSpec, tokens: int, context: int, blocks: bool) -> int:
        """Returns the scores [heads, tokens, slots] and their softmax; of a block what its steps hold, too; nothing
        where attention is fused.
        """
        if self.traits.fused_attention and layer.kv.head_dim in FUSED and self.specs[layer.kv_layer].bits is None:
            return 0
        size = self.item_size if self.traits.float32_sums else FLOAT32
        if blocks:
            slots, window = self._slots(layer, context), layer.kv.window
            queries = min(tokens, queries_at_once(layer.heads, slots, window))
            slots = min(slots, window + queries) if window else slots
            blocks_held = min(
                -(-tokens // queries), 2 * lanes.number()
            )  # of a lane the next one is there before its turn
            return blocks_held * BLOCK_STEPS * layer.heads * queries * slots * size
        return 2 * layer.heads * tokens * self._slots(layer, context) * size

    def _copied(self, layer: LayerSpec, context: int) -> int:
        """Returns what a row's packed K/V take once more: dequantised, or contiguous for a CPU's products with them."""
        spec = self.specs[layer.kv_layer]
        if spec.bits is not None and not self.traits.packed_batches:
            return self._slots(layer, context) * replace(spec, bits=None).slot_bytes(self.item_size)
        if self.traits.reads_packed or spec.bits is None:
            return 0
        return self._slots(layer, context) * spec.slot_bytes(self.item_size)

    def _feedforward(self, layer: LayerSpec, tokens: int) -> int:
        """Returns gate, up and their product, in the MLP and in each chosen expert, and what the experts bring before
        it is summed.
        """
        dense = 3 * layer.mlp_size + 2 * self.config.hidden_size
        moe = self.config.moe
        chosen = moe.top_k * (3 * moe.size + 3 * self.config.hidden_size) if moe else 0
        return tokens * (dense + chosen) * self.item_size

    def _slots(self, layer: LayerSpec, context: int) -> int:
        """Returns how many slots a layer's queries are given."""
        window = layer.kv.window
        slots = ring_slots(window, self.block) if window else capacity(context)
        return slots if self.traits.splits_by_slots else min(slots, -(-context // 16) * 16)


def _ahead(held: int) -> int:
    """Returns the bytes with those of operations that MLX has dispatched before their turn: half as much again."""
    return held + held // 2

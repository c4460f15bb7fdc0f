"""The Gemma 4 text model: tokens -> hidden states; logits are a second call.

Reference: transformers, models/gemma4/modeling_gemma4.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from ..cache.cache import Span
from ..cache.packed import LastTokens, PackedSpan
from ..ops import lanes
from ..ops.elementwise import geglu
from ..ops.fused import number
from .config import LayerSpec, MoESpec, TargetConfig
from .layers import MLP, Attention, RMSNorm, rms_norm, rooted, rotation
from .linear import DerivedWeights, Embedding, Linear
from .moe import Experts, Router


class Block(DerivedWeights):
    """A decoder layer with a dense MLP; also every layer of the drafter.

    What comes before and after the look into the cache are two pure functions, `pre_attention` and `post_attention`. In
    rounds, whose few shapes come again and again, they run as compiled graphs, which spares Python most of its work.
    """

    def __init__(self, spec: LayerSpec, hidden_size: int, eps: float):
        super().__init__()
        self.kind, self.kv_layer = spec.kind, spec.kv_layer
        self.input_layernorm = RMSNorm(hidden_size, eps)
        self.self_attn = Attention(spec, hidden_size, eps)
        self.post_attention_layernorm = RMSNorm(hidden_size, eps)
        self.pre_feedforward_layernorm = RMSNorm(hidden_size, eps)
        self.mlp = MLP(hidden_size, spec.mlp_size)
        self.post_feedforward_layernorm = RMSNorm(hidden_size, eps)
        self.layer_scalar = mx.ones((1,))

    def derive(self) -> None:
        """Compiles the two functions, with the weights as inputs. They are traced at the first call with a shape.

        The constant takes the weights' type: a float32 one would make float32 of everything after it.
        """
        self._one = mx.ones((1,), self.input_layernorm.weight.dtype)
        self._pre_attention = mx.compile(self.pre_attention, inputs=[self.input_layernorm, self.self_attn])
        self._post_attention = mx.compile(self.post_attention, inputs=self)

    def __call__(
        self,
        x: mx.array,
        span: Span | PackedSpan | LastTokens,
        tables: tuple[mx.array, ...],
        inputs: tuple[mx.array, ...] = (),
        last: LastTokens | None = None,
    ) -> mx.array:
        """Returns the residual stream after this layer. x: [N, hidden], the tokens of the span -> [N, hidden].

        tables: from `Ropes.tables`, of the layer's kind. inputs: the per-layer input [N, per_layer_size], where the
        model has one. last: a view of the last token of each piece of a prefill; then all tokens write K/V, and only
        these go on, [B, hidden].
        """
        eager = span.is_prefill  # a prompt's shape hardly comes again: compiling for it would not pay
        queries, *new = (self.pre_attention if eager else self._pre_attention)(x, tables)
        if new:
            span.write(self.kv_layer, *new)
        if last is not None:
            span, (x, queries, *inputs) = last, last.of((x, queries, *inputs))
        attended = span.attend(self.kv_layer, queries)
        if eager:
            return self.post_attention(x, attended, *inputs, beside=x.shape[0] >= lanes.FEWEST)
        return self._post_attention(x, attended, *inputs)

    def pre_attention(self, x: mx.array, tables: tuple[mx.array, ...]) -> tuple[mx.array, ...]:
        """Returns the queries, and where the layer owns them keys and values, each [B, heads, T, head_dim]. x: [N,
        hidden].
        """
        return self.self_attn.project(self.input_layernorm(x), tables)

    def post_attention(self, x: mx.array, attended: mx.array, *inputs: mx.array, beside: bool = False) -> mx.array:
        """Returns the residual stream of the next layer, [N, hidden].

        x: [N, hidden]; attended: [B, heads, T, head_dim], what attention brought; inputs: the per-layer input, where
        the model has one. beside: what can be is computed side by side.
        """
        x = self.post_attention_layernorm.add(x, self.self_attn.join(attended), self._one)
        return self.finish(x, self.feedforward(x, beside), *inputs)

    def feedforward(self, x: mx.array, beside: bool) -> mx.array:
        """Returns what the MLP adds to the residual stream, before its norm. x: [N, hidden]."""
        return self.mlp(self.pre_feedforward_layernorm(x))

    def finish(self, x: mx.array, fed: mx.array) -> mx.array:
        """Returns the residual stream with the feed-forward's output, scaled as the layer is. x, fed: [N, hidden]."""
        return self.post_feedforward_layernorm.add(x, fed, self.layer_scalar)


class MoEBlock(Block):
    """A layer whose feed-forward is the dense MLP plus the chosen experts (26B-A4B)."""

    def __init__(self, spec: LayerSpec, hidden_size: int, eps: float, moe: MoESpec):
        super().__init__(spec, hidden_size, eps)
        self.eps = eps
        self.router = Router(hidden_size, moe)
        self.experts = Experts(hidden_size, moe)
        self.pre_feedforward_layernorm_2 = RMSNorm(hidden_size, eps)
        self.post_feedforward_layernorm_1 = RMSNorm(hidden_size, eps)
        self.post_feedforward_layernorm_2 = RMSNorm(hidden_size, eps)

    def derive(self) -> None:
        """Derives what every layer does, and one array of the weights of the three norms that read the residual stream:
        of the MLP, of the experts, of the router.
        """
        super().derive()
        weights = (self.pre_feedforward_layernorm, self.pre_feedforward_layernorm_2)
        stacked = mx.stack([*(norm.weight for norm in weights), self.router.norm_weight])
        self._norms = rooted(stacked)[:, None]  # [3, 1, hidden]
        self._size_eps = number(stacked.shape[-1] * self.eps)

    def feedforward(self, x: mx.array, beside: bool) -> mx.array:
        normed = rms_norm(x, self.eps, self._size_eps, self._norms)  # [3, N, hidden], each with its own weight
        to_mlp, to_experts, to_router = mx.split(normed.reshape(-1, x.shape[-1]), 3, axis=0)
        with lanes.lane(beside):
            dense = self.post_feedforward_layernorm_1(self.mlp(to_mlp))
        chosen = self.experts(to_experts, *self.router(to_router))
        return self.post_feedforward_layernorm_2.add(dense, chosen, self._one)


class PerLayerBlock(Block):
    """A layer that also mixes in its own slice of the per-layer inputs (E2B, E4B)."""

    def __init__(self, spec: LayerSpec, hidden_size: int, eps: float, per_layer_size: int):
        super().__init__(spec, hidden_size, eps)
        self.per_layer_input_gate = Linear(hidden_size, per_layer_size)
        self.per_layer_projection = Linear(per_layer_size, hidden_size)
        self.post_per_layer_input_norm = RMSNorm(hidden_size, eps)

    def finish(self, x: mx.array, fed: mx.array, per_layer_input: mx.array) -> mx.array:
        x = self.post_feedforward_layernorm.add(x, fed, self._one)
        gated = geglu(self.per_layer_input_gate(x), per_layer_input)
        return self.post_per_layer_input_norm.add(x, self.per_layer_projection(gated), self.layer_scalar)


class Gemma4(nn.Module):
    """A Gemma 4 target. Make it with `build`; parameters carry the checkpoint's names below `language_model.model.`"""

    def __init__(self, config: TargetConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = [self.block(layer) for layer in config.layers]
        self.norm = RMSNorm(config.hidden_size, config.eps)
        self.embed_scale = config.hidden_size**0.5
        self.ropes = Ropes(config.layers)
        self.writers = 1 + max(i for i, layer in enumerate(config.layers) if layer.owns_kv)  # the others only read

    def block(self, spec: LayerSpec) -> Block:
        """Returns a layer of the kind that the config asks for, with random weights."""
        config = self.config
        if config.moe is not None:
            return MoEBlock(spec, config.hidden_size, config.eps, config.moe)
        return Block(spec, config.hidden_size, config.eps)

    def embed(self, tokens: mx.array) -> mx.array:
        """Returns the tokens' embeddings times sqrt(hidden), rounded to the weights' type: [...] -> [..., hidden]."""
        return self.embed_tokens(tokens).astype(self.dtype) * self.embed_scale

    @property
    def dtype(self) -> mx.Dtype:
        """The type that is computed in. (A table in MLX's FP4 and FP8 modes gives bf16, whatever this is.)"""
        return self.norm.weight.dtype

    def __call__(self, tokens: mx.array, span: Span) -> mx.array:
        """Writes K/V and returns the hidden states after the last norm, [B, T, hidden]. tokens: [B, T], T ==
        span.tokens.
        """
        x, steps = self._begin(tokens.reshape(-1))  # products of two axes are fewer primitives
        return self.norm(self._through(steps, x, span)).reshape(*tokens.shape, -1)

    def prefill(self, tokens: mx.array, span: PackedSpan, at_once: bool = False) -> mx.array:
        """Writes K/V of pieces of prompts and returns the hidden states of each piece's last token, [B, hidden].
        tokens: [N], packed. at_once: the device begins while the rest is built, a layer after the other.

        No other token goes on once the last layer that owns K/V has written them: that is the last layer, but in E2B it
        comes before the middle.
        """
        x, steps = self._begin(tokens)
        writing, last = self.writers - 1, LastTokens(span)
        x = self._through(steps[:writing], x, span, at_once=at_once)
        x = self._through(steps[writing : writing + 1], x, span, last, at_once)
        rest = [(layer, last.of(inputs)) for layer, inputs in steps[writing + 1 :]]
        return self.norm(self._through(rest, x, last, at_once=at_once))

    def _begin(self, tokens: mx.array) -> tuple[mx.array, list[tuple[Block, tuple[mx.array, ...]]]]:
        """Returns the embeddings of tokens [N], [N, hidden], and the layers, each with its per-layer inputs."""
        x = self.embed(tokens)
        return x, list(zip(self.layers, self.per_layer_inputs(tokens, x), strict=True))

    def _through(
        self,
        steps: Sequence[tuple[Block, tuple[mx.array, ...]]],
        x: mx.array,
        span: Span | PackedSpan | LastTokens,
        last: LastTokens | None = None,
        at_once: bool = False,
    ) -> mx.array:
        """Returns x [N, hidden] after these layers, each with its per-layer inputs. at_once: each is dispatched."""
        tables = self.ropes.tables(span.positions)
        for layer, inputs in steps:
            x = layer(x, span, tables[layer.kind], inputs, last)
            if at_once:
                mx.async_eval(x)
        return x

    def logits(self, hidden: mx.array) -> mx.array:
        """Returns float32 logits before the soft-cap: [..., hidden] -> [..., vocabulary]."""
        return self.embed_tokens.as_linear(hidden).astype(mx.float32)

    def per_layer_inputs(self, tokens: mx.array, embedded: mx.array) -> Sequence[tuple[mx.array, ...]]:
        """Returns for each layer what its `post_attention` takes besides x: here nothing. tokens: [N]; embedded: [N,
        hidden].
        """
        return [()] * len(self.layers)

    def step_shares(self) -> dict[str, float]:
        """Returns parts of parameters' paths, and the share of these that a step of one token reads; all others are
        read whole. (The embedding is the head, too.)
        """
        moe = self.config.moe
        return {"switch_glu.": moe.top_k / moe.num_experts} if moe else {}


class PerLayerGemma4(Gemma4):
    """E2B and E4B: each layer gets its own small embedding of the token, mixed with a projection of the embedding."""

    def __init__(self, config: TargetConfig):
        super().__init__(config)
        count, size = len(config.layers), config.per_layer_size
        self.embed_tokens_per_layer = Embedding(config.per_layer_vocab, count * size)
        self.per_layer_model_projection = Linear(config.hidden_size, count * size)
        self.per_layer_projection_norm = RMSNorm(size, config.eps)

    def block(self, spec: LayerSpec) -> Block:
        return PerLayerBlock(spec, self.config.hidden_size, self.config.eps, self.config.per_layer_size)

    def per_layer_inputs(self, tokens: mx.array, embedded: mx.array) -> Sequence[tuple[mx.array, ...]]:
        config = self.config
        shape = (*tokens.shape, len(self.layers), config.per_layer_size)
        looked_up = self.embed_tokens_per_layer(tokens).astype(self.dtype) * config.per_layer_size**0.5
        projected = self.per_layer_model_projection(embedded) * config.hidden_size**-0.5
        mixed = (self.per_layer_projection_norm(projected.reshape(shape)) + looked_up.reshape(shape)) * 2**-0.5
        return [(mixed[:, i],) for i in range(len(self.layers))]

    def step_shares(self) -> dict[str, float]:
        return {"embed_tokens_per_layer.": 1 / self.config.per_layer_vocab}


class Ropes:
    """The rotary embeddings of a model, one for each kind of layer."""

    def __init__(self, layers: Sequence[LayerSpec]):
        self.ropes = {layer.kind: rotation(layer.rope) for layer in layers}

    def tables(self, positions: mx.array) -> dict[str, tuple[mx.array, ...]]:
        """Returns for each kind of layer what its rotation needs of the positions, [B, T]."""
        return {kind: rope.tables(positions) for kind, rope in self.ropes.items()}


def build(config: TargetConfig) -> Gemma4:
    """Returns the model of a config, with random weights."""
    return PerLayerGemma4(config) if config.per_layer_size else Gemma4(config)

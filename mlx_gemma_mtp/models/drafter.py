"""Google's MTP drafter: a small stack that owns only queries and reads the target's K/V.

A stateless call: embedding of the newest token and the hidden state that predicted it go in, the next token's scores
and a hidden state to carry on with come out. Reference: transformers, models/gemma4_assistant.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..cache.cache import Span
from .config import DrafterConfig
from .gemma4 import Block, Ropes
from .layers import RMSNorm
from .linear import Embedding, Linear


class CentroidHead(nn.Module):
    """The head of the E2B/E4B drafters: score the centroids, then only the tokens of the best ones."""

    def __init__(self, config: DrafterConfig):
        super().__init__()
        self.top_k = config.centroid_top_k
        self.centroids = Linear(config.hidden_size, config.centroids)
        self.token_ordering = mx.arange(config.vocab_size, dtype=mx.int32)
        self.freeze(keys=["token_ordering"])

    def __call__(self, y: mx.array, embedding: nn.Module) -> tuple[mx.array, mx.array]:
        """Returns the logits of the best centroids' tokens, float32 [B, C], and their ids, int32 [B, C].

        y: [B, hidden]; embedding: the vocabulary's.
        """
        scores = self.centroids(y)
        best = mx.argpartition(scores, kth=-self.top_k, axis=-1)[:, -self.top_k :]
        tokens = self.token_ordering.reshape(scores.shape[-1], -1)[best]  # [B, top_k, V / centroids]
        tokens = tokens.reshape(y.shape[0], -1)
        logits = (embedding(tokens).astype(y.dtype) @ y[..., None])[..., 0]
        return logits.astype(mx.float32), tokens


class DenseHead(nn.Module):
    """The tied head over the whole vocabulary. Drafters have no soft-cap."""

    def __call__(self, y: mx.array, embedding: nn.Module) -> tuple[mx.array, None]:
        """Returns the logits of all tokens, float32 [B, V], and None for their ids. y: [B, hidden]."""
        return embedding.as_linear(y).astype(mx.float32), None


class Drafter(nn.Module):
    """Google's MTP drafter of a target. Parameters carry the checkpoint's names; embed_tokens, layers and norm lie
    below `model.` there.
    """

    def __init__(self, config: DrafterConfig):
        super().__init__()
        self.config = config
        size, backbone = config.hidden_size, config.backbone_size
        self.embed_tokens = Embedding(config.vocab_size, size)
        self.layers = [Block(layer, size, config.eps) for layer in config.layers]
        self.norm = RMSNorm(size, config.eps)
        self.pre_projection = Linear(2 * backbone, size)
        self.post_projection = Linear(size, backbone)
        self.masked_embedding = CentroidHead(config) if config.centroids else DenseHead()
        self.ropes = Ropes(config.layers)

    def __call__(self, embedded: mx.array, hidden: mx.array, span: Span, tables: dict) -> tuple[mx.array, mx.array]:
        """Takes one draft step. Returns y, [B, size], of which the head makes scores, and the hidden state to carry to
        the next step, [B, backbone].

        embedded, hidden: [B, backbone], of the newest token; span: of no tokens; tables: of its positions (`ropes`).
        """
        x = self.pre_projection(mx.concatenate([embedded, hidden], axis=-1))
        for layer in self.layers:
            x = layer(x, span, tables[layer.kind])
        y = self.norm(x)
        return y, self.post_projection(y)

    def scores(self, y: mx.array) -> tuple[mx.array, mx.array | None]:
        """Returns the logits, float32 [B, C], and the token ids that they stand for, [B, C]; None for all, in order.

        y: [B, size], from a draft step.
        """
        return self.masked_embedding(y, self.embed_tokens)

    def step_shares(self) -> dict[str, float]:
        """Returns parts of parameters' paths and the share of these that a step reads; all others are read whole. The
        centroid head reads the tokens of the best centroids alone.
        """
        config = self.config
        share = config.centroid_top_k / config.centroids if config.centroids else 1.0
        return {"embed_tokens.": share, "token_ordering": share}

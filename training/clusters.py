"""The centroid head of small drafters: tokens in equal clusters, of which only the best few are scored."""

from __future__ import annotations

import torch
from transformers.models.gemma4_assistant.modeling_gemma4_assistant import Gemma4AssistantForCausalLM


def halve(embedding: torch.Tensor, tokens: torch.Tensor, leaves: int) -> list[torch.Tensor]:
    """`tokens` in `leaves` (a power of two) equal clusters: cut at the median along the widest direction, and again."""
    if leaves == 1:
        return [tokens]
    rows = embedding[tokens] - embedding[tokens].mean(0)
    direction = torch.linalg.svd(rows, full_matrices=False).Vh[0]
    order = tokens[(rows @ direction).argsort()]
    middle = len(order) // 2
    return [part for side in (order[:middle], order[middle:]) for part in halve(embedding, side, leaves // 2)]


@torch.no_grad()
def assign(drafter: Gemma4AssistantForCausalLM) -> None:
    """Cluster the drafter's head and let each centroid begin as the mean of its tokens."""
    head, embedder = drafter.lm_head.weight, drafter.masked_embedding
    parts = halve(head, torch.arange(len(head)), embedder.num_centroids)
    embedder.token_ordering.copy_(torch.cat(parts))
    embedder.centroids.weight.copy_(torch.stack([head[part].mean(0) for part in parts]))


def group(drafter: Gemma4AssistantForCausalLM, probabilities: torch.Tensor) -> torch.Tensor:
    """Probabilities of tokens [.., vocab] -> of clusters [.., centroids]."""
    embedder = drafter.masked_embedding
    return probabilities[..., embedder.token_ordering].unflatten(-1, (embedder.num_centroids, -1)).sum(-1)


def shortlisted(drafter: Gemma4AssistantForCausalLM, scores: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Scores [n, vocab] with -inf outside the best clusters, as in use."""
    embedder = drafter.masked_embedding
    best = centroids.topk(embedder.centroid_intermediate_top_k).indices
    tokens = embedder.token_ordering.view(embedder.num_centroids, -1)[best].flatten(1)  # [n, top * tokens each]
    return torch.full_like(scores, -torch.inf).scatter(1, tokens, scores.gather(1, tokens))

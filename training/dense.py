"""The pair's forward in plain PyTorch, for a GPU: few launches, static shapes, no transformers.

Computes what transformers' Gemma4ForCausalLM and Gemma4AssistantForCausalLM compute, for the graph of kind `moe`, with
weights of the same names. All experts are computed for every token, as one wide MLP whose activations are weighted by
the router (zero where an expert was not chosen): at 24 small experts two large products beat any gathering.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

BLOCK = 128  # queries of a sliding layer that are computed together; the window is as wide
EPS = 1e-6
CAP = 30.0  # of the target's logits


@dataclass(frozen=True)
class Sizes:
    """Of the target, and what its drafter has of its own."""

    vocab: int = 4096
    hidden: int = 192
    dense: int = 192
    experts: int = 24
    top: int = 4
    expert: int = 64
    heads: int = 4
    sliding_heads: int = 2  # of keys and values
    full_heads: int = 1
    sliding_size: int = 64
    full_size: int = 128
    layers: tuple[bool, ...] = (True, True, False, True, True, False)  # sliding?
    drafter_hidden: int = 128
    drafter_dense: int = 640
    drafter_layers: tuple[bool, ...] = (True, True, True, False)

    @property
    def read(self) -> dict[bool, int]:
        """The last layer of each kind, whose keys and values a drafter reads; by whether it slides."""
        return {kind: max(i for i, each in enumerate(self.layers) if each is kind) for kind in (True, False)}


KeyValue = tuple[torch.Tensor, torch.Tensor]  # [B, heads, T, d], rotated


class Out(NamedTuple):
    """What a target's forward gives: hidden states after the last norm [B, T, H], balance, keys and values by layer."""

    hidden: torch.Tensor
    balance: torch.Tensor
    kept: list[KeyValue]


class Norm(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, EPS)


def rotations(positions: torch.Tensor, sliding: bool, size: int) -> KeyValue:
    """cos and sin [.., T, size]: all of a sliding layer's head is rotated, a quarter of a full layer's."""
    base, turned = (1e4, size) if sliding else (1e6, size // 4)
    rates = base ** -(torch.arange(0, turned, 2, device=positions.device, dtype=torch.float32) / size)
    rates = F.pad(rates, (0, size // 2 - len(rates)))
    angles = positions[..., None].float() * rates
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, turn: KeyValue) -> torch.Tensor:
    left, right = x.chunk(2, -1)
    return x * turn[0] + torch.cat([-right, left], -1) * turn[1]


def _blocks(x: torch.Tensor, before: bool) -> torch.Tensor:
    """[B, heads, T, d] -> [B * blocks, heads, BLOCK or 2 BLOCK, d], T a multiple of BLOCK"""
    batch, heads, length, size = x.shape
    x = x.view(batch, heads, length // BLOCK, BLOCK, size)
    if before:
        x = torch.cat([F.pad(x[:, :, :-1], (0, 0, 0, 0, 1, 0)), x], 3)
    return x.transpose(1, 2).flatten(0, 1)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """Causal attention of scale 1 over whole sequences; a window of 0 sees everything. -> [B, T, heads * d]"""
    batch, heads, length, size = q.shape
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    if not window:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0).transpose(1, 2).flatten(2)
    padding = -length % BLOCK
    if padding:
        q, k, v = (F.pad(x, (0, 0, 0, padding)) for x in (q, k, v))
    count = (length + padding) // BLOCK
    query = torch.arange(BLOCK, device=q.device)[:, None] + BLOCK
    key = torch.arange(2 * BLOCK, device=q.device)[None]
    seen = (key <= query) & (query - key < window)
    seen = seen.expand(count, -1, -1).clone()
    seen[0, :, :BLOCK] = False  # nothing lies before the first block
    bias = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, -torch.inf)
    bias = bias.repeat(batch, 1, 1)[:, None].expand(-1, heads, -1, -1)
    out = F.scaled_dot_product_attention(_blocks(q, False), _blocks(k, True), _blocks(v, True), bias, scale=1.0)
    out = out.view(batch, count, heads, BLOCK, size).transpose(2, 3).reshape(batch, -1, heads * size)
    return out[:, :length]


def attend_cached(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at: torch.Tensor, window: int) -> torch.Tensor:
    """One query a row at position `at` [B] over the keys 0 .. at of a cache. q: [B, heads, 1, d]"""
    batch, heads, _, size = q.shape
    grouped = q.view(batch, k.shape[1], heads // k.shape[1], size)
    place = torch.arange(k.shape[2], device=q.device)[None]
    seen = place <= at[:, None]
    if window:
        seen &= at[:, None] - place < window
    scores = (grouped @ k.mT).float().masked_fill(~seen[:, None, None], -torch.inf)
    return (scores.softmax(-1).to(v.dtype) @ v).view(batch, 1, heads * size)


class Attention(nn.Module):
    def __init__(self, s: Sizes, hidden: int, sliding: bool, own: bool):
        super().__init__()
        self.sliding, self.heads = sliding, s.heads
        self.size = s.sliding_size if sliding else s.full_size
        self.kv_heads = s.sliding_heads if sliding else s.full_heads
        self.q_proj = nn.Linear(hidden, s.heads * self.size, bias=False)
        self.q_norm = Norm(self.size)
        self.o_proj = nn.Linear(s.heads * self.size, hidden, bias=False)
        if own:
            self.k_proj = nn.Linear(hidden, self.kv_heads * self.size, bias=False)
            self.k_norm = Norm(self.size)
            if sliding:
                self.v_proj = nn.Linear(hidden, self.kv_heads * self.size, bias=False)

    def query(self, x: torch.Tensor, turn: KeyValue) -> torch.Tensor:
        raw = self.q_proj(x)
        q = self.q_norm(raw.view(*x.shape[:2], self.heads, self.size)).transpose(1, 2)
        return rotate(q, turn).to(raw.dtype)

    def key_value(self, x: torch.Tensor, turn: KeyValue) -> KeyValue:
        raw = self.k_proj(x)
        shape = (*x.shape[:2], self.kv_heads, self.size)
        value = (self.v_proj(x) if self.sliding else raw).view(shape)
        k = rotate(self.k_norm(raw.view(shape)).transpose(1, 2), turn)
        v = F.rms_norm(value.float(), (self.size,), None, EPS).transpose(1, 2)
        return k.to(raw.dtype), v.to(raw.dtype)


class MLP(nn.Module):
    def __init__(self, hidden: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class Router(nn.Module):
    def __init__(self, s: Sizes):
        super().__init__()
        self.proj = nn.Linear(s.hidden, s.experts, bias=False)
        self.scale = nn.Parameter(torch.ones(s.hidden))
        self.per_expert_scale = nn.Parameter(torch.ones(s.experts))
        self.top = s.top

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """-> weights of all experts [.., E], zero where not chosen, and the balance (1 when even)"""
        x = F.rms_norm(x.float(), (x.shape[-1],), None, EPS) * self.scale * x.shape[-1] ** -0.5
        with torch.autocast(x.device.type, enabled=False):  # which experts are chosen hangs on small differences
            shares = F.linear(x, self.proj.weight).softmax(-1)
        best, chosen = shares.topk(self.top, -1)
        weights = best / best.sum(-1, keepdim=True) * self.per_expert_scale[chosen]
        hit = torch.zeros_like(shares).scatter(-1, chosen, 1.0)
        flat = (-1, shares.shape[-1])
        balance = (hit.view(flat).mean(0) * shares.view(flat).mean(0)).sum() * shares.shape[-1] / self.top
        return torch.zeros_like(shares).scatter(-1, chosen, weights), balance


class Experts(nn.Module):
    def __init__(self, s: Sizes):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(s.experts, 2 * s.expert, s.hidden))
        self.down_proj = nn.Parameter(torch.empty(s.experts, s.hidden, s.expert))

    def forward(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        count, hidden, inner = self.down_proj.shape
        raw = F.linear(x, self.gate_up_proj.flatten(0, 1)).view(*x.shape[:-1], count, 2, inner)
        act = F.gelu(raw[..., 0, :], approximate="tanh") * raw[..., 1, :] * weights[..., None].to(raw.dtype)
        return F.linear(act.flatten(-2), self.down_proj.transpose(0, 1).reshape(hidden, count * inner))


class Layer(nn.Module):
    def __init__(self, s: Sizes, sliding: bool, drafter: bool):
        super().__init__()
        hidden = s.drafter_hidden if drafter else s.hidden
        self.self_attn = Attention(s, hidden, sliding, own=not drafter)
        self.mlp = MLP(hidden, s.drafter_dense if drafter else s.dense)
        self.input_layernorm, self.post_attention_layernorm = Norm(hidden), Norm(hidden)
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = Norm(hidden), Norm(hidden)
        self.register_buffer("layer_scalar", torch.ones(1))
        self.mixture = not drafter
        if self.mixture:
            self.router, self.experts = Router(s), Experts(s)
            self.pre_feedforward_layernorm_2 = Norm(hidden)
            self.post_feedforward_layernorm_1, self.post_feedforward_layernorm_2 = Norm(hidden), Norm(hidden)

    def feed(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        out, balance = self.mlp(self.pre_feedforward_layernorm(x)), None
        if self.mixture:
            weights, balance = self.router(x)
            mixed = self.experts(self.pre_feedforward_layernorm_2(x), weights)
            out = self.post_feedforward_layernorm_1(out) + self.post_feedforward_layernorm_2(mixed)
        return (x + self.post_feedforward_layernorm(out)) * self.layer_scalar, balance

    def join(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        return x + self.post_attention_layernorm(self.self_attn.o_proj(attended))


class Body(nn.Module):
    def __init__(self, s: Sizes, drafter: bool):
        super().__init__()
        hidden, kinds = (s.drafter_hidden, s.drafter_layers) if drafter else (s.hidden, s.layers)
        self.embed_tokens = nn.Embedding(s.vocab, hidden)
        self.layers = nn.ModuleList(Layer(s, sliding, drafter) for sliding in kinds)
        self.norm = Norm(hidden)

    def turns(self, s: Sizes, positions: torch.Tensor) -> dict[bool, KeyValue]:
        return {kind: rotations(positions, kind, s.sliding_size if kind else s.full_size) for kind in (True, False)}


class Target(nn.Module):
    def __init__(self, s: Sizes):
        super().__init__()
        self.sizes, self.model = s, Body(s, drafter=False)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(tokens) * self.sizes.hidden**0.5

    def forward(self, tokens: torch.Tensor) -> Out:
        """tokens [B, T], whole sequences without padding before them"""
        x, balances, kept = self.embed(tokens), [], []
        turns = self.model.turns(self.sizes, torch.arange(tokens.shape[1], device=tokens.device))
        for layer in self.model.layers:
            attention, turn = layer.self_attn, turns[layer.self_attn.sliding]
            normed = layer.input_layernorm(x)
            k, v = attention.key_value(normed, turn)
            kept.append((k, v))
            x = layer.join(x, attend(attention.query(normed, turn), k, v, BLOCK if attention.sliding else 0))
            x, balance = layer.feed(x)
            balances.append(balance)
        return Out(self.model.norm(x), torch.stack(balances).mean(), kept)

    def step(self, tokens: torch.Tensor, at: torch.Tensor, caches: list[KeyValue]) -> torch.Tensor:
        """One token a row [B] at positions `at` [B]: its hidden state [B, H]; its keys and values go to the caches."""
        x, rows = self.embed(tokens[:, None]), torch.arange(len(tokens), device=tokens.device)
        turns = self.model.turns(self.sizes, at[:, None, None])
        for layer, (keys, values) in zip(self.model.layers, caches, strict=True):
            attention, turn = layer.self_attn, turns[layer.self_attn.sliding]
            normed = layer.input_layernorm(x)
            k, v = attention.key_value(normed, turn)
            keys[rows, :, at], values[rows, :, at] = k[:, :, 0].to(keys.dtype), v[:, :, 0].to(values.dtype)
            q = attention.query(normed, turn).to(keys.dtype)
            x = layer.join(x, attend_cached(q, keys, values, at, BLOCK if attention.sliding else 0))
            x, _ = layer.feed(x)
        return self.model.norm(x)[:, 0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return CAP * torch.tanh(F.linear(hidden, self.model.embed_tokens.weight).float() / CAP)


class Drafter(nn.Module):
    def __init__(self, s: Sizes):
        super().__init__()
        self.sizes, self.model = s, Body(s, drafter=True)
        self.pre_projection = nn.Linear(2 * s.hidden, s.drafter_hidden, bias=False)
        self.post_projection = nn.Linear(s.drafter_hidden, s.hidden, bias=False)

    def forward(
        self, embedded: torch.Tensor, state: torch.Tensor, shared: dict[bool, KeyValue]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One draft step of queries 1 .. T over keys 0 .. T - 1: hidden states, and what the next step reads."""
        x = self.pre_projection(torch.cat([embedded, state], -1)).float()
        turns = self.model.turns(self.sizes, torch.arange(1, x.shape[1] + 1, device=x.device))
        for layer in self.model.layers:
            sliding = layer.self_attn.sliding
            q = layer.self_attn.query(layer.input_layernorm(x), turns[sliding])
            # The query's own key is not there yet: the window is one key shorter.
            x = layer.join(x, attend(q, *shared[sliding], BLOCK - 1 if sliding else 0))
            x, _ = layer.feed(x)
        x = self.model.norm(x)
        return x, self.post_projection(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.model.embed_tokens.weight).float()


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Random weights with which Gemma 4's architecture trains; norms and scalars stay one.

    Attention has scale 1, so 1/sqrt(head size) lives in q_norm; the embedding is multiplied by sqrt(hidden), so its
    rows begin with norm 1; the router multiplies by 1/sqrt(hidden), so its weights begin wide.
    """
    noise = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if name.endswith("q_norm.weight"):
            weight.fill_(weight.numel() ** -0.5)
        elif "router.proj" in name:
            weight.normal_(std=0.5, generator=noise)
        elif weight.ndim >= 2:
            weight.normal_(std=weight.shape[-1] ** -0.5, generator=noise)


@torch.no_grad()
def begin_near(drafter: Drafter, target: Target) -> None:
    """The drafter's head begins as the target's embedding on its leading directions."""
    embedding = target.model.embed_tokens.weight.float().cpu()
    directions = torch.linalg.svd(embedding, full_matrices=False).Vh[: drafter.sizes.drafter_hidden]
    drafter.model.embed_tokens.weight.copy_(embedding @ directions.T)
    drafter.pre_projection.weight.copy_(0.7 * torch.cat([directions, directions], 1))
    drafter.post_projection.weight.copy_(directions.T)


@torch.no_grad()
def generate(
    target: Target, asked: list[list[int]], new: int, stop: tuple[int, ...], warmth: float = 0.0
) -> list[list[int]]:
    """Questions with the target's replies, ended by a stop token or after `new`; greedy, or sampled at `warmth`."""
    device = target.model.embed_tokens.weight.device
    lengths = torch.tensor([len(row) for row in asked], device=device)
    longest = int(lengths.max())
    width = -(-(longest + new) // 64) * 64
    tokens = torch.zeros(len(asked), width, dtype=torch.long)
    for row, ids in enumerate(asked):
        tokens[row, : len(ids)] = torch.tensor(ids)
    tokens = tokens.to(device)
    out, caches = target(tokens[:, :longest]), []
    for k, v in out.kept:
        caches.append(tuple(F.pad(x, (0, 0, 0, width - longest)).contiguous() for x in (k, v)))
    rows = torch.arange(len(asked), device=device)
    hidden, at = out.hidden[rows, lengths - 1], lengths.clone()
    ends = at + 1
    over = torch.zeros(len(asked), dtype=torch.bool, device=device)
    stops = torch.tensor(stop, device=device)
    for count in range(new):
        scores = target.logits(hidden)
        if warmth:
            scores = scores + warmth * -torch.log(-torch.log(torch.rand_like(scores).clamp(1e-9, 1 - 1e-7)))
        chosen = scores.argmax(-1)
        tokens[rows, at] = torch.where(over, tokens[rows, at], chosen)
        ends = torch.where(over, ends, at + 1)
        over |= torch.isin(chosen, stops)
        if count % 16 == 15 and bool(over.all()):
            break
        hidden = target.step(chosen, at, caches)
        at = (at + 1).clamp(max=width - 1)
    whole, ends = tokens.cpu().tolist(), ends.cpu().tolist()
    return [row[:end] for row, end in zip(whole, ends, strict=True)]

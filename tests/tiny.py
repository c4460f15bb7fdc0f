"""Small random models and an oracle drafter: what the loop's tests are made with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
from mlx.utils import tree_map

from mlx_gemma_mtp.cache.cache import Span
from mlx_gemma_mtp.models import gemma4
from mlx_gemma_mtp.models.config import DrafterConfig, TargetConfig
from mlx_gemma_mtp.models.drafter import Drafter
from mlx_gemma_mtp.models.gemma4 import Gemma4
from mlx_gemma_mtp.models.linear import finish_loading
from mlx_gemma_mtp.sampling.distribution import Rules
from mlx_gemma_mtp.sampling.params import REJECTION, SamplingParams
from mlx_gemma_mtp.sampling.penalties import TokenCounts
from mlx_gemma_mtp.speculative.drafting import DEFAULT_DRAFTING, Drafting
from mlx_gemma_mtp.speculative.guide import Constraint, Guide, guide
from mlx_gemma_mtp.speculative.loop import Speculation, compact
from mlx_gemma_mtp.speculative.prefill import batch
from mlx_gemma_mtp.speculative.readback import Round

VOCAB = 97
ROPES = {
    "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
GREEDY = SamplingParams(temperature=0.0, top_p=1.0, top_k=-1, seed=0)
SAMPLED = SamplingParams(temperature=1.0, top_p=0.95, top_k=20, seed=7)
PENALISED = SamplingParams(
    temperature=0.8,
    top_p=0.95,
    top_k=30,
    min_p=0.02,
    repetition_penalty=1.2,
    presence_penalty=0.4,
    frequency_penalty=0.3,
    logit_bias={5: 3.0, 6: -mx.inf},
    seed=11,
)


def target_dict(kind: str) -> dict:
    """The raw config of a small model of a kind: moe (26B), dense (31B), e2b, e4b."""
    shared = {"e2b": 3, "e4b": 2}.get(kind, 0)
    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2 if kind != "e2b" else 1,
        "num_global_key_value_heads": 1 if kind in ("moe", "dense") else None,
        "attention_k_eq_v": kind in ("moe", "dense"),
        "head_dim": 8,
        "global_head_dim": 16,
        "sliding_window": 8,
        "num_kv_shared_layers": shared,
        "use_double_wide_mlp": kind == "e2b",
        "hidden_size_per_layer_input": 6 if shared else 0,
        "vocab_size_per_layer_input": VOCAB,
        "enable_moe_block": kind == "moe",
        "num_experts": 8 if kind == "moe" else None,
        "top_k_experts": 2 if kind == "moe" else None,
        "moe_intermediate_size": 16 if kind == "moe" else None,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "final_logit_softcapping": 30.0,
        "rope_parameters": ROPES,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "attention_bias": False,
    }
    return {"model_type": "gemma4", "text_config": text, "vision_config": {}, "eos_token_id": [1]}


def drafter_dict(kind: str, centroids: bool = False) -> dict:
    """The raw config of the drafter of `target_dict(kind)`;
    centroids must divide the vocabulary, so they take 97 of 1.
    """
    text = target_dict(kind)["text_config"] | {
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "num_kv_shared_layers": 4,
        "use_double_wide_mlp": False,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
        "enable_moe_block": False,
        "final_logit_softcapping": None,
    }
    return {
        "model_type": "gemma4_assistant",
        "text_config": text,
        "backbone_hidden_size": 32,
        "use_ordered_embeddings": centroids,
        "num_centroids": VOCAB,
        "centroid_intermediate_top_k": 24,
        "tie_word_embeddings": True,
    }


def _randomise(model, seed: int):
    """Weights that make the text vary: norms of either sign keep a tied head from repeating its input."""
    mx.random.seed(seed)

    def fill(a: mx.array) -> mx.array:
        if mx.issubdtype(a.dtype, mx.integer):
            return mx.random.permutation(a.size).astype(a.dtype)
        if a.ndim == 1:
            return mx.random.normal(a.shape) if a.size > 1 else 1 + 0.1 * mx.random.normal(a.shape)
        return mx.random.normal(a.shape) * 1.2 / a.shape[-1] ** 0.5

    model.update(tree_map(fill, model.parameters()))
    finish_loading(model)
    return model


def target(kind: str = "moe", seed: int = 0, change: Callable[[dict], dict] = dict) -> Gemma4:
    """change: of the raw config."""
    return _randomise(gemma4.build(TargetConfig.from_dict(change(target_dict(kind)))), seed)


def drafter(
    model: Gemma4, kind: str = "moe", centroids: bool = False, seed: int = 1, change: Callable[[dict], dict] = dict
) -> Drafter:
    """change: of the raw config."""
    raw = change(drafter_dict(kind, centroids))
    return _randomise(Drafter(DrafterConfig.from_dict(raw, model.config)), seed)


class OracleDrafter:
    """Drafts the known continuation where `hit` is true, and another token where it is false.

    texts: [B, N] prompt and continuation of each row; hit: bool [B, N] by absolute position. It stands in for a
    Drafter.
    """

    def __init__(self, texts: mx.array, hit: mx.array, vocabulary: int = VOCAB):
        self.texts, self.hit, self.vocabulary = texts, hit, vocabulary
        self.ropes, self.masked_embedding = self, None
        self._span: Span | None = None

    def tables(self, positions: mx.array) -> dict:
        return {}

    def __call__(self, embedded: mx.array, hidden: mx.array, span: Span, rotations: dict) -> tuple[mx.array, mx.array]:
        self._step = self._step + 1 if span is self._span else 1
        self._span = span
        place = mx.minimum(span.lengths[:, None] + self._step, self.texts.shape[1] - 1)  # the token to be drafted
        right = mx.take_along_axis(self.texts, place, axis=1)
        hit = mx.take_along_axis(self.hit, place, axis=1)
        return mx.where(hit, right, (right + 1) % self.vocabulary), hidden  # [B, 1]

    def scores(self, y: mx.array) -> tuple[mx.array, None]:
        return (mx.arange(self.vocabulary)[None] == y).astype(mx.float32), None


def begun(
    model: Gemma4,
    drafts: Drafter | OracleDrafter | None,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] = GREEDY,
    chunk: int = 16,
    block: int = 16,
    constraints: Sequence[Constraint | None] = (),
    drafting: Drafting = DEFAULT_DRAFTING,
    confident: bool = False,
) -> Speculation:
    """The bare loop over these prompts, prefilled in chunks; its cache is made for writes of `block` tokens."""
    params = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    cache, hidden = batch(model, prompts, chunk, block, drafting.lookback)
    loop = Speculation(model, drafts, cache, drafting, confident)
    loop.begin(hidden, *settings(model, params, prompts, constraints=constraints))
    return loop


def settings(
    model: Gemma4,
    params: Sequence[SamplingParams],
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]] | None = None,
    constraints: Sequence[Constraint | None] = (),
) -> tuple[Rules, TokenCounts | None, Guide | None]:
    """What a batch of these rows is decoded by, after these texts."""
    vocab = model.config.vocab_size
    rules = Rules.of(params, vocab)
    return rules, TokenCounts.of(prompts, vocab, texts) if rules.penalties else None, guide(constraints, vocab)


def round_of(loop: Speculation, num_draft: int) -> Round:
    """One round, with as many drafts for every row."""
    return loop.step([num_draft] * loop.cache.rows)


def decode(
    model: Gemma4,
    drafts: Drafter | OracleDrafter | None,
    prompts: Sequence[Sequence[int]],
    num_draft: int,
    count: int,
    params: SamplingParams = GREEDY,
    **parts,
) -> tuple[list[list[int]], Speculation]:
    """`count` tokens for every prompt through the bare loop, and the loop. parts: of `begun`."""
    loop = begun(model, drafts if num_draft else None, prompts, params, **parts)
    texts: list[list[int]] = [[] for _ in prompts]
    while min(map(len, texts)) < count:
        for text, tokens in zip(texts, round_of(loop, num_draft).tokens, strict=True):
            text += tokens
    return [text[:count] for text in texts], loop


def rejected(
    model: Gemma4,
    drafts: Drafter,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    num_draft: int,
    count: int,
) -> list[list[int]]:
    """The same where drafts are accepted by rejection, with settings for each row; a row that has its tokens leaves."""
    loop = begun(model, drafts, prompts, params, drafting=Drafting(accept=REJECTION))
    names, texts = list(range(len(prompts))), [[] for _ in prompts]
    while stay := compact([len(texts[name]) < count for name in names]):
        if len(stay) < len(names):
            names = [names[place] for place in stay]
            every = ([each[name] for name in names] for each in (params, prompts, texts))
            loop.arrange(stay, *settings(model, *every))
        for name, tokens in zip(names, round_of(loop, num_draft).tokens, strict=True):
            texts[name] += tokens
    return [text[:count] for text in texts]


def prompts(count: int, seed: int = 3) -> list[list[int]]:
    """Ragged prompts, shorter and longer than the window of 8 and the block of 16."""
    lengths = [3, 17, 9, 1, 30, 8, 12, 41]
    mx.random.seed(seed)
    return [mx.random.randint(2, VOCAB, (lengths[i % 8],)).tolist() for i in range(count)]

"""The transformers oracle: tiny random Gemma 4 pairs and their reference numbers (numpy, float32).

Imported by `record_fixtures.py` and by tests marked `parity`, after `pytest.importorskip` of torch
and transformers. The reference is transformers 5.23.0, models gemma4 and gemma4_assistant (the kind
`unified`: gemma4_unified and gemma4_unified_assistant), with three faults patched
(`patch_transformers`, applied on import). A sequence is a list of token ids;
W is the sliding window, n the number of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

import numpy as np
import torch
from transformers import GenerationConfig
from transformers.generation.candidate_generator import (
    SinglePositionMultiTokenCandidateGenerator as Generator,
)
from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4ForCausalLM, Gemma4TextModel
from transformers.models.gemma4_assistant.configuration_gemma4_assistant import (
    Gemma4AssistantConfig,
)
from transformers.models.gemma4_assistant.modeling_gemma4_assistant import (
    Gemma4AssistantForCausalLM,
)
from transformers.models.gemma4_unified.configuration_gemma4_unified import Gemma4UnifiedTextConfig
from transformers.models.gemma4_unified.modeling_gemma4_unified import Gemma4UnifiedForCausalLM
from transformers.models.gemma4_unified_assistant.configuration_gemma4_unified_assistant import (
    Gemma4UnifiedAssistantConfig,
)
from transformers.models.gemma4_unified_assistant.modeling_gemma4_unified_assistant import (
    Gemma4UnifiedAssistantForCausalLM,
)

Kind = Literal["moe", "dense", "unified", "e2b", "e4b"]
Rule = Literal["ours", "transformers"]
TextConfig = Gemma4TextConfig | Gemma4UnifiedTextConfig
AssistantConfig = Gemma4AssistantConfig | Gemma4UnifiedAssistantConfig
Target = Gemma4ForCausalLM | Gemma4UnifiedForCausalLM
Assistant = Gemma4AssistantForCausalLM | Gemma4UnifiedAssistantForCausalLM
SharedKV = dict[str, tuple[torch.Tensor, torch.Tensor]]

KINDS: tuple[Kind, ...] = ("moe", "dense", "unified", "e2b", "e4b")
VOCAB, HIDDEN, WINDOW = 256, 64, 8
S, F = "sliding_attention", "full_attention"
STOCK_MODES = Gemma4TextConfig.kv_sharing_modes.fget
STOCK_SLICE = Gemma4TextModel._maybe_slice_kv_shared_inputs

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 128, "num_attention_heads": 8,
    "num_key_value_heads": 4, "num_global_key_value_heads": None, "attention_k_eq_v": False,
    "head_dim": 16, "global_head_dim": 32, "sliding_window": WINDOW, "layer_types": [S, S, F] * 2,
    "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": VOCAB, "final_logit_softcapping": 30.0,
    "max_position_embeddings": 512, "dtype": "float32",
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip

# What sets each published size apart, at toy scale. In e4b the two layers whose K/V are borrowed
# lie in different blocks.
TARGETS: dict[Kind, dict[str, Any]] = {
    "moe": {"attention_k_eq_v": True, "num_global_key_value_heads": 2, "enable_moe_block": True,
            "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64},
    "dense": {"attention_k_eq_v": True, "num_global_key_value_heads": 2},
    "unified": {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "enable_moe_block": False},
    "e2b": {"num_key_value_heads": 1, "layer_types": [S, S, F] * 3, "num_kv_shared_layers": 3,
            "use_double_wide_mlp": True, "hidden_size_per_layer_input": 16},
    "e4b": {"num_key_value_heads": 2, "layer_types": [S, S, F] * 3, "num_kv_shared_layers": 4,
            "hidden_size_per_layer_input": 16},
}  # fmt: skip

DRAFTER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "layer_types": [S, S, S, F],
    "num_kv_shared_layers": 4, "vocab_size_per_layer_input": 0, "final_logit_softcapping": None,
}  # fmt: skip


# ---------------------------------------------------------------------------------- faults, patched


def _kv_sharing_modes(config: Gemma4TextConfig) -> list[str | None]:
    layers, shared = len(config.layer_types), config.num_kv_shared_layers
    # Stock: ValueError when every layer borrows its K/V, which Gemma4AssistantConfig demands:
    # no drafter can be built.
    if shared == layers:
        return ["reuse"] * layers
    # Stock: all None when no layer borrows (12B, 26B, 31B): the target hands no K/V to a drafter.
    if shared == 0:
        last = {kind: index for index, kind in enumerate(config.layer_types)}
        return ["store" if last[kind] == index else None for index, kind in enumerate(config.layer_types)]
    return STOCK_MODES(config)


def _slice_shared_inputs(self, hidden_states, per_layer_inputs, position_embeddings, masks, logits_to_keep, **kwargs):
    # Stock: indexes `per_layer_inputs`, None in a drafter; only several queries at once get there.
    if per_layer_inputs is None:
        return hidden_states, per_layer_inputs, position_embeddings, masks
    return STOCK_SLICE(self, hidden_states, per_layer_inputs, position_embeddings, masks, logits_to_keep, **kwargs)


def patch_transformers() -> None:
    """Correct the three faults of transformers 5.23.0 that stand in the way. Idempotent."""
    Gemma4TextConfig.kv_sharing_modes = Gemma4UnifiedTextConfig.kv_sharing_modes = property(_kv_sharing_modes)
    Gemma4TextModel._maybe_slice_kv_shared_inputs = _slice_shared_inputs


patch_transformers()


# --------------------------------------------------------------------------- random models, on disk


def _text_config(kind: Kind, settings: dict[str, Any]) -> TextConfig:
    settings = COMMON | settings
    make = Gemma4UnifiedTextConfig if kind == "unified" else Gemma4TextConfig
    return make(num_hidden_layers=len(settings["layer_types"]), **settings)


def target_config(kind: Kind) -> TextConfig:
    return _text_config(kind, TARGETS[kind])


def drafter_config(kind: Kind, ordered: bool) -> AssistantConfig:
    """`ordered` chooses the centroid head: 16 clusters of 16 tokens, the best 4 are scored."""
    attention = ("num_key_value_heads", "num_global_key_value_heads", "attention_k_eq_v")
    paired = {key: TARGETS[kind][key] for key in attention if key in TARGETS[kind]}
    text = _text_config(kind, paired | DRAFTER | {"enable_moe_block": False})
    make = Gemma4UnifiedAssistantConfig if kind == "unified" else Gemma4AssistantConfig
    return make(
        text_config=text,
        backbone_hidden_size=HIDDEN,
        use_ordered_embeddings=ordered,
        num_centroids=16,
        centroid_intermediate_top_k=4,
        dtype="float32",
    )


@torch.no_grad()
def _randomize(model: torch.nn.Module, seed: int) -> None:
    """Weights for which every factor matters: no norm is one, attention is soft."""
    noise = torch.Generator().manual_seed(seed)
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("layer_scalar"):
            weight.uniform_(0.6, 1.2, generator=noise)
        elif name.endswith("token_ordering"):
            weight.copy_(torch.randperm(weight.numel(), generator=noise))
        elif "inv_freq" in name or name.endswith("embed_scale"):
            continue
        elif name.endswith("q_norm.weight"):  # attention has scale 1, so 1/sqrt(head_dim) lives here
            weight.uniform_(1.0, 3.0, generator=noise).mul_(weight.numel() ** -0.5)
        elif weight.ndim == 1:  # norms, router.scale, router.per_expert_scale
            weight.uniform_(0.5, 1.5, generator=noise)
        else:
            scale = 1.0 if "router.proj" in name else weight.shape[-1] ** -0.5
            weight.normal_(std=scale, generator=noise)


def random_target(kind: Kind, seed: int) -> Target:
    """A tiny random target, float32: window 8, hidden 64, vocabulary 256, head_dim 16 and 32."""
    config = target_config(kind)
    config._attn_implementation = "eager"
    model = (Gemma4UnifiedForCausalLM if kind == "unified" else Gemma4ForCausalLM)(config).eval()
    _randomize(model, seed)
    return model


def random_drafter(kind: Kind, seed: int, ordered: bool | None = None) -> Assistant:
    """A drafter of hidden 32 for `random_target(kind)`; by default only e2b, e4b have centroids."""
    config = drafter_config(kind, kind in ("e2b", "e4b") if ordered is None else ordered)
    config.text_config._attn_implementation = config._attn_implementation = "eager"
    model = (Gemma4UnifiedAssistantForCausalLM if kind == "unified" else Gemma4AssistantForCausalLM)(config).eval()
    _randomize(model, seed)
    return model


def save(model: Target | Assistant, folder: Path) -> Path:
    """Write `model` in Hugging Face layout with the config keys of the published checkpoints."""
    model.save_pretrained(folder)
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    text = config.get("text_config", config)
    # transformers 5.23 writes per_layer_config instead of these two keys of the published files.
    overrides = next(iter(text.pop("per_layer_config").values()))
    text["global_head_dim"] = overrides["head_dim"]
    text["num_global_key_value_heads"] = overrides.get("num_key_value_heads")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return Path(folder)


def load_pair(target: Path, drafter: Path) -> tuple[Gemma4ForCausalLM, Gemma4AssistantForCausalLM]:
    """Open two Hugging Face folders in float32."""
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    return (
        Gemma4ForCausalLM.from_pretrained(target, **options).eval(),
        Gemma4AssistantForCausalLM.from_pretrained(drafter, **options).eval(),
    )


# -------------------------------------------------------------------------------- reference numbers


@torch.no_grad()
def _forward(model: Target, tokens: Sequence[int]) -> Any:
    ids = torch.tensor([list(tokens)])
    return model(ids, output_hidden_states=True, return_shared_kv_states=True, use_cache=False)


def target_logits(model: Target, tokens: Sequence[int]) -> np.ndarray:
    """[n, vocab] after the soft cap, without a cache."""
    return _forward(model, tokens).logits[0].numpy()


def target_hidden(model: Target, tokens: Sequence[int]) -> np.ndarray:
    """[n, hidden] after the final norm: what the head reads and what a drafter is given."""
    return _forward(model, tokens).hidden_states[-1][0].numpy()


def _window(shared: SharedKV, window: int) -> SharedKV:
    # Ours: a drafter's sliding layer sees keys k with q - k < W. The query sits at q, the index of
    # the newest token, whose own key does not exist yet: the W - 1 newest keys. transformers' mask
    # shows W + 1. The keys carry their rotation, so a slice does what a mask would.
    keep = window - 1
    return {kind: (k[:, :, -keep:], v[:, :, -keep:]) if kind == S else (k, v) for kind, (k, v) in shared.items()}


class Draft(NamedTuple):
    tokens: list[int]  # steps
    logits: np.ndarray  # [steps, vocab]
    hidden: np.ndarray  # [steps, backbone hidden], after post_projection: what the next step is given


@torch.no_grad()
def draft_steps(
    target: Target,
    drafter: Assistant,
    tokens: Sequence[int],
    steps: int,
    rule: Rule = "ours",
    position_offset: int = 0,
) -> Draft:
    """Draft `steps` tokens greedily after `tokens`, whose last one is new: it has no K/V yet.

    The target reads tokens[:-1]; its K/V and its last hidden state feed the drafter. The query
    position is constant, n - 1 (the index of the newest token) plus `position_offset` (-1 is the
    convention of vLLM and mlx-vlm).
    """
    context = _forward(target, tokens[:-1])
    shared: SharedKV = dict(context.shared_kv_states)
    if rule == "ours":
        shared = _window(shared, target.config.sliding_window)
    hidden = context.hidden_states[-1][:, -1:]
    newest = torch.tensor([[tokens[-1]]])
    position = torch.tensor([[len(tokens) - 1 + position_offset]])
    drafted, logits, carried = [], [], []
    for _ in range(steps):
        inputs = torch.cat([target.get_input_embeddings()(newest), hidden], dim=-1)
        output = drafter(inputs_embeds=inputs, position_ids=position, shared_kv_states=shared, use_cache=False)
        hidden, newest = output.last_hidden_state, output.logits.argmax(-1)
        drafted.append(newest.item())
        logits.append(output.logits[0, 0].numpy())
        carried.append(hidden[0, 0].numpy())
    return Draft(drafted, np.stack(logits), np.stack(carried))


@torch.no_grad()
def greedy(model: Target, prompt: Sequence[int], max_new_tokens: int, eos: Sequence[int] = ()) -> list[int]:
    """New tokens of plain greedy decoding, the end token included."""
    ids = torch.tensor([list(prompt)])
    return _generate(model, ids, GenerationConfig(**_generation(max_new_tokens, eos)))


def _generation(max_new_tokens: int, eos: Sequence[int]) -> dict[str, Any]:
    return {
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": list(eos) or None,
    }


def _generate(model: Target, ids: torch.Tensor, config: GenerationConfig, **kwargs: Any) -> list[int]:
    # `generate` fills unset fields of its config from the model's own, so the model's must go too.
    with mock.patch.object(model, "generation_config", config):
        output = model.generate(ids, attention_mask=torch.ones_like(ids), **kwargs)
    return output[0, ids.shape[1] :].tolist()


class Assisted(NamedTuple):
    tokens: list[int]  # new tokens, the end token included
    accepted: list[int]  # drafts kept in each round; a round stops at the end token and at the length limit


@contextmanager
def _clean_rounds(accepted: list[int], window: int | None) -> Iterator[None]:
    """transformers' generator, rejected K/V dropped, accepted drafts noted; `window`: our rule."""
    stock = Generator.get_candidates

    def get_candidates(self, input_ids, model_kwargs, model_outputs, is_first_iteration, n_last_matches, **kwargs):
        if not is_first_iteration:
            # Stock cuts to len(input_ids), one entry too many as the newest token has no K/V yet;
            # past the window, where the sliding K/V is shorter than the text, it cuts nothing.
            shared: SharedKV = model_outputs.shared_kv_states
            rejected = shared[F][0].shape[2] - (input_ids.shape[1] - 1)
            cut = {kind: (k.shape[2] - rejected) for kind, (k, _) in shared.items()}
            shared = {kind: (k[:, :, : cut[kind]], v[:, :, : cut[kind]]) for kind, (k, v) in shared.items()}
            model_outputs.shared_kv_states = _window(shared, window) if window else shared
        return stock(
            self,
            input_ids,
            model_kwargs,
            model_outputs,
            is_first_iteration,
            n_last_matches,
            **kwargs,
        )

    def note(self, input_ids, scores, num_matches):
        accepted.append(int(num_matches))

    with (
        mock.patch.object(Generator, "get_candidates", get_candidates),
        mock.patch.object(Generator, "update_candidate_strategy", note),
    ):
        yield


def assisted(
    target: Target,
    drafter: Assistant,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    num_draft: int,
    eos: Sequence[int],
    rule: Rule = "transformers",
) -> Assisted:
    """transformers' own assisted generation, greedy, rejected K/V dropped.

    `rule` is the drafter's sliding window: the keys that transformers' cache and mask leave (W - 1
    old ones and those of the last verify, at most W + 1), or ours (W - 1). Prefill is no round.
    """
    settings = {"num_assistant_tokens": num_draft, "num_assistant_tokens_schedule": "constant"}
    drafter.generation_config.update(**settings)
    accepted: list[int] = []
    window = target.config.sliding_window if rule == "ours" else None
    ids = torch.tensor([list(prompt_ids)])
    config = GenerationConfig(**_generation(max_new_tokens, eos))
    with _clean_rounds(accepted, window):
        tokens = _generate(target, ids, config, assistant_model=drafter)
    return Assisted(tokens, accepted[1:])

"""transformers' Gemma 4 made fit for training on a CPU: faults patched, attention in blocks.

transformers 5.23.0, models gemma4 and gemma4_assistant.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import (
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4TextModel,
)
from transformers.models.gemma4_assistant.modeling_gemma4_assistant import Gemma4AssistantForCausalLM

from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.files.folder import weight_files
from training.cli import require

SLIDING, FULL = "sliding_attention", "full_attention"
BLOCK = 128  # queries of a sliding layer that are computed together; a window may not be wider
ATTENTION = "blocks"  # the name under which `attend` is registered
EXPERTS = "grouped_mm"  # the default loops over the experts: a third of the speed
STOCK_MODES = Gemma4TextConfig.kv_sharing_modes.fget
STOCK_SLICE = Gemma4TextModel._maybe_slice_kv_shared_inputs


# ---------------------------------------------------------------------------------- faults, patched


def _kv_sharing_modes(config: Gemma4TextConfig) -> list[str | None]:
    kinds, shared = config.layer_types, config.num_kv_shared_layers
    # Stock: ValueError when every layer borrows its K/V, which Gemma4AssistantConfig demands.
    if shared == len(kinds):
        return ["reuse"] * len(kinds)
    # Stock: all None when no layer borrows, so such a target hands no K/V to its drafter.
    if shared == 0:
        last = {kind: index for index, kind in enumerate(kinds)}
        return ["store" if last[kind] == index else None for index, kind in enumerate(kinds)]
    return STOCK_MODES(config)


def _slice_shared_inputs(self, hidden_states, per_layer_inputs, position_embeddings, masks, logits_to_keep, **kwargs):
    # Stock: indexes `per_layer_inputs`, None in a drafter, when there are several queries.
    if per_layer_inputs is None:
        return hidden_states, per_layer_inputs, position_embeddings, masks
    return STOCK_SLICE(self, hidden_states, per_layer_inputs, position_embeddings, masks, logits_to_keep, **kwargs)


# --------------------------------------------------------------------------------------- attention


def sliding(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """Query i attends to keys i - window + 1 .. i, window <= BLOCK. q, k, v: [B, heads, T, d], scale 1.

    Each block of queries reads its own keys and the block before: T x 2 BLOCK scores instead of T x T.
    """
    batch, heads, length, size = q.shape
    blocks = -(-length // BLOCK)
    q, k, v = (F.pad(x, (0, 0, 0, blocks * BLOCK - length)) for x in (q, k, v))

    def pair(x: torch.Tensor) -> torch.Tensor:  # [B, heads, T, d] -> [B * heads * blocks, 2 * BLOCK, d]
        x = x.reshape(batch, heads, blocks, BLOCK, size)
        before = F.pad(x[:, :, :-1], (0, 0, 0, 0, 1, 0))
        return torch.cat([before, x], 3).reshape(-1, 2 * BLOCK, size)

    query = torch.arange(BLOCK, device=q.device)[:, None] + BLOCK
    key = torch.arange(2 * BLOCK, device=q.device)[None]
    seen = (key <= query) & (query - key < window)
    first = seen & (key >= BLOCK)  # nothing lies before the first block
    mask = torch.cat([first[None], seen.expand(blocks - 1, -1, -1)]).repeat(batch * heads, 1, 1)
    scores = q.reshape(-1, BLOCK, size) @ pair(k).mT  # [B * heads * blocks, BLOCK, 2 * BLOCK]
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return (weights @ pair(v)).reshape(batch, heads, blocks * BLOCK, size)[:, :, :length]


def attend(module, query, key, value, attention_mask, scaling, sliding_window=None, **kwargs):
    """transformers' attention interface: causal, whole sequences, no padding, no cache. q: [B, heads, T, d]."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (key, value))
    if sliding_window is None or sliding_window >= query.shape[2]:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    elif sliding_window <= BLOCK:
        out = sliding(query * scaling, key, value, sliding_window)
    else:
        place = torch.arange(query.shape[2], device=query.device)
        distance = place[:, None] - place[None]
        seen = (distance >= 0) & (distance < sliding_window)
        out = F.scaled_dot_product_attention(query, key, value, seen, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def prepare_transformers() -> None:
    """Correct the faults that stand in the way and register `attend`. Idempotent."""
    Gemma4TextConfig.kv_sharing_modes = property(_kv_sharing_modes)
    Gemma4TextModel._maybe_slice_kv_shared_inputs = _slice_shared_inputs
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)


prepare_transformers()


# ------------------------------------------------------------------------------------------ models


def text_config(settings: dict[str, Any]) -> Gemma4TextConfig:
    config = Gemma4TextConfig(num_hidden_layers=len(settings["layer_types"]), **settings)
    config._attn_implementation = ATTENTION
    config._experts_implementation = EXPERTS
    return config


def soft_cap(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    return logits if cap is None else cap * torch.tanh(logits / cap)


def plain(config: Gemma4TextConfig) -> dict[str, Any]:
    """The settings with the keys of the published checkpoints."""
    settings = config.to_dict()
    # transformers 5.23 writes per_layer_config instead of these two keys of the published files.
    wide = next(iter((settings.pop("per_layer_config", None) or {}).values()), {})
    settings["global_head_dim"] = wide.get("head_dim", settings["head_dim"])
    settings["num_global_key_value_heads"] = wide.get("num_key_value_heads")
    return settings


def save(model: nn.Module, folder: Path) -> None:
    """Write `model` in Hugging Face layout with the config keys of the published checkpoints."""
    model.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    text = config.get("text_config", config)
    text.pop("per_layer_config", None)
    wanted = plain(model.config.get_text_config())
    text |= {key: wanted[key] for key in ("global_head_dim", "num_global_key_value_heads")}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_target(
    folder: Path, attention: str = ATTENTION, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Gemma4ForCausalLM:
    """The text model of a target folder in Hugging Face layout (gemma4_text or gemma4), frozen.

    Raises UserError for a folder that holds no such model, or one that was converted for MLX.
    """
    model_type = _model_type(folder, "gemma4_text", "gemma4")
    options = {"dtype": dtype, "attn_implementation": attention}
    if model_type == "gemma4":
        whole = Gemma4ForConditionalGeneration.from_pretrained(folder, **options)
        with torch.device("meta"):
            model = Gemma4ForCausalLM(whole.config.text_config)
        model.model, model.lm_head = whole.model.language_model, whole.lm_head
        model.generation_config = whole.generation_config
        model.config._attn_implementation = attention
    else:
        model = Gemma4ForCausalLM.from_pretrained(folder, **options)
    model.config._experts_implementation = EXPERTS
    return model.to(device).eval().requires_grad_(False)


def load_drafter(folder: Path, attention: str = ATTENTION) -> Gemma4AssistantForCausalLM:
    """A drafter folder in Hugging Face layout, float32. Raises UserError for any other folder."""
    _model_type(folder, "gemma4_assistant")
    return Gemma4AssistantForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()


def load(folder: Path) -> Gemma4ForCausalLM | Gemma4AssistantForCausalLM:
    """A target or a drafter, float32."""
    drafter = _model_type(folder, "gemma4_text", "gemma4", "gemma4_assistant") == "gemma4_assistant"
    return load_drafter(folder) if drafter else load_target(folder)


def _model_type(folder: Path, *expected: str) -> str:
    require(folder, "config.json", "model folder", "give a folder in Hugging Face layout")
    model_type = json.loads((folder / "config.json").read_text()).get("model_type")
    if model_type not in expected:
        raise UserError(f"{folder} is of type {model_type!r}, expected {' or '.join(expected)}; give another folder")
    for file in weight_files(folder):
        with safe_open(file, "pt") as weights:
            if any(name.startswith("language_model.model.") for name in weights.keys()):  # noqa: SIM118 - no mapping
                raise UserError(f"{folder} was converted for MLX; give the Hugging Face folder that it was made from")
    return model_type

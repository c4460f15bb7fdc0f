"""Start a target from the weights of another one with the same sizes and at least as many experts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers.models.gemma4.modeling_gemma4 import Gemma4ForCausalLM
from transformers.models.gemma4_assistant.modeling_gemma4_assistant import Gemma4AssistantForCausalLM

from mlx_gemma_mtp.errors import UserError
from training import data, gemma

EXPERT_AXIS = ("router.proj.weight", "router.per_expert_scale", "experts.gate_up_proj", "experts.down_proj")
SAMPLE = 24  # windows of 512 tokens on which the use of the experts is counted


@torch.no_grad()
def expert_use(model: Gemma4ForCausalLM, stream: np.ndarray) -> dict[int, torch.Tensor]:
    """For each mixture-of-experts layer the sum of its experts' weights on a sample of `stream`, [experts]."""
    use: dict[int, torch.Tensor] = {}

    def count(layer: int, experts: int):
        def hook(router, inputs, outputs):
            _, weights, chosen = outputs
            use.setdefault(layer, torch.zeros(experts)).index_add_(0, chosen.flatten(), weights.flatten())

        return hook

    layers = [(i, layer) for i, layer in enumerate(model.model.layers) if layer.enable_moe_block]
    hooks = [layer.router.register_forward_hook(count(i, layer.router.proj.out_features)) for i, layer in layers]
    model.model(input_ids=torch.from_numpy(data.windows(stream, 512, SAMPLE)[:, :-1]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return use


def start_from(model: Gemma4ForCausalLM, folder: Path, stream: np.ndarray) -> None:
    """Fill `model` with the weights of `folder`, in each layer those of the experts that `stream` uses most.

    Raises UserError where another size differs.
    """
    source = gemma.load_target(folder)
    weights = source.state_dict()
    for layer, counts in expert_use(source, stream).items():
        kept = counts.topk(min(model.config.num_experts, len(counts))).indices.sort().values
        for name in EXPERT_AXIS:
            key = f"model.layers.{layer}.{name}"
            weights[key] = weights[key][kept]
    wrong = [name for name, weight in model.state_dict().items() if weights[name].shape != weight.shape]
    if wrong:
        raise UserError(f"--init {folder}: {wrong[0]} has another shape; give a target of the kind's sizes")
    model.load_state_dict(weights)


def widen_from(drafter: Gemma4AssistantForCausalLM, folder: Path) -> None:
    """Fill `drafter` with the weights of `folder`; where its MLP is wider, the rest begins without effect.

    Raises UserError where another size differs.
    """
    weights = gemma.load_drafter(folder).state_dict()
    filled = drafter.state_dict()
    for name, weight in filled.items():
        old = weights[name]
        if weight.shape == old.shape:
            weight.copy_(old)
        elif name.endswith(("mlp.gate_proj.weight", "mlp.up_proj.weight")) and len(weight) > len(old):
            weight[: len(old)] = old
        elif name.endswith("mlp.down_proj.weight") and weight.shape[1] > old.shape[1]:
            weight.zero_()[:, : old.shape[1]] = old
        else:
            raise UserError(f"--init {folder}: {name} has another shape; give a drafter of the kind's sizes")
    drafter.load_state_dict(filled)

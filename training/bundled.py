"""Weights of a converted pair under the names that `training.dense` has: where a run goes on from a pair."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from mlx_gemma_mtp.errors import UserError
from training.cli import require

PREFIX = "language_model."
SWITCH = "experts.switch_glu."


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """float32 weights of a folder that `convert` wrote unquantised; gate and up of the experts are one tensor again."""
    require(folder, "model.safetensors", "--init", "give a folder with target/ and drafter/, as training.adopt writes")
    found = {
        name.removeprefix(PREFIX): value.float() for name, value in load_file(folder / "model.safetensors").items()
    }
    for name in [name for name in found if name.endswith(f"{SWITCH}gate_proj.weight")]:
        layer = name.split(SWITCH)[0]
        halves = [found.pop(f"{layer}{SWITCH}{part}_proj.weight") for part in ("gate", "up")]
        found[f"{layer}experts.gate_up_proj"] = torch.cat(halves, 1)
        found[f"{layer}experts.down_proj"] = found.pop(f"{layer}{SWITCH}down_proj.weight")
    return found


def fill(model: nn.Module, folder: Path) -> None:
    """Copy a folder's weights into a model of `training.dense`. Raises UserError where they are not of its shapes."""
    found = weights(folder)
    for name, weight in model.state_dict().items():
        if name not in found or found[name].shape != weight.shape:
            told = tuple(found[name].shape) if name in found else "missing"
            raise UserError(
                f"--init {folder}: {name} is {told}, expected {tuple(weight.shape)}; give a pair of these sizes"
            )
    model.load_state_dict({name: found[name] for name in model.state_dict()})

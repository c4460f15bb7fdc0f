"""Make a pair of what `training.minutes` left: `python -m training.adopt --weights DEST --out PAIR`.

Opens target.safetensors and drafter.safetensors in transformers' models of kind `moe`, and exports them as
`training.export` does. Where a run was cut before its drafter, train one with `python -m training.drafter`: with
`--target-only` the target's folder is written alone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.files import hub
from training import drafter, export, gemma, target
from training.cli import command, require
from training.kinds import MOE


def fill(model: nn.Module, file: Path) -> None:
    """Copy the weights of a file into a model with a tied head. Raises UserError where they are not the model's."""
    weights = {name: value.to(torch.float32) for name, value in load_file(file).items()}
    found = model.load_state_dict(weights, strict=False)
    left = [name for name in found.missing_keys if name != "lm_head.weight"] + found.unexpected_keys
    if left:
        raise UserError(f"{file}: {left[0]} is missing or too much; give weights of training.minutes")


def adopt(weights: Path, out: Path, target_only: bool = False) -> dict[str, int]:
    """Write out/trained/{target,drafter} (float32, Hugging Face layout), out/hf and out/{target,drafter}."""
    require(weights, "target.safetensors", "--weights", "give the folder that training.minutes wrote")
    model = target.build(MOE).eval()
    fill(model, weights / "target.safetensors")
    gemma.save(model, out / "trained" / "target")
    if target_only:
        return {}
    require(weights, "drafter.safetensors", "--weights", "the run was cut before it; use --target-only")
    drafts = drafter.build(model, MOE)
    fill(drafts, weights / "drafter.safetensors")
    drafts.generation_config.update(num_assistant_tokens=drafter.ROUND, num_assistant_tokens_schedule="constant")
    gemma.save(drafts, out / "trained" / "drafter")
    return export.export(out / "trained" / "target", out / "trained" / "drafter", hub.DEMO / "target", out)


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.adopt", description="Make a pair of trained weights.")
    parser.add_argument("--weights", type=Path, required=True, help="folder that training.minutes wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the pair into")
    parser.add_argument("--target-only", action="store_true")
    args = parser.parse_args(argv)
    print(adopt(args.weights, args.out, args.target_only))


if __name__ == "__main__":
    sys.exit(main())

"""Average the weights of models that were trained from one another: `python -m training.average A B --out OUT`.

Runs that start from the same weights stay close enough that their mean is better than each (Wortsman et al., Model
soups, arXiv 2203.05482).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

from mlx_gemma_mtp.errors import UserError
from training import gemma
from training.cli import command


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Each weight once: state_dict() names a tied one twice."""
    everything = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: weight for name, weight in everything.items() if weight.is_floating_point()}


@torch.no_grad()
def average(folders: list[Path], out: Path) -> None:
    """Write the mean of targets, or of drafters, in Hugging Face layout. Raises UserError where shapes differ."""
    model = gemma.load(folders[0])
    mean = _weights(model)
    for count, folder in enumerate(folders[1:], 2):
        other = _weights(gemma.load(folder))
        if {name: w.shape for name, w in other.items()} != {name: w.shape for name, w in mean.items()}:
            raise UserError(f"{folder} has other weights than {folders[0]}; average models of one kind")
        for name, weight in mean.items():
            weight.lerp_(other[name], 1 / count)
    gemma.save(model, out)


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.average", description="Average models of one line.")
    parser.add_argument("folders", type=Path, nargs="+", help="folders in Hugging Face layout")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args(argv)
    average(args.folders, args.out)


if __name__ == "__main__":
    sys.exit(main())

"""Published-looking checkpoints whose values follow from the tensors' names: a few kilobytes describe a whole model.

numpy's RandomState is frozen and uniform draws are exact arithmetic, so every machine gets the same float32 values.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

KINDS = ("moe", "dense", "unified", "e2b", "e4b")
DATA = Path(__file__).parent / "data" / "kinds"


def tensor(name: str, shape: Sequence[int], salt: str) -> np.ndarray:
    """The values of one tensor, float32 (token orderings: int64): no norm is one, attention is soft.

    `model.X` and `model.language_model.X` are the same tensor. salt: another one gives another model.
    """
    name = name.replace("model.language_model.", "model.")
    noise = np.random.RandomState(zlib.crc32(f"{salt} {name}".encode()))
    if name.endswith("token_ordering"):
        return noise.permutation(shape[0]).astype(np.int64)
    if name.endswith("layer_scalar"):
        values = noise.uniform(0.6, 1.2, shape)
    elif name.endswith("q_norm.weight"):  # attention has scale 1, so 1/sqrt(head_dim) lives here
        values = noise.uniform(0.5, 1.5, shape) * shape[0] ** -0.5
    elif len(shape) == 1:  # norms, router.scale, router.per_expert_scale
        values = noise.uniform(0.5, 1.5, shape)
    else:
        scale = 1.0 if "router.proj" in name else shape[-1] ** -0.5
        values = noise.uniform(-1, 1, shape) * 3**0.5 * scale
    return values.astype(np.float32)


def describe(kind: str) -> dict[str, dict[str, Any]]:
    """What is stored of a kind: for its target and its drafter `config` and `tensors` (name -> shape)."""
    return json.loads((DATA / f"{kind}.json").read_text(encoding="utf-8"))


def write(folder: Path, kind: str, side: str) -> Path:
    """The target or the drafter (`side`) of a kind, as a Hugging Face folder."""
    stored = describe(kind)[side]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(stored["config"]), encoding="utf-8")
    tensors = {name: mx.array(tensor(name, shape, f"{kind} {side}")) for name, shape in stored["tensors"].items()}
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})
    return folder

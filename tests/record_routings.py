"""Records which experts a trained target chooses: python tests/record_routings.py -> tests/data/routings.npz.

`experts`: uint8 [layers, tokens, top_k], of the first recorded greedy continuation (greedy.npz): 128 consecutive tokens
that the model wrote itself, as the passes of a verify see them.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from trained import DATA, MOE

from mlx_gemma_mtp.cache.cache import Cache
from mlx_gemma_mtp.models import moe
from mlx_gemma_mtp.models.loading import load_target

TOKENS = 128


def main() -> None:
    target = load_target(MOE / "target", mx.float32)
    with np.load(DATA / "greedy.npz") as recorded:
        prompt = recorded["prompts"][: recorded["prompts_lengths"][0]]
        tokens = mx.array(np.concatenate([prompt, recorded["tokens"][0][:TOKENS]]))[None]
    chosen, route = [], moe.route

    def recording(logits: mx.array, top_k: int, scale: mx.array) -> tuple[mx.array, mx.array]:
        experts, weights = route(logits, top_k, scale)
        chosen.append(experts)
        return experts, weights

    moe.route = recording
    cache = Cache(target.config.kv, tokens.size, target.dtype).open(tokens.size)
    mx.eval(target(tokens, cache.span(tokens.size)))
    experts = np.stack([np.array(layer)[-TOKENS:] for layer in chosen]).astype(np.uint8)
    np.savez_compressed(DATA / "routings.npz", experts=experts)
    print(f"{DATA / 'routings.npz'}: {experts.shape}, {(DATA / 'routings.npz').stat().st_size} bytes")


if __name__ == "__main__":
    main()

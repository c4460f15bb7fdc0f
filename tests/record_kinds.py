"""Record what transformers says about a tiny random pair of each kind into tests/data/kinds (needs extra `parity`).

    python tests/record_kinds.py

KIND.json describes the pair as published checkpoints are laid out: config.json, and names and shapes of all tensors
(E2B and E4B with the K/V projections that nobody reads). The values follow from the names (seeded.py).

KIND.npz holds numbers, float32: one text of five windows and its logits; four draft steps from three places on it (our
window rule); two prompts and 40 greedy tokens for each. The text's logits are thinned: every fourth column, and the
best four with their ids.
"""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import hf_oracle
import numpy as np
import seeded
import torch
from record_fixtures import ragged

TEXT, DRAFT_AFTER, STEPS, CONTINUATION = 40, (4, 9, 40), 4, 40
PROMPTS = (slice(0, 5), slice(3, 22))
ROUNDING, STEADY = 1e-7, 4e-5  # weights that differ by the first move no number by more than the second
CLEAR = 5e-4  # a chosen token leads by so much at least, or another machine might choose another


def published_config(model: hf_oracle.Target | hf_oracle.Assistant) -> dict[str, Any]:
    """config.json; a target's is wrapped as in the multimodal checkpoints."""
    with tempfile.TemporaryDirectory() as folder:
        config = json.loads((hf_oracle.save(model, Path(folder)) / "config.json").read_text())
    if "text_config" in config:
        return config
    outer = {"model_type": config["model_type"].removesuffix("_text"), "vision_config": {"hidden_size": 8}}
    return outer | {"text_config": config, "eos_token_id": [1], "tie_word_embeddings": True}


def published_shapes(model: hf_oracle.Target | hf_oracle.Assistant, target: bool) -> dict[str, list[int]]:
    """Names and shapes as in the multimodal checkpoints, the tied head left out."""
    shapes = {name: list(value.shape) for name, value in model.state_dict().items() if name != "lm_head.weight"}
    if not target:
        return shapes
    types = model.config.layer_types
    own = len(types) - model.config.num_kv_shared_layers
    for layer in range(own, len(types)):  # published, and read by nobody
        source = max(i for i in range(own) if types[i] == types[layer])
        for part in ("k_proj.weight", "v_proj.weight", "k_norm.weight"):
            shapes[f"model.layers.{layer}.self_attn.{part}"] = shapes[f"model.layers.{source}.self_attn.{part}"]
    return {name.replace("model.", "model.language_model.", 1): shape for name, shape in shapes.items()}


@torch.no_grad()
def fill(model: torch.nn.Module, salt: str) -> None:
    for name, value in model.state_dict().items():
        if name != "lm_head.weight":
            value.copy_(torch.from_numpy(seeded.tensor(name, value.shape, salt)))


def make_pair(kind: hf_oracle.Kind) -> tuple[hf_oracle.Target, hf_oracle.Assistant]:
    target, drafter = hf_oracle.random_target(kind, 0), hf_oracle.random_drafter(kind, 0)
    fill(target, f"{kind} target")
    fill(drafter, f"{kind} drafter")
    return target, drafter


def description(target: hf_oracle.Target, drafter: hf_oracle.Assistant) -> dict[str, Any]:
    models = {"target": target, "drafter": drafter}
    return {
        side: {"config": published_config(model), "tensors": published_shapes(model, side == "target")}
        for side, model in models.items()
    }


def clear(logits: np.ndarray) -> np.ndarray:
    best = np.sort(logits, axis=-1)
    lead = (best[..., -1] - best[..., -2]).min()
    if lead < CLEAR:
        raise SystemExit(f"a chosen token leads by {lead:.1e} only, expected {CLEAR}: take another text")
    return logits


def numbers(target: hf_oracle.Target, drafter: hf_oracle.Assistant) -> dict[str, np.ndarray]:
    text = np.random.RandomState(0).randint(2, hf_oracle.VOCAB, TEXT).tolist()
    prompts = [text[part] for part in PROMPTS]
    greedy = [hf_oracle.greedy(target, prompt, CONTINUATION) for prompt in prompts]
    for prompt, tokens in zip(prompts, greedy, strict=True):
        clear(hf_oracle.target_logits(target, prompt + tokens)[len(prompt) - 1 : -1])
    logits = hf_oracle.target_logits(target, text)
    top = np.argsort(-logits, axis=-1, kind="stable")[:, :4]
    drafts = [hf_oracle.draft_steps(target, drafter, text[:length], STEPS) for length in DRAFT_AFTER]
    return {
        "text": np.array(text, dtype=np.int32),
        "logits": logits[:, ::4],
        "top": top.astype(np.int32),
        "top_logits": np.take_along_axis(logits, top, axis=-1),
        "drafted_after": np.array(DRAFT_AFTER, dtype=np.int32),
        "draft_tokens": np.array([draft.tokens for draft in drafts], dtype=np.int32),
        "draft_logits": clear(np.array([draft.logits for draft in drafts], dtype=np.float32)),
        "draft_hidden": np.array([draft.hidden for draft in drafts], dtype=np.float32),
        **ragged("prompts", prompts),
        "greedy": np.array(greedy, dtype=np.int32),
    }


@torch.no_grad()
def check_steady(kind: hf_oracle.Kind, recorded: dict[str, np.ndarray]) -> None:
    """Weights of another rounding give nearly the same numbers: the fixture measures the code, not chaos."""
    pair = make_pair(kind)
    noise = torch.Generator().manual_seed(0)
    for weight in (*pair[0].parameters(), *pair[1].parameters()):
        weight.mul_(1 + ROUNDING * torch.randn(weight.shape, generator=noise))
    for name, value in numbers(*pair).items():
        moved = abs(recorded[name] - value).max()
        if moved > STEADY:
            raise SystemExit(
                f"{kind}: {name} moves by {moved:.1e} under rounding, expected {STEADY}: take other weights"
            )


def main() -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    seeded.DATA.mkdir(parents=True, exist_ok=True)
    for kind in seeded.KINDS:
        pair = make_pair(kind)
        text = json.dumps(description(*pair), indent=1, sort_keys=True)
        (seeded.DATA / f"{kind}.json").write_text(text + "\n", encoding="utf-8")
        recorded = numbers(*pair)
        check_steady(kind, recorded)
        np.savez_compressed(seeded.DATA / f"{kind}.npz", **recorded)
        different = [len(set(tokens)) for tokens in recorded["greedy"].tolist()]
        print(f"{kind}: {different} different tokens among {CONTINUATION} greedy ones")
    print(f"{sum(path.stat().st_size for path in seeded.DATA.iterdir()) / 1024:.0f} KiB")


if __name__ == "__main__":
    main()

"""Train an MTP drafter against a frozen target as it will be used: `python -m training.drafter --target FOLDER`.

The query at position t reads the target's keys and values of positions < t and keeps t for every step of a round. Step
1 reads the embedding of token t and the target's hidden state at t - 1; step k reads the embedding of token t + k - 1
and its own projected state. All positions of a window are trained at once: with queries 1 .. T and keys 0 .. T - 1 this
is causal attention. The loss is the cross-entropy to the target's own distribution, so text needs no labels; most of it
is the target's own replies.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers.models.gemma4.modeling_gemma4 import Gemma4ForCausalLM
from transformers.models.gemma4_assistant.configuration_gemma4_assistant import Gemma4AssistantConfig
from transformers.models.gemma4_assistant.modeling_gemma4_assistant import Gemma4AssistantForCausalLM

from mlx_gemma_mtp.errors import UserError
from training import clusters, corpus, data, gemma, selfgen, warm
from training.cli import command, positive, rate
from training.dense import initialise
from training.kinds import KINDS, Kind
from training.loop import Run, train
from training.optimizer import MuonAdam

SEED = 1
ROUND = 4  # draft steps
LENGTH = 512
FIRST_CHOICE = 0.5  # of the loss is for the target's first choice (greedy), the rest for its distribution
REPLIES = 3  # of 4 batches are the target's replies, the others the corpus
CLUSTER_LOSS = 0.25
MUON, ADAM = 0.02, 2e-3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FROM_TARGET = (
    "num_attention_heads", "num_key_value_heads", "head_dim", "global_head_dim", "num_global_key_value_heads",
    "attention_k_eq_v", "sliding_window", "max_position_embeddings", "vocab_size", "rope_parameters", "rms_norm_eps",
    "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip
OWN = {
    "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "final_logit_softcapping": None,
    "tie_word_embeddings": True, "enable_moe_block": False, "use_double_wide_mlp": False,
    "use_bidirectional_attention": None,
}  # fmt: skip


class Teacher:
    """A frozen target: what a drafter reads of it and learns from it."""

    def __init__(self, model: Gemma4ForCausalLM):
        self.model, self.cap = model, model.config.final_logit_softcapping

    @torch.no_grad()
    def __call__(self, tokens: torch.Tensor):
        """tokens [B, n] -> embeddings and final hidden states [B, n, hidden], logits [B, n, vocab], {kind: (k, v)}"""
        out = self.model.model(input_ids=tokens, use_cache=False, return_shared_kv_states=True)
        logits = gemma.soft_cap(self.model.lm_head(out.last_hidden_state), self.cap)
        shared = {kind: (k.float(), v.float()) for kind, (k, v) in out.shared_kv_states.items()}
        return self.model.model.embed_tokens(tokens).float(), out.last_hidden_state.float(), logits.float(), shared


def configure(target: Gemma4ForCausalLM, kind: Kind) -> Gemma4AssistantConfig:
    """A drafter of the kind's sizes; what its attention must share comes from the target."""
    shared = {key: value for key, value in gemma.plain(target.config).items() if key in FROM_TARGET}
    settings = shared | OWN | kind.drafter
    text = gemma.text_config(settings | {"num_kv_shared_layers": len(settings["layer_types"])})
    config = Gemma4AssistantConfig(
        text_config=text,
        backbone_hidden_size=target.config.hidden_size,
        use_ordered_embeddings=bool(kind.centroids),
        num_centroids=kind.centroids or 2048,
        centroid_intermediate_top_k=kind.top_clusters or 32,
    )
    config._attn_implementation = gemma.ATTENTION
    return config


@torch.no_grad()
def build(target: Gemma4ForCausalLM, kind: Kind) -> Gemma4AssistantForCausalLM:
    """A new drafter that begins near the target: its head is the target's embedding on its leading directions."""
    drafter = Gemma4AssistantForCausalLM(configure(target, kind))
    initialise(drafter, SEED)
    embedding = target.model.embed_tokens.weight.float().cpu()
    directions = torch.linalg.svd(embedding, full_matrices=False).Vh[: drafter.hidden_size]  # [own hidden, hidden]
    drafter.model.embed_tokens.weight.copy_(embedding @ directions.T)
    drafter.pre_projection.weight.copy_(0.7 * torch.cat([directions, directions], 1))
    drafter.post_projection.weight.copy_(directions.T)
    if kind.centroids:
        clusters.assign(drafter)
    return drafter


def start(target: Gemma4ForCausalLM, kind: Kind | None, init: Path | None) -> Gemma4AssistantForCausalLM:
    """A new drafter of the kind, filled from `init` where that is given; without a kind, `init` itself."""
    if kind:
        drafter = build(target, kind)
        if init:
            warm.widen_from(drafter, init)
        return drafter
    drafter = gemma.load_drafter(init)
    if (drafter.backbone_hidden_size, drafter.vocab_size) != (target.config.hidden_size, target.config.vocab_size):
        raise UserError(f"--init {init} was made for another target: its backbone's hidden size or vocabulary differs")
    return drafter


class Loss:
    """The drafter's loss on windows of text, and the share of positions where steps 1 .. k name the target's choice.

    Queries are independent of each other, so a step is scored only where all steps before it were right: elsewhere its
    draft would be thrown away.
    """

    def __init__(self, teacher: Teacher, drafter: Gemma4AssistantForCausalLM):
        self.teacher, self.drafter = teacher, drafter
        for layer in drafter.model.layers:
            if layer.self_attn.is_sliding:  # the query's own key is not there yet: the window is one key shorter
                layer.self_attn.sliding_window = drafter.model.config.sliding_window - 1

    def __call__(self, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        """tokens [B, T + ROUND] -> what to minimise, and figures: nats of the first step, shares of kept drafts"""
        length = tokens.shape[1] - ROUND
        embedded, hidden, logits, shared = self.teacher(tokens)
        shared = {kind: (k[:, :, :length], v[:, :, :length]) for kind, (k, v) in shared.items()}
        positions = torch.arange(1, length + 1, device=tokens.device)[None]
        alive = torch.ones_like(tokens[:, :length], dtype=torch.bool)
        state, losses, kept = hidden[:, :length], [], []
        for step in range(1, ROUND + 1):
            out, state = self._step(embedded[:, step : step + length], state, shared, positions)
            wanted = logits[:, step : step + length][alive]  # [n, vocab]
            entropy, chosen = self._entropy(out[alive], wanted)
            losses.append(entropy / alive.numel())
            alive = alive.masked_scatter(alive, chosen == wanted.argmax(-1))
            kept.append(alive.float().mean().item())
        figures = {"loss": losses[0].item()} | {f"kept_{k}": share for k, share in enumerate(kept, 1)}
        return torch.stack(losses).sum(), figures

    def _step(self, embedded, state, shared, positions) -> tuple[torch.Tensor, torch.Tensor]:
        drafter = self.drafter
        out = drafter.model(
            inputs_embeds=drafter.pre_projection(torch.cat([embedded, state], -1)),
            attention_mask=dict.fromkeys(shared),  # `gemma.attend` is causal by itself
            position_ids=positions,
            shared_kv_states=shared,
            use_cache=False,
        ).last_hidden_state
        return out, drafter.post_projection(out)

    def _entropy(self, out: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """out [n, own hidden], the target's logits [n, vocab] -> their cross-entropy, summed, and the drafts [n]"""
        scores, choice = self.drafter.lm_head(out), F.one_hot(wanted.argmax(-1), wanted.shape[-1])
        wanted = (1 - FIRST_CHOICE) * wanted.softmax(-1) + FIRST_CHOICE * choice
        loss = -(wanted * scores.log_softmax(-1)).sum()
        if self.drafter.masked_embedding is None:
            return loss, scores.argmax(-1)
        centroids = self.drafter.masked_embedding.centroids(out)
        grouped = clusters.group(self.drafter, wanted)
        loss = loss - CLUSTER_LOSS * (grouped * centroids.log_softmax(-1)).sum()
        return loss, clusters.shortlisted(self.drafter, scores, centroids).argmax(-1)


@torch.no_grad()
def held_out(loss: Loss, stream: np.ndarray, length: int, limit: int = 12) -> dict[str, float]:
    """The loss and the shares of kept drafts on a held-out stream."""
    rows = torch.from_numpy(data.windows(stream, length + ROUND - 1, limit))
    parts = [(loss(part.to(loss.teacher.model.device))[1], len(part)) for part in rows.split(6)]
    return {f"held_{name}": sum(part[name] * count for part, count in parts) / len(rows) for name in parts[0][0]}


@dataclass(frozen=True)
class Plan:
    """How a drafter is trained."""

    steps: int
    rows: int = 3
    rate: float = 1.0  # times the learning rates above
    init: Path | None = None  # start from this drafter folder
    dtype: torch.dtype = torch.float32  # of the target; the drafter is trained in float32
    device: str = "cpu"
    save_every: int = 25
    stop_after: int | None = None  # leave after so many steps, as a kill would


def fit(kind: Kind | None, target: Path, source: Path, replies: np.ndarray, out: Path, plan: Plan) -> bool:
    """Train; the finished drafter lies in `out`/hf in Hugging Face layout, float32. Returns whether it finished."""
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    run, text = Run(out), data.load(source)
    teacher = Teacher(gemma.load_target(target, dtype=plan.dtype, device=plan.device))
    if int(text.train.max()) >= teacher.model.config.vocab_size:
        raise UserError(f"--data {source} is in another vocabulary than --target {target}; make it with its tokenizer")
    drafter = start(teacher.model, kind, plan.init)
    loss = Loss(teacher, drafter.to(plan.device))
    optimizer = MuonAdam(drafter, MUON * plan.rate, ADAM * plan.rate)

    def step_loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        turn, place = divmod(step, REPLIES + 1)
        stream, index = (replies, turn * REPLIES + place) if place < REPLIES else (text.train, turn)
        tokens = torch.from_numpy(data.batch(stream, SEED, index, plan.rows, LENGTH + ROUND - 1))
        return loss(tokens.to(plan.device))

    def evaluate() -> dict[str, float]:
        drafter.eval()
        return held_out(loss, text.held["chat"], LENGTH)

    if not train(run, drafter, optimizer, step_loss, evaluate, plan.steps, plan.save_every, plan.stop_after):
        return False
    drafter.generation_config.update(num_assistant_tokens=ROUND, num_assistant_tokens_schedule="constant")
    gemma.save(drafter, out / "hf")
    return True


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.drafter", description="Train a drafter for a target.")
    parser.add_argument("--target", type=Path, required=True, help="target folder in Hugging Face layout")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; a run in it is resumed")
    parser.add_argument("--data", type=Path, help="what python -m training.data wrote; default: OUT/data, made here")
    parser.add_argument("--kind", choices=KINDS, help="whose sizes to use; default: those of --init, or moe")
    parser.add_argument("--steps", type=positive, help="default: the kind's")
    parser.add_argument("--replies", type=positive, help="tokens of the target's replies; default: the kind's")
    parser.add_argument("--init", type=Path, help="start from this drafter folder, e.g. the published one")
    parser.add_argument("--rate", type=rate, default=1.0, help="times the learning rate; 0.5 suits --init")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the target")
    parser.add_argument("--device", default="cpu", help="torch's name of it, such as mps or cuda; default: cpu")
    args = parser.parse_args(argv)
    kind = KINDS[args.kind or "moe"]
    source = args.data or args.out / "data"
    if not (source / "train.npy").exists():
        made = data.load_tokenizer(args.target)
        data.prepare(source, corpus.read(), made)
    place = {"dtype": DTYPES[args.dtype], "device": args.device}
    replies = selfgen.replies(args.target, source, args.out / "replies", args.replies or kind.replies, **place)
    plan = Plan(args.steps or kind.drafter_steps, kind.drafter_rows, args.rate, args.init, **place)
    sizes = None if args.init and not args.kind else kind
    fit(sizes, args.target, source, replies, args.out, plan)


if __name__ == "__main__":
    sys.exit(main())

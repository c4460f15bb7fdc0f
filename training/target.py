"""Train a small Gemma 4 target from scratch: `python -m training.target --data DATA --out RUN`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.gemma4.modeling_gemma4 import Gemma4ForCausalLM

from training import data, gemma, warm
from training.cli import command, positive, rate
from training.dense import initialise
from training.kinds import KINDS, Kind, Phase
from training.loop import Run, train
from training.optimizer import MuonAdam

BALANCE = 0.02  # weight of the routers' load-balancing loss
MUON, ADAM = 0.03, 3e-3


class Batches:
    """Batch of a step: which phase it falls in, and which windows."""

    def __init__(self, stream: np.ndarray, phases: Sequence[Phase], steps: int, seed: int):
        self.stream, self.phases, self.seed = stream, phases, seed
        ends = np.round(np.cumsum([phase.share for phase in phases]) * steps).astype(int)
        self.starts = [0, *ends.tolist()]

    def __call__(self, step: int) -> torch.Tensor:
        """int64 [rows, length + 1]"""
        place = next(i for i, end in enumerate(self.starts[1:]) if step < end)
        phase, index = self.phases[place], step - self.starts[place]
        rows, length = phase.rows, phase.length
        if phase.rare and index % phase.rare == phase.rare - 1:
            rows, length, index = 1, phase.rare_length, index // phase.rare
        return torch.from_numpy(data.batch(self.stream, self.seed, index, rows, length))


class Loss:
    """Cross-entropy of the next token and the routers' balance, compiled as one graph."""

    def __init__(self, model: Gemma4ForCausalLM, compiled: bool = False):
        self.model, self.cap = model, model.config.final_logit_softcapping
        self.loads: list[torch.Tensor] = []
        for layer in model.model.layers:
            if layer.enable_moe_block:
                layer.router.register_forward_hook(self._balance)
        self.compiled = torch.compile(self.parts, dynamic=False) if compiled else self.parts

    def _balance(self, router: nn.Module, inputs: tuple, outputs: tuple) -> None:
        probabilities, _, chosen = outputs  # [tokens, experts], .., [tokens, top]
        experts = probabilities.shape[-1]
        share = F.one_hot(chosen, experts).float().sum(1).mean(0) / chosen.shape[-1]
        self.loads.append(experts * (share * probabilities.mean(0)).sum())  # 1 when even

    def parts(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """tokens [rows, length + 1] -> cross-entropy in nats a token, and the mean balance of the routers."""
        self.loads.clear()
        hidden = self.model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
        logits = gemma.soft_cap(self.model.lm_head(hidden), self.cap)
        entropy = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        balance = torch.stack(self.loads).mean() if self.loads else entropy.new_zeros(())
        return entropy, balance


@torch.no_grad()
def held_out(parts, held: dict[str, np.ndarray], length: int, limit: int | None = None) -> dict[str, float]:
    """Nats a token on the held-out streams in windows of `length`."""
    means = {}
    for name, stream in held.items():
        rows = torch.from_numpy(data.windows(stream, length, limit))
        losses = [parts(part)[0].item() * len(part) for part in rows.split(6)]
        means[f"held_{name}"] = sum(losses) / len(rows)
    return means


def build(kind: Kind, seed: int = 0) -> Gemma4ForCausalLM:
    model = Gemma4ForCausalLM(gemma.text_config(kind.target))
    initialise(model, seed)
    return model


@dataclass(frozen=True)
class Plan:
    """How a target is trained."""

    steps: int
    rate: float = 1.0  # times the learning rates above
    init: Path | None = None  # start from this target folder
    long: bool = False  # the last phase alone
    seed: int = 0  # of the first weights and of the order of the text
    compiled: bool = False
    save_every: int = 25
    stop_after: int | None = None  # leave after so many steps, as a kill would


def fit(kind: Kind, source: Path, out: Path, plan: Plan) -> bool:
    """Train; the finished model lies in `out`/hf in Hugging Face layout, float32. Returns whether it finished."""
    torch.use_deterministic_algorithms(True)
    model, text = build(kind, plan.seed), data.load(source)
    phases = (replace(kind.phases[-1], share=1.0),) if plan.long else kind.phases
    run, length = Run(out), kind.phases[0].length
    if plan.init and not run.state.exists():
        warm.start_from(model, plan.init, text.train)
    loss, batches = Loss(model, plan.compiled), Batches(text.train, phases, plan.steps, plan.seed)
    optimizer = MuonAdam(model, MUON * plan.rate, ADAM * plan.rate)

    def step_loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        tokens = batches(step)
        entropy, balance = loss.compiled(tokens)
        figures = {"loss": entropy.item(), "balance": balance.item(), "tokens": tokens[:, 1:].numel()}
        return entropy + BALANCE * balance, figures

    def evaluate() -> dict[str, float]:
        model.eval()
        return held_out(loss.parts, text.held, length, 16)

    if not train(run, model, optimizer, step_loss, evaluate, plan.steps, plan.save_every, plan.stop_after):
        return False
    model.eval()
    run.log(step=plan.steps, final=True, **held_out(loss.parts, text.held, length))
    gemma.save(model, out / "hf")
    return True


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.target", description=__doc__)
    parser.add_argument("--kind", choices=KINDS, default="moe")
    parser.add_argument("--data", type=Path, required=True, help="folder that python -m training.data wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; a run in it is resumed")
    parser.add_argument("--steps", type=positive, help="default: the kind's")
    parser.add_argument("--init", type=Path, help="start from this target folder (Hugging Face layout)")
    parser.add_argument("--rate", type=rate, default=1.0, help="times the learning rate; 0.5 suits --init")
    parser.add_argument("--long", action="store_true", help="only the last phase, of long windows")
    parser.add_argument("--seed", type=int, default=0, help="another one reads the text in another order")
    parser.add_argument("--compile", action="store_true", help="torch.compile: minutes to start, a tenth faster")
    args = parser.parse_args(argv)
    kind = KINDS[args.kind]
    steps = args.steps or kind.target_steps
    plan = Plan(steps, args.rate, args.init, args.long, args.seed, args.compile)
    fit(kind, args.data, args.out, plan)


if __name__ == "__main__":
    sys.exit(main())

"""The last part of a run: target and drafter learn together, so that the target's choices are easy to foresee.

A frozen target's drafter can only learn what the target's states happen to tell. Here the drafter's loss reaches the
states, keys and values that it reads, and the target leans a little to what the drafter expects; its own loss on the
text keeps what it knows. Afterwards the drafter goes on alone, on the replies of the target as it is then.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from training.dense import Drafter, Out, Target
from training.optimizer import MuonAdam, rate_scale

if TYPE_CHECKING:
    from training.minutes import Text, Writer

RATES = 0.1, 0.3  # of the target's and the drafter's rates from nothing: both have been annealed before
REACH = 0.3  # share of the drafter's gradient that the target gets
LEAN = 0.15  # weight of the drafter's first distribution beside the text itself
REPLIES_END, END = 0.08, 0.62  # of the whole time
OWN = 0.4  # of the rows are the target's own replies


def softened(x: torch.Tensor) -> torch.Tensor:
    """The same values, with REACH of the gradient."""
    return REACH * x + (1 - REACH) * x.detach()


def loss(
    target: Target, drafter: Drafter, tokens: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What both minimise, and [nats a token, shares of kept drafts ..]. tokens [B, T + ROUND]"""
    from training import minutes

    with minutes.autocast(tokens.device.type):
        out = target(tokens)
        logits = target.logits(out.hidden)
        reached = Out(softened(out.hidden), out.balance, [(softened(k), softened(v)) for k, v in out.kept])
    drafts, shares, first = minutes.guesses(target, drafter, tokens, weights, reached, logits.detach())
    flat = logits[:, :-1].flatten(0, 1)
    marks = weights[:, 1:].flatten()
    nats = (F.cross_entropy(flat, tokens[:, 1:].flatten(), reduction="none") * marks).sum() / marks.sum()
    length = first.shape[1]
    marks = weights[:, 2 : 2 + length].flatten()
    expected = first.detach().softmax(-1).flatten(0, 1)
    lean = F.cross_entropy(logits[:, 1 : 1 + length].flatten(0, 1), expected, reduction="none")
    lean = (lean * marks).sum() / marks.sum()
    total = nats + minutes.BALANCE * out.balance + LEAN * lean + drafts
    return total, torch.cat([nats.detach()[None], shares])


def fit(
    target: Target,
    drafter: Drafter,
    text: Text,
    own: tuple[torch.Tensor, torch.Tensor],
    writer: Writer,
    rows: int,
    end: float,
) -> None:
    """Train both until second `end` of the run; a killed run goes on from its last state."""
    from training import minutes

    clock, noise = writer.clock, torch.Generator().manual_seed(int(writer.clock.spent * 1000))
    both, optimizers = nn.ModuleList([target, drafter]), {}
    parts = {"target": (target, minutes.TARGET_RATES, RATES[0]), "drafter": (drafter, minutes.DRAFTER_RATES, RATES[1])}
    for name, (model, rates, share) in parts.items():
        optimizers[name] = MuonAdam(model, rates[0] * share, rates[1] * share, router=1e-2 * share)
        writer.resume(f"together-{name}", model, optimizers[name])
    start, step, recent, marked = writer.began("together"), 0, [], time.time()

    def once(rows: int) -> None:
        tokens, weights = minutes.mixed(text, own, rows, OWN, 0.1, noise)
        value, figures = loss(target, drafter, tokens, weights)
        value.backward()
        for optimizer in optimizers.values():
            optimizer.step(rate_scale(clock.share(start, end), 1.0))
        recent.append(figures)

    while clock.share(start, end) < 1.0:
        rows = minutes.fits(rows, once, both)
        step += 1
        if step % 5 == 0 and text.device == "cuda":
            torch.cuda.synchronize()
        if step % minutes.LOG == 0 or step == 1:
            figures = torch.stack(recent[-minutes.LOG :]).mean(0).tolist()
            speed = minutes.LOG * rows * (text.width - 1) / (time.time() - marked)
            recent, marked = recent[-1:], time.time()
            kept = [round(share, 4) for share in figures[1:]]
            writer.log(part="together", step=step, loss=figures[0], kept=kept, rows=rows, a_second=speed)
            due = clock.spent - writer.saved > minutes.SAVE
            for name, (model, *_) in parts.items():
                if not math.isfinite(figures[0]):
                    writer.go_back(f"together-{name}", model, optimizers[name])
                elif due:
                    writer.state(f"together-{name}", model, optimizers[name])
                    writer.weights(name, model)
    for name, (model, *_) in parts.items():
        writer.weights(name, model)
        writer.state(name, model, None)
    (writer.work / "together.done").touch()
    writer.log(part="together", step=step, done=True)

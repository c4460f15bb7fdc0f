"""The loop that target and drafter share: by steps, resumable, with progress and a log of JSON lines.

A run is a pure function of its arguments: batches depend on the step alone, and the learning rate on step / steps. So
a run that was killed and resumed ends where an uninterrupted one does.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from training.optimizer import MuonAdam, rate_scale

LOG_EVERY = 20  # steps; what is logged is their mean

Loss = Callable[[int], tuple[torch.Tensor, dict[str, float]]]


class Run:
    """A folder with `state.pt` (the newest checkpoint) and `log.jsonl`."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def state(self) -> Path:
        return self.folder / "state.pt"

    @property
    def log_file(self) -> Path:
        return self.folder / "log.jsonl"

    def log(self, **record: Any) -> None:
        rounded = {key: round(value, 5) if isinstance(value, float) else value for key, value in record.items()}
        with self.log_file.open("a") as file:
            file.write(json.dumps(rounded) + "\n")

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log_file.read_text().splitlines()] if self.log_file.exists() else []

    def save(self, step: int, model: nn.Module, optimizer: MuonAdam) -> None:
        """Write the checkpoint beside the old one, then put it in its place: a kill leaves one of them whole."""
        new = self.state.with_suffix(".new")
        torch.save({"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, new)
        os.replace(new, self.state)

    def resume(self, model: nn.Module, optimizer: MuonAdam) -> int:
        """Load the checkpoint, if there is one, and forget what was logged after it. Returns the steps done."""
        if not self.state.exists():
            self.log_file.unlink(missing_ok=True)
            return 0
        state = torch.load(self.state, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        kept = [record for record in self.records() if record["step"] <= state["step"]]
        self.log_file.write_text("".join(json.dumps(record) + "\n" for record in kept))
        return state["step"]


def train(
    run: Run,
    model: nn.Module,
    optimizer: MuonAdam,
    loss_of: Loss,
    evaluate: Callable[[], dict[str, float]],
    steps: int,
    save_every: int = 25,
    stop_after: int | None = None,
) -> bool:
    """Train to `steps`, resuming from the run's checkpoint. `loss_of(step)` gives the loss and figures to log.

    Held-out figures are logged at the start, at five places on the way and at the end; `stop_after` ends early, as a
    kill would. Returns whether the run is finished.
    """
    done = run.resume(model, optimizer)
    if done == 0:
        run.log(step=0, **evaluate())
    began, recent = time.monotonic(), []
    with tqdm(total=steps, initial=done, unit="step", mininterval=5, desc=run.folder.name) as bar:
        for step in range(done, steps):
            if stop_after is not None and step >= stop_after:
                return False
            model.train()
            loss, figures = loss_of(step)
            loss.backward()
            optimizer.step(rate_scale(step, steps))
            recent = [*recent, figures][-LOG_EVERY:]
            means = {name: sum(entry[name] for entry in recent) / len(recent) for name in figures}
            bar.set_postfix(loss=f"{means['loss']:.3f}", refresh=False)
            bar.update()
            last = step + 1 == steps
            if (step + 1) % LOG_EVERY == 0:
                run.log(step=step + 1, seconds=time.monotonic() - began, **means)
            if (step + 1) % max(1, steps // 6) == 0 or last:
                run.log(step=step + 1, **evaluate())
            if (step + 1) % save_every == 0 or last:
                run.save(step + 1, model, optimizer)
    return True

"""The whole pair in minutes on one GPU, within a time that is given: `python -m training.minutes --seconds 540 ..`.

Needs PyTorch, numpy and safetensors alone; shards of tokens come from processes of `training.shards` while it runs. The
learning rates follow the clock, so that a run is annealed when its time is over, however fast the machine is. Every
minute the state goes to --work, from where the same command goes on after a kill; every two minutes, and after SIGTERM,
the weights go to --out: target.safetensors, drafter.safetensors (bfloat16, names as transformers has them), log.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from training import bundled, together
from training.cli import command, positive
from training.dense import Drafter, KeyValue, Out, Sizes, Target, begin_near, generate, initialise
from training.optimizer import MuonAdam, rate_scale

TINY = Sizes(hidden=64, dense=64, experts=4, top=2, expert=32, layers=(True, False), drafter_hidden=48,
             drafter_dense=64, drafter_layers=(True, False))  # fmt: skip
BALANCE = 0.02
TARGET_RATES, DRAFTER_RATES = (0.03, 3e-3), (0.02, 2e-3)  # Muon's and Adam's
QUESTION = 0.1  # weight of a question's tokens beside its reply's
RAW = ((0.35, 0.6), (0.7, 0.25), (1.0, 0.08))  # until this share of the target's time, so much of the text is modules
LONG_EVERY, LONG = 16, 6  # batches, rows end to end: windows of 6,144 tokens
ROUND = 4
FIRST_CHOICE = 0.5
STOP = (1, 6)
NEW_TOKENS = 200  # of a reply
SAMPLES = 12  # held-out questions whose replies go to the log
SAMPLED = 4  # every so-many-th batch of replies is sampled
OWN_REPLIES = 0.75  # of the drafter's rows
TARGET_END, REPLIES_END = 0.62, 0.70  # of the whole time
RESERVE = 12  # seconds to write the last weights
LOOK, LOG, SAVE, EXPORT = 100, 50, 60, 120  # steps between looks for new shards and log lines; seconds


class Clock:
    """The time that is left; SIGTERM ends it."""

    def __init__(self, begin: float, seconds: float):
        self.begin, self.seconds = begin, seconds
        signal.signal(signal.SIGTERM, self._end)

    def _end(self, *_: Any) -> None:
        self.seconds = 0.0

    @property
    def spent(self) -> float:
        return time.time() - self.begin

    @property
    def over(self) -> bool:
        return self.spent >= self.end

    @property
    def end(self) -> float:
        """When training must end, so that the last weights are written in time."""
        return self.seconds - min(RESERVE, 0.1 * self.seconds)

    def share(self, start: float, end: float) -> float:
        """How much of the time from second `start` to `end` is over, 0 .. 1; 1 when all of it is."""
        if self.over:
            return 1.0
        return min(1.0, max(0.0, (self.spent - start) / max(1e-3, end - start)))


class Text:
    """Rows of tokens on the device: of modules, of pairs and of own replies. New shards are taken up as they appear."""

    def __init__(self, folder: Path, device: str, width: int):
        self.folder, self.device, self.width = folder, device, width
        self.taken: set[str] = set()
        self.raw = torch.zeros(0, dtype=torch.int16, device=device)
        self.pairs = torch.zeros(0, width, dtype=torch.int16, device=device)
        self.replies = torch.zeros(0, width, dtype=torch.uint8, device=device)
        self.questions: list[list[int]] = []

    def look(self) -> None:
        raw, pairs, replies = [self.raw], [self.pairs], [self.replies]
        for file in sorted(self.folder.glob("*-*.npz")):
            if file.name in self.taken:
                continue
            self.taken.add(file.name)
            shard = np.load(file)
            if file.name.startswith("raw"):
                raw.append(torch.from_numpy(shard["stream"].view(np.int16)).to(self.device))
                continue
            pairs.append(torch.from_numpy(shard["rows"].view(np.int16)).to(self.device))
            replies.append(torch.from_numpy(shard["replies"]).to(self.device))
            self.questions += split(shard["asked"], shard["lengths"])
        if len(raw) + len(pairs) > 2:
            self.raw, self.pairs, self.replies = torch.cat(raw), torch.cat(pairs), torch.cat(replies)

    def wait(self, clock: Clock) -> None:
        while not (len(self.raw) > 8 * LONG * self.width and len(self.pairs)):
            if clock.over:
                sys.exit("no shards came")
            time.sleep(0.5)
            self.look()

    def batch(self, rows: int, share: float, noise: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 tokens [rows, width] and the weight of each; `share` of the rows are modules"""
        raw = round(rows * share)
        modules = windows(self.raw, raw, self.width, noise)
        place = torch.randint(len(self.pairs), (rows - raw,), generator=noise).to(self.device)
        weights = self.replies[place].float() * (1 - QUESTION) + QUESTION
        return torch.cat([modules, self.pairs[place].long()]), torch.cat([torch.ones_like(modules) * 1.0, weights])


def split(flat: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
    return [part.tolist() for part in np.split(flat, np.cumsum(lengths)[:-1])] if len(lengths) else []


def windows(stream: torch.Tensor, rows: int, width: int, noise: torch.Generator) -> torch.Tensor:
    starts = torch.randint(max(1, len(stream) - width), (rows,), generator=noise).to(stream.device)
    return stream[starts[:, None] + torch.arange(width, device=stream.device)].long()


@dataclass
class Writer:
    """Where weights and the log go."""

    out: Path
    work: Path
    clock: Clock
    saved: float = 0.0
    exported: float = 0.0

    def log(self, **record: Any) -> None:
        record = {"seconds": self.clock.spent, **record}
        rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in record.items()}
        print(json.dumps(rounded)[:300], flush=True)
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(rounded) + "\n")

    def began(self, part: str) -> float:
        """The second at which a part began, also in a run that was killed since: its rates follow the clock."""
        note = self.work / f"{part}.start"
        if not note.exists():
            note.write_text(str(self.clock.spent))
        return float(note.read_text())

    def weights(self, name: str, model: nn.Module) -> None:
        """bfloat16, in place of the older file."""
        state = {
            key: value.detach().to("cpu", torch.bfloat16).contiguous() for key, value in model.state_dict().items()
        }
        new = self.work / f"{name}.new"
        save_file(state, new, {"format": "pt"})
        staged = self.out / f".{name}.new"
        staged.write_bytes(new.read_bytes())
        os.replace(staged, self.out / f"{name}.safetensors")
        self.exported = self.clock.spent

    def state(self, name: str, model: nn.Module, optimizer: MuonAdam | None) -> None:
        """What a killed run goes on from."""
        new = self.work / "state.new"
        torch.save({"model": model.state_dict(), "optimizer": optimizer and optimizer.state_dict()}, new)
        os.replace(new, self.work / f"{name}.pt")
        self.saved = self.clock.spent

    def due(self, name: str, model: nn.Module, optimizer: MuonAdam, figure: float) -> None:
        """Save what is due, if `figure` is a number; else go back to the last state at half the rates."""
        if not math.isfinite(figure):
            self.go_back(name, model, optimizer)
            return
        if self.clock.spent - self.saved > SAVE:
            self.state(name, model, optimizer)
        if self.clock.spent - self.exported > EXPORT:
            self.weights(name, model)

    def go_back(self, name: str, model: nn.Module, optimizer: MuonAdam) -> None:
        """To the last state, at half the rates."""
        self.log(lost=name)
        self.resume(name, model, optimizer)
        optimizer.rate /= 2
        optimizer.rates = [rate / 2 for rate in optimizer.rates]

    def resume(self, name: str, model: nn.Module, optimizer: MuonAdam) -> None:
        file = self.work / f"{name}.pt"
        if file.exists():
            state = torch.load(file, map_location="cpu", weights_only=True)
            model.load_state_dict(state["model"])
            if state["optimizer"]:
                optimizer.load_state_dict(state["optimizer"])
            self.log(resumed=name)


def autocast(device: str):
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


def fits(rows: int, step: Callable[[int], None], model: nn.Module) -> int:
    """Do a step, with half the rows as often as the GPU's memory is too small. Returns the rows of the next one."""
    while True:
        try:
            step(rows)
            return rows
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
        for weight in model.parameters():
            weight.grad = None
        torch.cuda.empty_cache()
        rows //= 2


# ----------------------------------------------------------------------------------------- target


def target_loss(target: Target, tokens: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What to minimise, and nats a token (weighted)."""
    with autocast(tokens.device.type):
        out = target(tokens[:, :-1])
        logits = target.logits(out.hidden)
    losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    nats = (losses * weights).sum() / weights.sum()
    return nats + BALANCE * out.balance, nats.detach()


def fit_target(target: Target, text: Text, writer: Writer, rows: int, end: float) -> None:
    clock, noise = writer.clock, torch.Generator().manual_seed(int(writer.clock.spent * 1000))
    optimizer = MuonAdam(target, *TARGET_RATES)
    writer.resume("target", target, optimizer)
    start, step, recent, marked = writer.began("target"), 0, [], time.time()

    def once(rows: int) -> None:
        share = clock.share(start, end)
        modules = next(part for until, part in RAW if share <= until)
        if step % LONG_EVERY == LONG_EVERY - 1 and share > 0.5:
            tokens = windows(text.raw, max(1, rows // LONG), LONG * (text.width - 1) + 1, noise)
            loss, nats = target_loss(target, tokens, torch.ones_like(tokens) * 1.0)
        else:
            loss, nats = target_loss(target, *text.batch(rows, modules, noise))
            recent.append(nats)
        loss.backward()
        optimizer.step(rate_scale(share, 1.0))

    while clock.share(start, end) < 1.0:
        rows = fits(rows, once, target)
        step += 1
        if step % 10 == 0 and text.device == "cuda":
            torch.cuda.synchronize()  # the clock sets the rate: do not run ahead of it
        if step % LOOK == 0:
            text.look()
        if step % LOG == 0 or step == 1:
            speed = LOG * rows * (text.width - 1) / (time.time() - marked)
            marked, loss = time.time(), torch.stack(recent[-LOG:]).mean().item()
            recent = recent[-1:]
            writer.log(part="target", step=step, loss=loss, rows=rows, a_second=speed, pairs=len(text.pairs),
                       raw=len(text.raw))  # fmt: skip
            writer.due("target", target, optimizer, loss)
    writer.weights("target", target)
    writer.state("target", target, None)
    (writer.work / "target.done").touch()
    writer.log(part="target", step=step, loss=torch.stack(recent).mean().item() if recent else None, done=True)


@torch.no_grad()
def held_out(target: Target, file: Path, device: str, tokenizer: Path) -> dict[str, Any]:
    """Nats a token on held-out replies, and some replies to look at."""
    if not file.exists():
        return {}
    from tokenizers import Tokenizer

    shard, tok = np.load(file), Tokenizer.from_file(str(tokenizer))
    rows = torch.from_numpy(shard["rows"].view(np.int16)).long()[:64].to(device)
    marks = torch.from_numpy(shard["replies"]).float()[:64].to(device)
    nats = [target_loss(target, *part)[1].item() for part in zip(rows.split(16), marks.split(16), strict=True)]
    asked = split(shard["asked"], shard["lengths"])[:SAMPLES]
    with autocast(device):
        made = generate(target, asked, NEW_TOKENS, STOP)
    return {"held_out": sum(nats) / len(nats), "samples": [tok.decode(row, skip_special_tokens=False) for row in made]}


# ---------------------------------------------------------------------------------------- replies


def own_replies(
    target: Target, text: Text, writer: Writer, until: float, rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of questions with the target's own replies, and marks of the replies, [n, width], on the device."""
    rng, clock, start = np.random.default_rng(int(writer.clock.spent)), writer.clock, writer.clock.spent
    tokens: list[int] = []
    marks: list[int] = []
    turn = 0
    while turn < 1 or clock.share(start, until) < 1.0:
        asked = [text.questions[i] for i in rng.choice(len(text.questions), min(rows, len(text.questions)), False)]
        with autocast(text.device):
            made = generate(target, asked, NEW_TOKENS, STOP, 1.0 if turn % SAMPLED == SAMPLED - 1 else 0.0)
        for question, row in zip(asked, made, strict=True):
            tokens += row
            marks += [0] * len(question) + [1] * (len(row) - len(question))
        turn += 1
    count = max(1, len(tokens) // text.width)
    while len(tokens) < text.width:
        tokens, marks = tokens * 2, marks * 2
    whole = np.array(tokens[: count * text.width]).reshape(count, -1)
    writer.log(part="replies", tokens=len(tokens), batches=turn, replied=sum(marks) / turn / rows)
    replied = np.array(marks[: count * text.width]).reshape(count, -1)
    return torch.from_numpy(whole).to(text.device), torch.from_numpy(replied).float().to(text.device)


# ---------------------------------------------------------------------------------------- drafter


def drafter_loss(
    target: Target, drafter: Drafter, tokens: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What to minimise, and the shares of kept drafts [ROUND]; see `training.drafter.Loss`. tokens [B, T + ROUND]"""
    with torch.no_grad(), autocast(tokens.device.type):
        out = target(tokens)
        logits = target.logits(out.hidden)
    return guesses(target, drafter, tokens, weights, out, logits)[:2]


def guesses(
    target: Target, drafter: Drafter, tokens: torch.Tensor, weights: torch.Tensor, out: Out, logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`drafter_loss` of a forward of the target that was done, and the logits of the first step [B, T, V]"""
    length = tokens.shape[1] - ROUND
    with autocast(tokens.device.type):
        with torch.no_grad():
            choices = logits.argmax(-1)  # [B, T + ROUND]
            wanted = (1 - FIRST_CHOICE) * logits.softmax(-1)
            wanted.scatter_add_(-1, choices[..., None], torch.full_like(wanted[..., :1], FIRST_CHOICE))
            del logits
            embedded = target.embed(tokens)
        kept: dict[bool, KeyValue] = {
            kind: tuple(x[:, :, :length] for x in out.kept[layer]) for kind, layer in target.sizes.read.items()
        }
        weights = weights[:, 2 : 2 + length] + QUESTION  # the first step drafts token t + 1, t from 1
        total = weights.sum()
        alive = torch.ones_like(weights)
        state, losses, shares, first = out.hidden[:, :length], [], [], None
        for step in range(1, ROUND + 1):
            hidden, state = drafter(embedded[:, step : step + length], state, kept)
            scores = drafter.logits(hidden)
            first = scores if first is None else first
            place = slice(step, step + length)
            entropy = F.cross_entropy(scores.flatten(0, 1), wanted[:, place].flatten(0, 1), reduction="none")
            losses.append((entropy * (weights * alive).flatten()).sum() / total)
            alive = alive * (scores.argmax(-1) == choices[:, place])
            shares.append((alive * weights).sum() / total)
    return torch.stack(losses).sum(), torch.stack(shares).detach(), first


def mixed(
    text: Text, own: tuple[torch.Tensor, torch.Tensor], rows: int, share: float, modules: float, noise: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and weights of rows of which `share` are own replies; of the others `modules` are modules."""
    mine = max(1, round(rows * share))
    place = torch.randint(len(own[0]), (mine,), generator=noise).to(text.device)
    tokens, weights = own[0][place], own[1][place]
    if rows > mine:
        others, marks = text.batch(rows - mine, modules, noise)
        tokens, weights = torch.cat([tokens, others]), torch.cat([weights, marks])
    return tokens, weights


def fit_drafter(
    target: Target,
    drafter: Drafter,
    text: Text,
    own: tuple[torch.Tensor, torch.Tensor],
    writer: Writer,
    rows: int,
    share: float,
) -> None:
    """Train the drafter until the run's end, with `share` of the rates of one from nothing."""
    clock, noise = writer.clock, torch.Generator().manual_seed(int(writer.clock.spent * 1000))
    optimizer = MuonAdam(drafter, *(rate * share for rate in DRAFTER_RATES))
    writer.resume("drafter", drafter, optimizer)
    start, end = writer.began("drafter"), clock.end
    step, recent, marked = 0, [], time.time()

    def once(rows: int) -> None:
        loss, shares = drafter_loss(target, drafter, *mixed(text, own, rows, OWN_REPLIES, 0.2, noise))
        loss.backward()
        optimizer.step(rate_scale(clock.share(start, end), 1.0))
        recent.append(shares)

    while clock.share(start, end) < 1.0:
        rows = fits(rows, once, drafter)
        step += 1
        if step % 5 == 0 and text.device == "cuda":
            torch.cuda.synchronize()
        if step % LOG == 0 or step == 1:
            shares = torch.stack(recent[-LOG:]).mean(0).tolist()
            speed = LOG * rows * (text.width - 1) / (time.time() - marked)
            recent, marked = recent[-1:], time.time()
            writer.log(part="drafter", step=step, kept=[round(share, 4) for share in shares], rows=rows, a_second=speed)
            writer.due("drafter", drafter, optimizer, sum(shares))
    writer.weights("drafter", drafter)
    shares = torch.stack(recent).mean(0).tolist() if recent else None
    writer.log(part="drafter", step=step, kept=shares, done=True)


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.minutes", description="Train a pair in minutes.")
    parser.add_argument("--shards", type=Path, required=True, help="folder that training.shards fills")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json, to print samples")
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights and the log")
    parser.add_argument("--work", type=Path, required=True, help="folder for the state of a killed run")
    parser.add_argument("--seconds", type=positive, required=True, help="from --begin to the last byte written")
    parser.add_argument("--begin", type=float, default=time.time(), help="when the time began (seconds since 1970)")
    parser.add_argument(
        "--init", type=Path, help="go on from this pair, target/ and drafter/ as training.adopt wrote them"
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="a toy model, to see that all parts work")
    parser.add_argument("--rows", type=positive, default=64, help="of a batch; the drafter's are half")
    parser.add_argument("--length", type=positive, default=1024, help="of a row, as the shards have it")
    parser.add_argument("--replies", type=positive, default=768, help="questions answered together")
    args = parser.parse_args(argv)
    for folder in (args.out, args.work):
        folder.mkdir(parents=True, exist_ok=True)
    clock = Clock(args.begin, args.seconds)
    writer = Writer(args.out, args.work, clock)
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward with a mask is the least used of the three
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    writer.log(begin=True, device=name, torch=torch.__version__)
    sizes = TINY if args.tiny else Sizes()
    target, drafter = Target(sizes), Drafter(sizes)
    initialise(target, 0)
    initialise(drafter, 1)
    target, text = target.to(args.device), Text(args.shards, args.device, args.length + 1)
    text.wait(clock)
    rate = (go_on if args.init else from_nothing)(target, drafter, text, writer, args)
    drafter_alone(target, drafter.to(args.device), text, writer, args, rate)
    writer.log(done=True)


def from_nothing(target: Target, drafter: Drafter, text: Text, writer: Writer, args: argparse.Namespace) -> float:
    """The target; the drafter begins near it. Returns the share of the drafter's learning rates."""
    if not ready(target, "target", args.work):
        fit_target(target, text, writer, args.rows, args.seconds * TARGET_END)
    begin_near(drafter, target)
    return 1.0


def go_on(target: Target, drafter: Drafter, text: Text, writer: Writer, args: argparse.Namespace) -> float:
    """From a pair: replies, then both together. Returns the share of the drafter's learning rates."""
    for name, model in (("target", target), ("drafter", drafter)):
        bundled.fill(model, args.init / name)
    drafter, rows = drafter.to(args.device), max(1, args.rows // 2)
    if ready(target, "together", args.work):
        ready(drafter, "together", args.work, "drafter")
    else:
        own = own_replies(target, text, writer, args.seconds * together.REPLIES_END, args.replies)
        together.fit(target, drafter, text, own, writer, rows, args.seconds * together.END)
    return together.RATES[1]


def drafter_alone(
    target: Target, drafter: Drafter, text: Text, writer: Writer, args: argparse.Namespace, rate: float
) -> None:
    """With the target as it is: what it says of the held-out text, its replies, the drafter."""
    target.requires_grad_(False)
    if writer.clock.over:
        return
    writer.log(part="held out", **held_out(target, args.shards / "held.npz", args.device, args.tokenizer))
    text.look()
    own = own_replies(target, text, writer, args.seconds * REPLIES_END, args.replies)
    fit_drafter(target, drafter, text, own, writer, max(1, args.rows // 2), rate)


def ready(model: nn.Module, part: str, work: Path, name: str = "target") -> bool:
    """Whether a killed run had finished a part; then the model gets its weights."""
    if not (work / f"{part}.done").exists():
        return False
    model.load_state_dict(torch.load(work / f"{name}.pt", map_location="cpu", weights_only=True)["model"])
    return True


if __name__ == "__main__":
    sys.exit(main())

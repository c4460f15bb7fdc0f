"""What rounds cost here: measured by running the loop itself, kept in a file, corrected in use."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx

from .._version import __version__
from ..cache.cache import Cache
from ..cache.spec import KVSpec, row_bytes
from ..files.files import CACHE
from ..files.folder import weight_files
from ..files.hub import Pair
from ..machine import blas, device, memory
from ..models.drafter import Drafter
from ..models.gemma4 import Gemma4
from ..models.linear import measured_rules
from ..models.loading import format_of, model_bytes, step_bytes
from ..ops import kernels
from ..sampling.distribution import Rules
from ..sampling.params import SamplingParams
from ..speculative.costs import (
    CONTEXTS,
    MAX_DRAFTS,
    ROWS,
    WIDEST,
    Attention,
    Cell,
    CostFile,
    CostTable,
    Drafted,
    Place,
    Verified,
    updated,
)
from ..speculative.drafting import DEFAULT_DRAFTING, MTP, Drafting
from ..speculative.loop import Speculation
from ..speculative.prefill import prefill

QUICK_SECONDS = 0.7  # of rounds, after which a first start times no others; a slow machine takes a dozen rounds
QUICK = (((1, 0), (0, 1, 4, WIDEST)),)  # what a first start measures: see `Grid`; the widest says what more rows cost
SLOW = 0.3  # seconds of the first width, from which the whole takes long enough to be announced
# Rounds are timed after this text.
TEXT = "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n    return total\n"
WIDE = (8, 11, WIDEST)  # drafts of all sources: beyond eight queries a row MLX's attention goes another way
COPIES = 2  # of a batch's K/V: a cache that grows is copied
LONG_WIDTHS = (0, 1, 3, 7, 8, WIDEST)  # after a long text, where times are linear between
# Kinds of text: their rounds differ in cost (noise, filters) and in acceptance.
KINDS = {
    "greedy": SamplingParams(temperature=0.0, top_p=1.0, top_k=-1, seed=0),
    "sampled": SamplingParams(temperature=1.0, top_p=0.95, top_k=64, seed=0),
}


Grid = Sequence[tuple[Place, Sequence[int]]]  # places, and the drafts that are verified in each, rising


@dataclass
class Timings:
    """Seconds of measured rounds, a list of repeats for each cell.

    chained: rounds that also make as many new drafts as they verify. alone: rounds that make none.
    """

    chained: dict[Cell, list[float]] = field(default_factory=dict)
    alone: dict[Cell, list[float]] = field(default_factory=dict)

    def add(self, cell: Cell, chained: float, alone: float) -> None:
        """Adds one more repeat of a cell, in seconds."""
        self.chained.setdefault(cell, []).append(chained)
        self.alone.setdefault(cell, []).append(alone)

    def warm(self) -> Timings:
        """Returns the timings without each cell's first repeat, where the cell has another."""
        chained, alone = ({cell: s[1:] or s for cell, s in part.items()} for part in (self.chained, self.alone))
        return Timings(chained, alone)

    def parts(self) -> tuple[dict[Cell, float], dict[Place, float]]:
        """Splits the times into the seconds of each verify (costs.Verified) and of one draft (costs.Drafted).

        Both parts add up to the chained rounds, as far as the drafter makes so many drafts: wider verifies are of
        copies, which cost nothing to make. No part is below a thousandth of the fastest round, however noisy the times
        are.
        """
        rounds, alone = (
            {cell: min(s) for cell, s in part.items()} for part in (self.chained, self.alone)
        )  # noise only adds
        floor, each = min(rounds.values()) * 1e-3, {}
        for cell in rounds:
            if width := cell[2]:
                each.setdefault(cell[:2], []).append((rounds[cell] - alone[cell]) / width)
        drafted = {place: max(median(seconds), floor) for place, seconds in each.items()}
        verified = {
            cell: alone[cell] if cell[2] > MAX_DRAFTS else s - cell[2] * drafted[cell[:2]] for cell, s in rounds.items()
        }
        return {cell: max(seconds, floor) for cell, seconds in verified.items()}, drafted


class Bench:
    """A batch of equal rows after `context` committed tokens, on which a round can be timed repeatedly.

    Real text fills the first tokens of the cache, so the router chooses experts as in use. The rest of a long context
    is zeros, which take the same time.
    """

    def __init__(
        self,
        target: Gemma4,
        drafter: Drafter | None,
        prompt: Sequence[int],
        params: SamplingParams,
        rows: int,
        context: int,
        drafting: Drafting = DEFAULT_DRAFTING,
        specs: Sequence[KVSpec] | None = None,
    ):
        """specs: of the caches; None for those of the model's type."""
        self.target, self.drafter, self.drafting = target, drafter, drafting
        self.rows, self.context = rows, max(context, len(prompt))
        specs = target.config.kv if specs is None else specs
        (prefilled,), hidden = prefill(target, [prompt], len(prompt), drafting.lookback, specs=specs)
        self.cache = Cache(specs, WIDEST + 1, target.dtype, drafting.lookback)
        self.cache.arrange([prefilled.save(0)] * rows)
        self.hidden = mx.repeat(hidden, rows, axis=0)
        self.rules = Rules.of([params] * rows, target.config.vocab_size)

    def rounds(self, width: int) -> tuple[float, float]:
        """Returns the seconds of a round that verifies `width` drafts and makes as many, and of one that makes none.

        Each is timed after a round of its kind, since in use the weights are in the processor's caches. Of what copies
        alone make so wide the first does not count (see Timings.parts), so nothing comes before it.
        """
        self.cache.lengths = mx.full((self.rows,), self.context, mx.int32)
        self.cache.length_bound = [self.context] * self.rows
        loop = Speculation(self.target, self.drafter, self.cache, self.drafting.alone, confident=True)
        loop.begin(self.hidden, self.rules)
        for _ in range(2 if width <= MAX_DRAFTS else 1):
            loop.step([width] * self.rows)
        chained, alone = _seconds(loop, width), _seconds(loop, 0)
        loop.launch()  # what was built must not stay behind as a copy of the cache
        mx.synchronize()
        return chained, alone


def grid_of(target: Gemma4, drafter: Drafter, specs: Sequence[KVSpec], full: bool = False) -> Grid:
    """Returns what a calibration measures: all rows after a short text, one row after those long ones of CONTEXTS that
    the model and its memory reach.

    full: all rows and widths after the long texts, too.
    """
    drafts, found = (*range(MAX_DRAFTS + 1), *WIDE), []
    free = memory.total_bytes() - model_bytes(target) - model_bytes(drafter)
    for context in CONTEXTS:
        for rows in ROWS if full or not context else ROWS[:1]:
            taken = rows * row_bytes(specs, context, WIDEST + 1, target.dtype.size)
            if context < target.config.context and (not context or COPIES * taken <= free):
                found.append(((rows, context), LONG_WIDTHS if context and not full else drafts))
    return found


def _seconds(loop: Speculation, drafts: int) -> float:
    began = time.perf_counter()
    loop.launch()
    loop.step([drafts] * loop.cache.rows)
    return time.perf_counter() - began


def measure(
    target: Gemma4,
    drafter: Drafter,
    prompt: Sequence[int],
    params: SamplingParams,
    grid: Grid,
    repeats: int,
    seconds: float = math.inf,
    progress: Callable[[int, int], None] = lambda done, total: None,
    drafting: Drafting = DEFAULT_DRAFTING,
    specs: Sequence[KVSpec] | None = None,
) -> Timings:
    """Times every cell `repeats` times after a first pass that warms up, with the widths in turn. One batch is in
    memory at a time.

    prompt: token ids. params: how tokens are drawn. seconds: a budget of round time, without compilation; once it is
    spent, nothing more begins, but two widths of each place are always timed. progress: called with the rounds timed
    and all rounds. drafting: whose drafts are timed. specs: of the caches, as Bench takes them. The first pass counts
    only for cells that have no other repeat.
    """
    timings, spent, done = Timings(), 0.0, 0
    total = sum(len(widths) for _, widths in grid) * (repeats + 1)
    for place, widths in grid:
        bench = Bench(target, drafter, prompt, params, *place, drafting, specs)
        for cell in [(repeat, width) for repeat in range(repeats + 1) for width in widths]:
            if spent > seconds and cell not in ((0, width) for width in widths[:2]):
                break
            chained, alone = bench.rounds(cell[1])
            timings.add((*place, cell[1]), chained, alone)
            spent += 2 * (chained + alone)  # each comes after one of its kind
            done += 1
            progress(done, total)
    return timings.warm()


class Costs:
    """The source of an engine's cost table for one kind of text: the file of its pair on this machine, else a short
    measurement.

    kind: a key of KINDS. file: None keeps nothing. notice: called with a sentence that the user should know. seconds:
    the budget of a first start's measurement (see `measure`). drafting: whose drafts are timed. specs: of the caches,
    as Bench takes them. attention: by which a long context is estimated until it is measured.
    """

    def __init__(
        self,
        kind: str,
        file: CostFile | None = None,
        notice: Callable[[str], None] = lambda message: None,
        seconds: float = QUICK_SECONDS,
        drafting: Drafting = DEFAULT_DRAFTING,
        specs: Sequence[KVSpec] | None = None,
        attention: Attention | None = None,
    ):
        self.kind, self.file, self.notice, self.seconds = kind, file, notice, seconds
        self.drafting, self.specs, self.attention = drafting, specs, attention

    @classmethod
    def of_pair(
        cls,
        pair: Pair,
        target: Gemma4,
        drafter: Drafter | None,
        notice: Callable[[str], None],
        drafting: Drafting,
        specs: Sequence[KVSpec] = (),
    ) -> dict[str, Costs]:
        """Returns the Costs of every kind of text, by kind. Without a drafter they have no file."""
        if drafter is None:
            return {kind: cls(kind) for kind in KINDS}
        key = _key(pair, target, drafter) | {"source": drafting.source or MTP} | _bits(specs)
        files = {kind: CostFile({"text": kind} | key) for kind in KINDS}
        how = {"drafting": drafting, "specs": specs or None, "attention": attention(target, drafter, specs)}
        return {kind: cls(kind, file, notice, **how) for kind, file in files.items()}

    def table(self, target: Gemma4, drafter: Drafter, prompt: Sequence[int]) -> CostTable:
        """Returns the table from the file, or measures a short one and writes it.

        prompt: token ids that rounds are timed after.
        """
        if (kept := self.kept()) is not None:
            return kept
        began = time.perf_counter()

        def told(done: int, total: int) -> None:
            if done == 1 and time.perf_counter() - began > SLOW:
                self.notice(
                    "measuring what drafts cost on this machine, once; after long texts it is estimated until "
                    "`python -m mlx_gemma_mtp.calibrate` measures it"
                )

        timings = measure(
            target, drafter, prompt, KINDS[self.kind], QUICK, 3, self.seconds, told, self.drafting, self.specs
        )
        self._write(*timings.parts())
        return CostTable.of(*timings.parts(), attention=self.attention)

    def measured(
        self,
        target: Gemma4,
        drafter: Drafter,
        prompt: Sequence[int],
        repeats: int,
        progress: Callable[[int, int], None],
        full: bool = False,
    ) -> CostTable:
        """Measures the whole grid now, writes it, and returns its table. Takes a minute or two, or, with `full`, much
        longer.
        """
        cells = grid_of(target, drafter, self.specs or target.config.kv, full)
        how = {"progress": progress, "drafting": self.drafting, "specs": self.specs}
        verified, drafted = measure(target, drafter, prompt, KINDS[self.kind], cells, repeats, **how).parts()
        known = verified, drafted, {cell for cell in verified if cell[2]}  # as sure as what use has corrected
        self._write(*known)
        return CostTable.of(*known, self.attention)

    def kept(self) -> CostTable | None:
        """Returns the table in the file, or None where there is none."""
        known = self._read()
        return CostTable.of(*known, self.attention) if known else None

    @property
    def where(self) -> str:
        """The path of the file, or "nowhere"."""
        return "nowhere" if self.file is None else str(self.file.path)

    def learn(self, verified: Verified, drafted: Drafted) -> None:
        """Overwrites cells of the file with times from use. Starts a file where there is none."""
        if verified and self.file is not None:
            *before, learned = self._read() or ({}, {}, set())
            self._write(*updated(*before, verified, drafted), learned | {cell for cell in verified if cell[2]})

    def _read(self) -> tuple[dict[Cell, float], dict[Place, float], set[Cell]] | None:
        try:
            return self.file and self.file.read()
        except ValueError as error:
            self.notice(f"the costs in {self.file.path} are ignored: {error}; they are measured anew")
            return None

    def _write(self, verified: Verified, drafted: Drafted, learned: Iterable[Cell] = ()) -> None:
        try:
            if self.file is not None:
                self.file.write(verified, drafted, learned)
        except OSError as error:
            self.notice(
                f"the costs of rounds cannot be kept in {self.file.path} ({error.strerror}), so that every start "
                f"measures them; name a folder that can be written: {CACHE}=FOLDER"
            )


def attention(target: Gemma4, drafter: Drafter, specs: Sequence[KVSpec] = ()) -> Attention | None:
    """Returns what the longest context adds to a round, by the bytes of K/V that full layers read beside a plain step's
    weights, or None where the model reaches no long context. Each query reads them anew, to be careful.
    """
    context = max(each for each in CONTEXTS if each < target.config.context)
    specs, share = specs or target.config.kv, context / step_bytes(target)
    slots = [spec.slot_bytes(target.dtype.size) if spec.window is None else 0 for spec in specs]
    read = (sum(slots[layer.kv_layer] for layer in model.config.layers) for model in (target, drafter))
    return Attention(*(each * share for each in read), context) if context else None


def _key(pair: Pair, target: Gemma4, drafter: Drafter) -> dict[str, Any]:
    """What a round's cost depends on."""
    on_cpu = device.kind() is device.Kind.CPU
    return {
        "target": fingerprint(pair.target),
        "drafter": fingerprint(pair.drafter),
        "weights": [format_of(target), format_of(drafter)],
        "dtype": [str(target.dtype), str(drafter.layers[0].input_layernorm.weight.dtype)],
        "kernels": _kernels(target),
        "backend": f"CPU, {os.cpu_count()} cores, {blas.name()}, {_threads()}" if on_cpu else device.kind(),
        "chip": _processor() if on_cpu else device.name(),
        "versions": {"mlx": mx.__version__, "mlx_gemma_mtp": __version__},
    }


def _bits(specs: Sequence[KVSpec]) -> dict[str, Any]:
    """Returns the bits of each layer's K/V; nothing where all are of the model's type."""
    bits = [spec.bits for spec in specs]
    return {"kv_bits": bits} if any(bits) else {}


def _kernels(target: Gemma4) -> dict[str, Any]:
    """Which kernels run: ours or their references, and which way products and experts of a pass go, by its tokens.

    Both change by a switch, a failed check or the doctor's rules, on the same machine with the same versions.
    """
    widths = range(1, ROWS[-1] * (WIDEST + 1) + 1)
    products = [str(target.embed_tokens.path(target.dtype, tokens)) for tokens in widths]
    found: dict[str, Any] = {"ours": kernels.status(), "products": _runs(products)}
    if rules := measured_rules(target):
        found["measured"] = rules
    if moe := target.config.moe:
        experts = target.layers[0].experts
        found["experts"] = _runs([str(experts.path(target.dtype, moe.top_k * tokens)) for tokens in widths])
    return found


def _runs(ways: Sequence[str]) -> list[list[str | int]]:
    """Each path with how many widths take it, one after the other."""
    return [[path, len(list(run))] for path, run in groupby(ways)]


def _threads() -> str:
    """How many threads the BLAS was told to take."""
    return f"{os.environ.get('OPENBLAS_NUM_THREADS', 'any number of')} threads"


def fingerprint(folder: Path) -> str:
    """Of a model folder: its config, and the sizes of its weight files."""
    sizes = sorted((file.name, file.stat().st_size) for file in weight_files(folder))
    return sha256((folder / "config.json").read_bytes() + repr(sizes).encode()).hexdigest()[:16]


def _processor() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())

"""What MTP can gain with Gemma 4 26B-A4B on Apple Silicon: `python -m benchmarks.moe_cost [--routing FILE]`.

Printed are published measurements beside what the cost model (cost_model.py) says of them, with only the fixed time
fitted, to each report's own speed without MTP; then predicted ceilings of every chip. PREDICTIONS, not results: this
project has measured nothing on Apple Silicon.

How many distinct experts M tokens wake comes from U(M) = k M ** gamma, or from `--routing FILE`, a --json file of
`python -m mlx_gemma_mtp.trace_routing`. A trace of another model is carried over by the number of independent tokens
that would wake as many of its experts: an assumption, exact where both models have as many experts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.cost_model import ACCEPTANCE, CHIPS, FORMATS, LONGEST, STACK, STOCK, Model, Setup, Shape
from mlx_gemma_mtp.checks.overlap import independent_tokens, uniform
from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.models.config import DrafterConfig, MoESpec, TargetConfig

CONFIGS = Path(__file__).parent.parent / "tests" / "data" / "configs"
NAME = "gemma-4-26B-A4B-it"
GAMMA = 0.77  # Laguna XS 2.1, 256 experts, 8 a token: 39.4 distinct for 8 tokens (Luce-Org/lucebox#501)
LEAST_FIXED = 0.5e-3  # seconds, of a fixed time fitted to a report


@dataclass(frozen=True)
class Report:
    """A published speedup of MTP for this model. plain_tps: without MTP; None: not reported, STOCK's fixed time then.

    drafts, tokens: a round; measured: speedup; assumed: what the report does not say, empty where it says all.
    """

    chip: str
    setup: Setup
    plain_tps: float | None
    drafts: int
    tokens: float
    measured: float
    source: str
    assumed: str = ""


def _run(target: str, drafter: str, experts: str = "pairs") -> Setup:
    return replace(STOCK, target=target, drafter=drafter, experts=experts)


REPORTS = (
    Report("M5", _run("nvfp4", "4bit"), 38.8, 4, 3.35, 1.215, "performance.md of an omlx benchmark, M5, code"),
    Report("M5", _run("nvfp4", "4bit"), 38.6, 4, 2.60, 0.994, "the same, general text"),
    Report("M4 Max", _run("4bit", "bf16"), 75.0, 3, 2.98, 1.53, "mlx-vlm, reddit Hydroskeletal, code, 66 %"),
    Report("M4 Max", _run("4bit", "bf16"), 75.0, 3, 1.93, 0.95, "the same, prose, 31 %"),
    Report("M4 Max", _run("4bit", "bf16"), 51.3, 3, 1.24, 0.50, "the same, JSON, 8 %", "no cost of the grammar"),
    Report("M1 Max", _run("4bit", "bf16"), None, 3, 3.00, 1.13, "lilting.ch, code", "baseline, tokens a round"),
    Report("M5 Max", _run("4bit", "8bit", "cached"), 97.0, 3, 3.0, 1.42, "llama.cpp fork, 97 -> 138", "tokens a round"),
    Report("M2 Pro", _run("nvfp4", "4bit"), 44.3, 4, 2.60, 0.88, "the omlx benchmark, M2 Pro", "tokens a round"),
    Report("M2 Max", _run("5bit", "bf16"), None, 3, 3.70, 1.21, "Rapid-MLX#3593, 90 %", "baseline"),
    Report("M1 Pro", _run("4bit", "4bit"), 29.5, 2, 2.45, 0.92, "omlx#2748, 4k context", "tokens a round, context"),
    Report("M5 Pro", _run("8bit", "8bit"), 53.7, 2, 2.10, 0.88, "SwiftLM#109, 512 context", "tokens a round"),
)  # fmt: skip


def published() -> Shape:
    """The real pair, counted from its configs."""
    target, drafter = (json.loads((CONFIGS / f"{NAME}{end}.json").read_text()) for end in ("", "-assistant"))
    config = TargetConfig.from_dict(target)
    return Shape.of(config, DrafterConfig.from_dict(drafter, config))


def by_gamma(moe: MoESpec, gamma: float) -> Callable[[int], float]:
    """k M ** gamma, at most the uniform expectation."""
    even = lambda tokens: uniform(moe.num_experts, moe.top_k, tokens)  # noqa: E731
    return lambda tokens: min(even(tokens), moe.top_k * tokens**gamma)


def by_trace(moe: MoESpec, path: Path) -> Callable[[int], float]:
    """What a trace measured, carried over to `moe`. Raises UserError for what is no trace of enough tokens."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        counts = {point["tokens"]: point["measured"] for point in record["runs"]}
        tokens = {m: independent_tokens(record["experts"], record["top_k"], u) for m, u in counts.items()}
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError) as error:
        raise UserError(
            f"--routing {path} cannot be used ({type(error).__name__}: {error}); expected a --json file of "
            "python -m mlx_gemma_mtp.trace_routing"
        ) from None
    if missing := set(range(1, LONGEST + 2)) - tokens.keys():
        raise UserError(
            f"--routing {path} has no U({min(missing)}), expected U(1) to U({LONGEST + 1}); trace more tokens"
        )
    return lambda count: uniform(moe.num_experts, moe.top_k, tokens[count])


def compared(model: Model, report: Report) -> tuple[float, float]:
    """(the fixed time in seconds that gives the report's speed without MTP, the speedup that the model predicts)."""
    setup = report.setup
    if report.plain_tps:
        rest = model.forward(report.chip, replace(setup, fixed=0.0), 1)
        setup = replace(setup, fixed=max(1 / report.plain_tps - rest, LEAST_FIXED))
    plain, seconds = model.forward(report.chip, setup, 1), model.round(report.chip, setup, report.drafts)
    return setup.fixed, report.tokens * plain / seconds


def comparison(model: Model) -> Iterator[str]:
    yield "Published speedups of MTP against predicted ones (F: the fixed time, fitted to the speed without MTP alone)"
    yield ""
    yield "| chip | pair | drafts, tokens a round | F, ms | predicted | measured | error | source (assumed) |"
    yield "|---|---|---|---|---|---|---|---|"
    errors: dict[bool, list[float]] = {True: [], False: []}  # by whether the report says all that the model needs
    for report in REPORTS:
        fixed, predicted = compared(model, report)
        error = predicted / report.measured - 1
        errors[not report.assumed].append(error)
        source = f"{report.source} ({report.assumed})" if report.assumed else report.source
        cells = (
            report.chip, f"{report.setup.target}, {report.setup.drafter}", f"{report.drafts}, {report.tokens:.2f}",
            f"{fixed * 1e3:.1f}", f"{predicted:.2f}x", f"{report.measured:.2f}x", f"{error:+.0%}", source,
        )  # fmt: skip
        yield f"| {' | '.join(cells)} |"
    yield ""
    complete, others = errors[True], errors[False]
    mean, largest = statistics.fmean(map(abs, complete)), max(map(abs, complete))
    yield f"Error of rows that assume nothing: mean {mean:.0%}, largest {largest:.0%}; of those that do:"
    yield f"{min(others):+.0%} to {max(others):+.0%}. So it ranks; it does not promise. M1 and M2 come out too well."


def inputs(model: Model, source: str) -> Iterator[str]:
    """source: of the distinct experts."""
    shape, moe = model.shape, model.shape.target.moe
    yield f"{NAME}: {shape.total / 1e9:.2f} B parameters, {shape.active / 1e9:.2f} B read for a token"
    yield f"distinct experts a layer of M consecutive tokens: {source}"
    yield ""
    yield "| tokens M | pairs | uniform | distinct | 4-bit weights of a pass, GB: pairs / distinct |"
    yield "|---|---|---|---|---|"
    dense, slot = (size * FORMATS["4bit"] / 1e9 for size in (sum(shape.dense.values()), shape.slot))
    for m in range(1, LONGEST + 2):
        even, used = uniform(moe.num_experts, moe.top_k, m), model.run(m)
        sizes = f"{dense + moe.top_k * m * slot:.2f} / {dense + used * slot:.2f}"
        yield f"| {m} | {moe.top_k * m} | {even:.1f} | {used:.1f} | {sizes} |"


def ceilings(model: Model, chips: list[str]) -> Iterator[str]:
    yield "PREDICTED, not measured: 4-bit target, speedup over plain decoding of the same setup [drafts], tokens/s"
    for kind, acceptance in ACCEPTANCE.items():
        drafts = " ".join(f"{chance:.2f}" for chance in acceptance[:4])
        yield ""
        yield f"one row, {kind} text (drafts accepted, given those before: {drafts} ..)"
        yield ""
        yield f"| chip | GB/s | plain | {' | '.join(STACK)} |"
        yield "|---" * (3 + len(STACK)) + "|"
        for name in chips:
            found = [model.best(name, setup, acceptance) for setup in STACK.values()]
            cells = [f"{speedup:.2f}x [{drafts}] {rate:.0f}" for speedup, drafts, rate in found]
            chip, plain = CHIPS[name], 1 / model.forward(name, STOCK, 1)
            yield f"| {name} | {chip.bandwidth:g} | {plain:.0f} | {' | '.join(cells)} |"
    yield from _batches(model, chips)
    yield from _limits(model, chips)


def _batches(model: Model, chips: list[str]) -> Iterator[str]:
    """Several rows: pairs, grouped experts, and grouped experts with a dense kernel for 6 to 32 rows."""
    grouped = STACK["+ grouped expert kernel"]
    setups = (STACK["+ 4-bit drafter"], grouped, replace(grouped, dense_tile=True))
    sizes = (2, 4, 8, 16)
    yield ""
    yield "batches, general text, 4-bit drafter: pairs / 32k vocabulary and grouped experts / and a 16-row dense tile;"
    yield "speedup over plain decoding of the same setup and batch, in brackets tokens/s of all rows"
    yield ""
    yield f"| chip | {' | '.join(f'{size} rows' for size in sizes)} |"
    yield "|---" * (1 + len(sizes)) + "|"
    for name in chips:
        cells = []
        for size in sizes:
            found = [model.best(name, setup, ACCEPTANCE["general"], size) for setup in setups]
            rates = " / ".join(f"{rate:.0f}" for _, _, rate in found)
            cells.append(f"{' / '.join(f'{speedup:.2f}' for speedup, _, _ in found)} ({rates})")
        yield f"| {name} | {' | '.join(cells)} |"


def _limits(model: Model, chips: list[str]) -> Iterator[str]:
    """What bytes alone allow: no fixed time, no instructions, no exchange with the host."""
    setup, chances = STACK["+ grouped expert kernel"], (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
    found = [model.limit(chance, setup) for chance in chances]
    yield ""
    yield "the most that bytes alone allow: one row, 4-bit drafter with 32k vocabulary, each distinct expert read once"
    yield ""
    yield f"| each draft is accepted with | plain | {' | '.join(f'{chance:.2f}' for chance in chances)} |"
    yield "|---" * (2 + len(chances)) + "|"
    yield f"| speedup [drafts] | 1 | {' | '.join(f'{speedup:.2f}x [{drafts}]' for speedup, drafts in found)} |"
    for name in chips:
        plain = CHIPS[name].bytes_per_s / (model.shape.active * FORMATS[setup.target])
        rates = " | ".join(f"{plain * speedup:.0f}" for speedup, _ in found)
        yield f"| {name}, tokens/s | {plain:.0f} | {rates} |"


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 after a user error."""
    parser = argparse.ArgumentParser(prog="benchmarks.moe_cost", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--chips", nargs="+", choices=CHIPS, default=list(CHIPS), metavar="CHIP", help="such as 'M4 Max'"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--gamma", type=float, default=GAMMA, help=f"of U(M) = k M ** gamma (default: {GAMMA})")
    source.add_argument("--routing", type=Path, metavar="FILE", help="measured U(M): a --json file of trace_routing")
    args = parser.parse_args(argv)
    try:
        if not 0 <= args.gamma <= 1:
            raise UserError(f"--gamma is {args.gamma}, expected 0 (the same experts for all) to 1 (no overlap)")
        shape = published()
        moe = shape.target.moe
        run = by_trace(moe, args.routing) if args.routing else by_gamma(moe, args.gamma)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    source = f"measured, {args.routing}" if args.routing else f"{moe.top_k} M^{args.gamma:g}, at most uniform"
    model = Model(shape, run)
    for section in (comparison(model), inputs(model, source), ceilings(model, args.chips)):
        print("\n".join(section), end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

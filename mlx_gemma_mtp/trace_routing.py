"""`python -m mlx_gemma_mtp.trace_routing`: which experts a mixture of experts wakes when it verifies drafts.

What its figures mean: see EPILOG, which --help prints.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checks.overlap import FITTED, NEIGHBOURS, Figures
from .cli.command import Bar, Parser, check_file, check_plot, command, loaded, written
from .cli.plots import dress, heading, panels
from .cli.prompts import PROMPTS, read_prompts
from .errors import UserError
from .files.folder import read_config
from .machine import blas
from .sampling.params import SamplingParams

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_DRAFTS = 1000  # the cache has room for a whole round
EPILOG = """\
A layer of a mixture of experts reads k of its E experts for each token. A pass over several tokens must read every
expert that any of them chose, U of them: fewer than the pairs of a token and an expert where tokens agree. U is what
a pass costs where each expert is read once a pass; pairs are what it costs where each pair reads its expert again.
  pairs      k for each token
  uniform    E (1 - (1 - k/E)^M), the expected U of M tokens that choose evenly and independently
  measured   mean U over samples and layers; in brackets the least and the greatest layer
  gamma      of U(M) = k M^gamma, fitted to M = 2..8; 1 is no overlap, 0 is the same experts for all. `uniform` has a
             gamma below 1, too, and the smaller E/k the lower: compare with that, not with other models' gammas
Tables: U of M consecutive tokens of a text (accepted drafts are part of it, the prompt is not); U of one verify of R
rows x (K+1) tokens, rejected drafts included; and the shared share of two tokens' experts, by chance k/E: neighbours
in a text, rows of a batch at one offset, rejected drafts with the token that came to stand at their place. The first
rejected draft of a round follows the same text as that token, later ones do not. The text is that of
mlx_gemma_mtp.generate. benchmarks/moe_cost.py turns a --json file into predicted speeds.
"""


def parser() -> argparse.ArgumentParser:
    p = Parser(
        "mlx_gemma_mtp.trace_routing",
        description="Generate with MTP and log which experts the router chooses.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--model", help="a converted folder or a hub id (default: the small bundled pair)")
    p.add_argument("--draft-model", default="auto", metavar="PATH|auto|none", help="the drafter (default: auto)")
    p.add_argument("--draft-bits", type=int, metavar="N", help="quantise a bf16 drafter to N bits while loading")
    p.add_argument("--prompt", action="append", default=[], help="a prompt; repeat it for more; - reads standard input")
    p.add_argument("--prompt-file", metavar="FILE", help="a prompt a line (default: eight short ones)")
    p.add_argument("--max-tokens", type=int, default=256, help="at most so many tokens a prompt (default: 256)")
    p.add_argument("--temp", type=float, help="temperature; 0 is greedy (default: as generation_config.json says)")
    p.add_argument("--seed", type=int, default=0, help="same seed, same text (default: 0)")
    p.add_argument("--num-draft-tokens", type=int, default=4, metavar="N", help="drafts a round (default: 4)")
    p.add_argument("--batch", type=int, default=8, metavar="N", help="prompts generated together (default: 8)")
    p.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    p.add_argument("--plot", type=Path, metavar="FILE.png", help="draw them (extra `bench`)")
    return p


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    return command(run, parser, argv)


def run(args: argparse.Namespace) -> int:
    prompts = read_prompts(args) if args.prompt or args.prompt_file else list(PROMPTS)
    params = SamplingParams(max_tokens=args.max_tokens, temperature=args.temp, seed=args.seed)
    _check(args)
    blas.preload()
    figures, about = measure(args, prompts, params)
    record = about | figures
    print(text(record))
    if args.json:
        with written(args.json) as part:
            part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        with written(args.plot) as part:
            plot(record, part, args.plot.suffix[1:])
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.batch < 1:
        raise UserError(f"--batch is {args.batch}, expected 1 or more")
    if not 0 <= args.num_draft_tokens <= MOST_DRAFTS:
        raise UserError(f"--num-draft-tokens is {args.num_draft_tokens}, expected 0 (plain decoding) to {MOST_DRAFTS}")
    if args.json:
        check_file("--json", args.json)
    if args.plot:
        check_plot(args.plot)


def measure(args: argparse.Namespace, prompts: Sequence[str], params: SamplingParams) -> tuple[dict, dict]:
    """Generates all texts; returns (the figures, what they were taken from)."""
    from .checks.routing_trace import trace
    from .files import hub
    from .machine import memory
    from .models.config import TargetConfig

    folder = hub.find_pair(args.model, args.draft_model, None).target
    moe = TargetConfig.from_dict(read_config(folder)).moe
    if moe is None:
        raise UserError(f"{folder} has no experts to route to; expected a mixture of experts, such as the 26B-A4B")
    engine = loaded(args.model, args.draft_model, draft_bits=args.draft_bits)
    if engine.drafter is None and args.num_draft_tokens:
        raise UserError(
            "there is no drafter; name one with --draft-model, or trace plain decoding: --num-draft-tokens 0"
        )
    encoded = [engine.text.encode(prompt) for prompt in prompts]
    figures, passes, progress = Figures(moe.num_experts, moe.top_k), 0, Bar("tracing")
    with memory.wired_limit():
        for start in range(0, len(encoded), args.batch):
            _, verifies = trace(engine, encoded[start : start + args.batch], params, args.num_draft_tokens)
            figures.add(verifies)
            passes += len(verifies)
            progress(min(start + args.batch, len(encoded)), len(encoded))
    if not figures.tokens:
        raise UserError(f"no text has a second token to trace at --max-tokens {args.max_tokens}; ask for more")
    about = {
        "model": str(args.model or "the bundled pair"),
        "computed": engine.description,
        "prompts": len(prompts),
        "batch": args.batch,
        "num_draft_tokens": args.num_draft_tokens,
        "passes": passes,
    }
    return figures.as_dict(), about


def text(record: dict[str, Any]) -> str:
    """Returns the tables of a record as text."""
    k, experts = record["top_k"], record["experts"]
    layers = len(record["gamma_by_layer"])
    lines = [
        f"{record['model']}: {layers} layers, {experts} experts, {k} a token; {record['computed']}",
        f"{record['prompts']} texts, {record['tokens']} tokens, {record['passes']} verify passes of at most "
        f"{record['batch']} rows x {record['num_draft_tokens'] + 1} tokens",
        "",
        "distinct experts of M consecutive tokens of a text",
        "    M  samples   pairs  uniform  measured  (layers)       pairs/measured",
        *(f"{point['tokens']:5}  {_cells(point, k * point['tokens'])}" for point in record["runs"]),
        f"U(M) = {k} M^{record['gamma']:.3f}; uniform: {k} M^{record['gamma_uniform']:.3f}",
        "",
        "distinct experts of one verify, rejected drafts included",
        "rows x tokens  samples   pairs  uniform  measured  (layers)       pairs/measured",
        *(
            f"{point['rows']:4} x {point['tokens']:<6}  {_cells(point, k * point['rows'] * point['tokens'])}"
            for point in record["verifies"]
        ),
        "",
        "experts that a token shares with",
        f"{'':28}samples   share  (layers)      by chance",
        *(_share(point) for point in record["shares"]),
        "",
        *_by_layer(record),
    ]
    return "\n".join(lines)


def _spread(values: Sequence[float], digits: int) -> str:
    return f"({min(values):.{digits}f} to {max(values):.{digits}f})"


def _cells(point: dict[str, Any], pairs: int) -> str:
    measured, spread = point["measured"], _spread(point["by_layer"], 1)
    counts = f"{point['samples']:7}  {pairs:6}  {point['uniform']:7.2f}"
    return f"{counts}  {measured:8.2f}  {spread:14} {pairs / measured:8.2f}"


def _share(point: dict[str, Any]) -> str:
    spread = _spread(point["by_layer"], 2)
    return f"{point['kind']:27} {point['samples']:7} {point['measured']:7.3f}  {spread:14} {point['chance']:7.3f}"


def _by_layer(record: dict[str, Any]) -> Iterator[str]:
    """gamma, U at the widths of a verify, and neighbours' share of each layer."""
    runs = [point for point in record["runs"] if point["tokens"] in (2, 4, 5, 8)]
    shares = [point for point in record["shares"] if point["kind"] == NEIGHBOURS]
    yield "layer  gamma" + "".join(f"   U({point['tokens']})" for point in runs) + "  neighbours" * len(shares)
    for layer, gamma in enumerate(record["gamma_by_layer"]):
        cells = "".join(f" {point['by_layer'][layer]:6.2f}" for point in runs)
        yield f"{layer:5}  {gamma:.3f}{cells}" + "".join(f" {point['by_layer'][layer]:11.3f}" for point in shares)


def plot(record: dict[str, Any], path: Path, kind: str) -> None:
    """Draws three panels: distinct experts of consecutive tokens, those of a verify by rows, shared ones by layer.

    record: what `measure` found; kind: 'png', 'svg' or 'pdf'.
    """
    figure, ((runs, verifies, shares),) = panels(1, 3, 15, 4.8)
    k, width = record["top_k"], record["num_draft_tokens"] + 1
    points = record["runs"]
    _distinct(runs, record, [point["tokens"] for point in points], points, [k * point["tokens"] for point in points])
    fitted = [point["tokens"] for point in points if point["tokens"] <= max(FITTED)]
    label = f"{k} M^{record['gamma']:.2f}, fitted to M = 2..8 (uniform: {record['gamma_uniform']:.2f})"
    runs.plot(fitted, [k * m ** record["gamma"] for m in fitted], color="tab:orange", lw=1, label=label)
    runs.set(title="Consecutive tokens of a text", xlabel="tokens M")
    points = record["verifies"]
    pairs = [k * point["rows"] * point["tokens"] for point in points]
    _distinct(verifies, record, [point["rows"] for point in points], points, pairs)
    verifies.set(title=f"One verify of R rows x {width} tokens", xlabel="rows R", xticks=range(1, record["batch"] + 1))
    top = min(1, 1.6 * max((max(point["by_layer"]) for point in record["shares"]), default=1))  # room for the legend
    for point, marker in zip(record["shares"], "os^v", strict=False):
        layers = range(len(point["by_layer"]))
        shares.plot(layers, point["by_layer"], marker=marker, label=f"{point['kind']}: {point['measured']:.2f}")
    shares.axhline(k / record["experts"], color="gray", ls="--", label=f"by chance, k/E: {k / record['experts']:.2f}")
    shares.set(title="Experts shared by two tokens", xlabel="layer", ylabel="share of a token's experts", ylim=(0, top))
    shares.xaxis.get_major_locator().set_params(integer=True)
    for axes in (runs, verifies, shares):
        dress(axes, "best" if axes is shares else "lower right")
    heading(figure, f"{record['experts']} experts, {k} a token; {record['tokens']} tokens", str(record["model"]))
    figure.savefig(path, format=kind)


def _distinct(axes: Axes, record: dict[str, Any], x: list[int], points: list[dict], pairs: list[int]) -> None:
    """Draws pairs, the uniform expectation and the measured mean, with the span of the layers."""
    axes.plot(x, pairs, color="gray", ls=":", label="pairs of a token and an expert")
    axes.plot(x, [point["uniform"] for point in points], color="gray", ls="--", label="uniform expectation")
    axes.plot(x, [point["measured"] for point in points], color="tab:blue", marker="o", label="measured, all layers")
    low, high = ([pick(point["by_layer"]) for point in points] for pick in (min, max))
    axes.fill_between(x, low, high, color="tab:blue", alpha=0.2, lw=0, label="least to greatest layer")
    axes.set(ylabel=f"distinct experts a layer, of {record['experts']}", ylim=(0, 1.05 * record["experts"]))


if __name__ == "__main__":
    sys.exit(main())

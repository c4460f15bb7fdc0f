"""`python -m mlx_gemma_mtp.doctor`: does this machine run our kernels right, and which way is fastest here?

Compiles and checks every kernel against its reference, races the ways through a layer of routed experts and through
products of few rows, for seconds each, times a draft step, and keeps what it found: later loads on this machine switch
failing kernels off and take the fastest way. Written without a Mac: on a CPU the kernels run in the tests' emulator
alone.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checks.race import race
from .cli.command import Bar, Parser, Stage, check_file, command, note, written
from .errors import UserError
from .files.files import CACHE
from .machine import blas

if TYPE_CHECKING:
    import mlx.core as mx

    from .engine.engine import Engine
    from .models.linear import Product
    from .models.moe import Experts
    from .ops.expert_paths import ExpertPath, ProductPath, Rule

LAYER = (2816, 704, 128, 8)  # of the 26B-A4B: hidden size, expert size, experts, experts a token
ROWS = (1, 2, 4, 8, 16, 32)
PRODUCTS = (  # inputs and outputs of products that are raced together, for each of expert_paths.SIDES
    ((1536, 2048), (2048, 1536), (1536, 256), (1024, 1024)),  # of the E2B, and of a drafter
    ((4096, 2816), (2112, 2816), (1536, 4096)),  # of the 26B-A4B, and of the E2B
    ((2816, 8192), (2816, 4224), (8192, 2816)),  # of the 26B-A4B
    ((2816, 262144),),  # its head
)
PASS = 128 << 20  # weights of a race's matrices, at least, so that they come from memory, as in a model
PRODUCT_ROWS = (1, 2, 4, 8, 16)
FORMATS = {"4-bit": 4, "8-bit": 8, "bf16": 0}
Times = Mapping["ExpertPath", Mapping[int, float]]  # path -> tokens -> seconds


def parser() -> argparse.ArgumentParser:
    p = Parser("mlx_gemma_mtp.doctor", description="Check this machine's kernels and time the ways through them.")
    p.add_argument("--model", help="the pair whose draft step is timed (default: the small bundled pair)")
    p.add_argument(
        "--layer", type=int, nargs=4, default=LAYER, metavar=("HIDDEN", "SIZE", "EXPERTS", "TOP_K"),
        help="the layer that is timed (default: the 26B-A4B's, 2816 704 128 8)",
    )  # fmt: skip
    p.add_argument("--rows", type=int, nargs="+", default=ROWS, metavar="M", help="tokens of a pass (default: 1 .. 32)")
    p.add_argument("--repeats", type=int, default=20, help="layers that are computed in a row (default: 20)")
    p.add_argument("--seconds", type=float, default=1.0, help="that each way runs at each width (default: 1)")
    p.add_argument("--no-times", action="store_true", help="check the kernels, time nothing")
    p.add_argument("--json", type=Path, metavar="FILE", help="write a report there that can be shared")
    return p


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 1 where a kernel failed its check, 2 for bad input, 130 after Ctrl-C."""
    return command(run, parser, argv)


def run(args: argparse.Namespace) -> int:
    _check(args)
    with Stage() as stage:
        stage("checking the BLAS")
        blas.preload()
    from .machine import memory
    from .ops import expert_paths, kernels
    from .ops.kernel_report import Report, check, machine

    about = machine() | {"memory_gb": round(memory.total_bytes() / 1e9, 1)}
    print("\n".join(f"{name}: {value}" for name, value in about.items()))
    with Stage() as stage:
        stage("checking the kernels")
        checked = check()
    print("\n".join(f"kernel {name}: {state}" for name, state in kernels.status().items()))
    report, times, products, drafts = Report(), {}, {}, {}
    known = report.read()
    rules = known[1] if known else ()
    bandwidth = None if args.no_times else _bandwidth()
    timed = kernels.available() and not args.no_times
    if timed:
        expert_paths.adopt(())
        rules, times = time_experts(args, about["chip"])
        more, products = time_products(args, about["chip"])
        rules += more
    elif not kernels.available():
        print(f"{kernels.NO_GPU}: plain MLX runs, and nothing is timed but the memory")
    if any(kernels.why_off(name) is None or checked[name] for name in kernels.KERNELS):
        _keep(report, checked, rules)
    if timed:
        drafts = time_drafts(args.model)  # a load, which takes up what is kept
    if args.json:
        record = {"machine": about, "kernels": kernels.status(), "experts": times, "products": products}
        record["draft_step"] = drafts
        record["memory_bytes_per_s"] = bandwidth
        with written(args.json) as part:
            part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 1 if any(checked.values()) else 0


def _check(args: argparse.Namespace) -> None:
    hidden, size, experts, top_k = args.layer
    if min(hidden, size) < 64 or hidden % 64 or size % 64 or not 1 <= top_k <= experts:
        raise UserError(f"--layer is {hidden} {size} {experts} {top_k}, expected sizes in 64s and TOP_K of EXPERTS")
    if min(args.rows) < 1 or args.repeats < 1:
        raise UserError(f"--rows {args.rows}, --repeats {args.repeats}: expected 1 or more")
    if not 0 <= args.seconds <= 3600:
        raise UserError(f"--seconds is {args.seconds:g}, expected 0 to 3600, such as 1")
    if args.json:
        check_file("--json", args.json)


def _keep(report: Any, checked: dict[str, str | None], rules: tuple[Rule, ...]) -> None:
    """Keeps what was found for later loads, and says where."""
    try:
        report.write(checked, rules)
        print(f"kept in {report.path}")
    except OSError as error:
        note(
            f"this cannot be kept in {report.path} ({error.strerror}), so that later loads do not know it; name a "
            f"folder that can be written: {CACHE}=FOLDER"
        )


def _bandwidth() -> float:
    """Measures the memory's bandwidth in bytes a second, and keeps it for the figures of the server."""
    from .ops import bandwidth

    found = bandwidth.measure()
    print(f"memory: {found / 1e9:.1f} GB/s, by a copy")
    try:
        bandwidth.keep(found)
    except OSError as error:
        note(
            f"the memory's bandwidth cannot be kept ({error.strerror}), so that the server does not know it; name a "
            f"folder that can be written: {CACHE}=FOLDER"
        )
    return found


def time_experts(args: argparse.Namespace, chip: str) -> tuple[tuple[Rule, ...], dict[str, Any]]:
    """Times the ways through a layer of experts.

    Returns (the rules that follow, microseconds by format, path and tokens).
    """
    import mlx.core as mx

    rules, shown = [], {}
    for name, bits in FORMATS.items():
        experts = layer(args.layer, bits)
        form = experts.switch_glu.down_proj.form
        times, steady, equal = measure(experts, args.layer, args.rows, args.repeats, args.seconds)
        able = {path: each for path, each in times.items() if path in steady}
        rules.append(rule(chip, "bfloat16", form, able, equal, args.layer[3]))
        shown[name] = {str(path): {str(m): round(1e6 * s, 1) for m, s in each.items()} for path, each in times.items()}
        print(f"\n{name}, microseconds of a layer's experts by tokens; bit-equal: {', '.join(map(str, sorted(equal)))}")
        print(f"{'':10}" + "".join(f"{m:>9}" for m in args.rows))
        for path, each in times.items():
            print(f"{path:10}" + "".join(f"{1e6 * each[m]:9.1f}" for m in args.rows))
        if unsteady := times.keys() - steady:
            print(f"not taken, since company changes a token's bits: {', '.join(map(str, sorted(unsteady)))}")
        print("from so many pairs on: " + ", ".join(f"{start} {path}" for start, path in rules[-1].steps))
        del experts
        mx.clear_cache()
    return tuple(rules), shown


def layer(shape: Sequence[int], bits: int) -> Experts:
    """Returns a layer of random experts in bfloat16, quantised to `bits` in groups of 64; 0 leaves it unquantised."""
    import mlx.core as mx
    import mlx.nn as nn

    from .models.config import MoESpec
    from .models.linear import finish_loading
    from .models.moe import Experts

    hidden, size, count, top_k = shape
    experts = Experts(hidden, MoESpec(num_experts=count, top_k=top_k, size=size))
    experts.set_dtype(mx.bfloat16)
    if bits:
        nn.quantize(experts, group_size=64, bits=bits)
    finish_loading(experts)
    return experts


def measure(
    experts: Experts, shape: Sequence[int], rows: Sequence[int], repeats: int, seconds: float = 0.0
) -> tuple[dict[ExpertPath, dict[int, float]], frozenset[ExpertPath], frozenset[ExpertPath]]:
    """Returns (seconds by path and tokens, the steady paths, those of them that are bit-equal to plain pairs).

    A path is steady where a token gets the same bits alone and beside others, up to the width of the widest verify.
    """
    import mlx.core as mx

    from .ops.expert_paths import ON_METAL, VERIFY, ExpertPath

    top_k = shape[3]
    times: dict[ExpertPath, dict[int, float]] = {}
    steady, equal = set(ON_METAL), set(ON_METAL)
    for m in (*rows, max(1, VERIFY // top_k)):
        # every layer has routes of its own, so that weights come from memory, as in a model, and not from a cache
        inputs, ways = [_inputs(m, shape, seed) for seed in range(repeats)], {}
        first, alone = inputs[0], [part[:1] for part in inputs[0]]
        plain = experts.run(ExpertPath.PAIRS, *first)
        for path in ON_METAL:
            if path == ExpertPath.GROUPED and not experts.switch_glu.groupable(mx.bfloat16, m * top_k):
                continue
            if m * top_k <= VERIFY:
                found = experts.run(path, *first)
                steady -= set() if mx.array_equal(found[:1], experts.run(path, *alone)) else {path}
                equal -= set() if mx.array_equal(found, plain) else {path}
            ways[path] = partial(_layers, experts, path, inputs)
        for path, found in race(ways, seconds).items() if m in rows else ():
            times.setdefault(path, {})[m] = found / repeats
    times = {path: each for path, each in times.items() if len(each) == len(rows)}
    # Of what there is, pairs depend least on company; and they are themselves, whatever their bits.
    steady, equal = ((paths | {ExpertPath.PAIRS}) & times.keys() for paths in (steady, equal))
    return times, frozenset(steady), frozenset(equal & steady)


def _inputs(tokens: int, shape: Sequence[int], seed: int) -> tuple[mx.array, mx.array, mx.array]:
    """x [tokens, hidden], experts and their weights [tokens, top_k], computed."""
    import mlx.core as mx

    hidden, _, count, top_k = shape
    keys = mx.random.split(mx.random.key(seed), 2)
    x = mx.random.normal((tokens, hidden), key=keys[0]).astype(mx.bfloat16)
    chosen = mx.argsort(mx.random.uniform(shape=(tokens, count), key=keys[1]), axis=-1)[:, :top_k].astype(mx.uint32)
    inputs = x, chosen, mx.full((tokens, top_k), 1 / top_k)
    mx.eval(inputs)
    return inputs


def _layers(experts: Experts, path: ExpertPath, inputs: Sequence[tuple[mx.array, mx.array, mx.array]]) -> None:
    """Computes one layer after the other, each of which waits for the one before, as in a model."""
    import mlx.core as mx

    y = mx.zeros_like(inputs[0][0])
    for x, chosen, weights in inputs:
        y = experts.run(path, x + 0 * y, chosen, weights)
    mx.eval(y)


def time_products(args: argparse.Namespace, chip: str) -> tuple[tuple[Rule, ...], dict[str, Any]]:
    """Races MLX's products against ours of few rows, over PRODUCTS of each size.

    Returns (the rules that follow, milliseconds by format and size, path and rows).
    """
    import mlx.core as mx

    from .checks.invariance import agreeing_widths
    from .ops.expert_paths import SIDES, ProductPath
    from .ops.kernels import few_rows

    rules, shown = [], {}
    for (name, bits), (side, shapes) in product(FORMATS.items(), zip(SIDES, PRODUCTS, strict=True)):
        linears = stack(bits, shapes)
        first, size = linears[0], f"products to {side}" if side else "the head"
        if not few_rows.usable(first.weights, mx.bfloat16):
            continue
        times: dict[ProductPath, dict[int, float]] = {path: {} for path in ProductPath}
        for rows in PRODUCT_ROWS:
            ways = {path: partial(_pass, linears, path, rows) for path in times}
            for path, seconds in race(ways, args.seconds).items():
                times[path][rows] = seconds
        rules.append(product_rule(chip, "bfloat16", first.form, times, side))
        shown[f"{name}, {size}"] = {
            str(path): {str(m): round(1e3 * s, 3) for m, s in each.items()} for path, each in times.items()
        }
        print(f"\n{name}, milliseconds of {len(linears)} products by rows: {size}")
        print(f"{'':10}" + "".join(f"{m:>9}" for m in PRODUCT_ROWS))
        for path, each in times.items():
            agree = agreeing_widths(partial(first.run, path), first.weights.inputs, mx.bfloat16)
            print(f"{path:10}" + "".join(f"{1e3 * each[m]:9.2f}" for m in PRODUCT_ROWS), end="")
            print(f"   a row has its own bits at {' '.join(map(str, agree))} rows")
        print("from so many rows on: " + ", ".join(f"{start} {path}" for start, path in rules[-1].steps))
        del linears, first, ways
        mx.clear_cache()
    return tuple(rules), shown


def stack(bits: int, shapes: Sequence[tuple[int, int]]) -> list[Product]:
    """Returns random products of these shapes in bfloat16, one after the other until they hold PASS weights, quantised
    to `bits` in groups of 64; 0 leaves them.
    """
    import mlx.core as mx
    import mlx.nn as nn

    from .models.linear import Linear, finish_loading

    holder = nn.Module()
    layers = math.ceil(PASS / sum(map(math.prod, shapes)))
    holder.linears = [Linear(*sizes) for sizes in (*shapes,) * layers]
    holder.set_dtype(mx.bfloat16)
    if bits:
        nn.quantize(holder, group_size=64, bits=bits)
    for linear in holder.linears:
        finish_loading(linear)
    return holder.linears


def _pass(linears: Sequence[Product], path: ProductPath, rows: int) -> None:
    """Computes one product after the other, each of which waits for the one before, as in a model."""
    import mlx.core as mx

    y = mx.zeros((rows, 1), mx.bfloat16)
    for linear in linears:
        y = linear.run(path, mx.ones((rows, linear.weights.inputs), mx.bfloat16) + 0 * y[:, :1])
    mx.eval(y)


def product_rule(
    chip: str, dtype: str, weights: str, times: Mapping[ProductPath, Mapping[int, float]], side: int
) -> Rule:
    """Returns the rule that takes, at each number of rows, the faster path, and MLX's own beyond what was raced. side:
    of the matrices, as in Rule.
    """
    from .ops.expert_paths import ANY_PRODUCT, ProductPath, Rule

    picks = {rows: min(times, key=lambda path: times[path][rows]) for rows in PRODUCT_ROWS}
    steps = [(1, picks[PRODUCT_ROWS[0]])]
    for rows, path in (*picks.items(), (PRODUCT_ROWS[-1] + 1, ProductPath.STOCK)):
        if path != steps[-1][1]:
            steps.append((rows, path))
    return Rule(chip, dtype, weights, tuple(steps), ANY_PRODUCT, side)


def rule(chip: str, dtype: str, weights: str, times: Times, equal: frozenset[ExpertPath], top_k: int) -> Rule:
    """Returns the rule that takes, at each width, the fastest of the paths that agree bit for bit with plain pairs.

    Where a path that does not agree is fastest on the whole, by the geometric mean, the rule takes that path alone.
    """
    from .ops.expert_paths import VERIFY, ExpertPath, Rule

    widths = sorted(next(iter(times.values())))

    def whole(picks: Sequence[ExpertPath]) -> float:
        return sum(math.log(times[path][m]) for path, m in zip(picks, widths, strict=True))

    alone = min(times, key=lambda path: whole([path] * len(widths)))
    mixed = [min((path for path in times if path in equal), key=lambda path: times[path][m]) for m in widths]
    picks = min(([alone] * len(widths), mixed), key=whole)
    steps = [(1, picks[0])]
    for m, before, path in zip(widths[1:], picks, picks[1:], strict=False):
        if path != before:
            steps.append((m * top_k, path))
    if steps[-1][1] != ExpertPath.SORTED:
        steps.append((VERIFY + 1, ExpertPath.SORTED))  # prefill reads an expert once a tile
    return Rule(chip, dtype, weights, tuple(steps), equal if len(set(picks)) > 1 else frozenset())


def time_drafts(model: str | None) -> dict[str, float]:
    """Returns the milliseconds of one draft with the drafter as it is, and in 4 bits."""
    from .engine.load import load
    from .models.loading import is_quantized

    found: dict[str, float] = {}
    for name, bits in (("as it is", None), ("4-bit", 4)):
        engine = load(model, draft_bits=bits, num_draft_tokens=0, progress=Bar("loading"))
        if engine.drafter is None or (bits is None and is_quantized(engine.drafter)):
            break
        found[name] = engine.call(partial(_draft_time, engine, engine.text.encode("def f(x):")))
        print(f"draft step, drafter {name}: {found[name]:.3f} ms")
    return found


def _draft_time(engine: Engine, prompt: Sequence[int]) -> float:
    """The milliseconds of one draft, timed in the engine's own thread."""
    from .engine.calibration import KINDS, Bench

    bench = Bench(engine.target, engine.drafter, prompt, KINDS["greedy"], 1, 64)
    both = [bench.rounds(4) for _ in range(6)][1:]
    chained, alone = (min(seconds for some in part for seconds in some) for part in zip(*both, strict=True))
    return round(1e3 * (chained - alone) / 4, 3)


if __name__ == "__main__":
    sys.exit(main())

"""The 2.2x claim, on your Mac: `python -m benchmarks.claim --model gemma-4-26B-A4B-it-4bit`.

The claim. Google's announcement of the MTP drafters (5 May 2026) says of Gemma 4 26B-A4B on Apple Silicon that routing
makes MTP hard at batch size 1, and that several requests at once, 4 to 8, give up to about 2.2x. It names no chip,
quantisation, draft length or prompts, nor what the 2.2x is relative to. No measurement that others can repeat is known
to us.

What is compared, on the same files, prompts and token limits, greedily, at 1, 4 and 8 rows:
  A  this package, plain          C  mlx-vlm, plain
  B  this package, with MTP       D  mlx-vlm, with MTP
Tokens a second of all rows together, after every row has its first token; the median of the repeats. The ratio of whole
calls, prefill included, is told beside.

The speed-up that is judged is B, with the one draft length that is best over the classes, over the BETTER of A and C
in as many rows: never over a smaller batch, never over a slow baseline of one's own. The same is said of D. A baseline
counts as sane where a plain step of a larger batch takes no less time than one of a smaller batch, and no more than so
many steps of single rows (10 % tolerance); where it is not, the verdict says so instead of a ratio. "Reached" is 2.2x
or more at 4 or at 8 rows, as the mean over the classes of prompts; the best class is reported beside.

The run is planned for 20 minutes: no repeat begins that would end after --minutes; there is at least one. Where both
systems do not fit into memory together, they are loaded in turn. Close other programs, connect the charger, and do not
touch the machine.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks import decode, machine, prompts, workers
from benchmarks.cases import Axes, Job
from benchmarks.command import command
from benchmarks.records import record
from benchmarks.series import geometric_mean
from benchmarks.workers import OURS, Setup
from mlx_gemma_mtp.cli.command import Parser, check_file, written
from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.files.hub import Pair, find_pair

BATCHES = (1, 4, 8)
CLAIMED, CLAIMED_AT = 2.2, (4, 8)
TEXTS = ("code", "prose")
TOLERANCE = 0.1  # of a plain step's time
ROOM = 0.75  # of the memory, that both systems may take together
EXPERTS = 128  # of the model that the claim is about
SEND = """\
To send it back: open an issue in this project's repository, title "Claim: <your chip>", and attach the file. It
holds the chip, memory, versions, weights' checksums, the model folder's name and figures; no texts. Look through it
before."""

RATES = ("decode_tokens_per_s", "tokens_per_s")

Record = dict[str, Any]


def parser() -> argparse.ArgumentParser:
    p = Parser("benchmarks.claim", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", help="the converted 26B-A4B (default: the small bundled pair, a rehearsal)")
    p.add_argument("--draft-model", default="auto", metavar="PATH|auto", help="its drafter (default: auto)")
    p.add_argument("--num-draft-tokens", type=decode.draft_lengths, default=[2, 3, 4], metavar="LIST",
                   help="draft lengths of B and D; 0 is always measured (default: 2,3,4)")  # fmt: skip
    p.add_argument("--minutes", type=float, default=20.0, help="no repeat begins that would end later (default: 20)")
    p.add_argument("--max-tokens", type=int, default=128, help="of each text (default: 128)")
    p.add_argument("--out", type=Path, default=Path("mtp-claim.json"), help="the result file (default: mtp-claim.json)")
    p.add_argument(
        "--quick", action="store_true", help="a rehearsal: two prompts of one class, 16 tokens, one repeat, 2 drafts"
    )
    return p


def run(args: argparse.Namespace) -> int:
    from benchmarks import terminal

    if args.out.exists():
        raise UserError(f"--out {args.out} exists already; move it away or name another file")
    check_file("--out", args.out)
    if args.max_tokens < 2 or not args.minutes > 0:
        raise UserError(f"--max-tokens {args.max_tokens}, --minutes {args.minutes}: expected at least 2, and above 0")
    if line := workers.missing("mlx-vlm"):
        raise UserError(f"{line}; the protocol compares with it")
    terminal.out.print(__doc__, markup=False, highlight=False)
    texts = TEXTS[:1] if args.quick else TEXTS
    length, drafts = (16, [2]) if args.quick else (args.max_tokens, args.num_draft_tokens)
    with tempfile.TemporaryDirectory(prefix="claim-") as work:
        pair = opened(args, Path(work))
        setups = [Setup(system, pair, "stock") for system in (OURS, "mlx-vlm")]
        common = decode.context(argparse.Namespace(hf_path=None, model=args.model), setups)
        cases = Axes(list(dict.fromkeys([0, *drafts])), BATCHES, [0.0], texts).cases(setups)
        ids = decode.encoded(pair.target, texts, 2 if args.quick else prompts.EACH)
        job = Job(ids, length, 1 if args.quick else 99, lambda case: None, terminal.note,
                  Budget(60 * args.minutes))  # fmt: skip
        state = {"load_before": machine.load(), "thermal_before": machine.thermal_note()}
        with terminal.bar(None) as bar:
            job.tick = lambda case: bar.update(bar.task_ids[0], advance=1, description=case.name())
            about = (job.together if fit_together(pair) else job.one_at_a_time)(cases)
        state |= {"load_after": machine.load(), "thermal_after": machine.thermal_note()}
        own, speed = about.get(OURS, {}), machine.bandwidth(common["machine"])
        known = {key: value for key, value in state.items() if value is not None}
        records = [common | known | record(case, cases, job, own, speed) for case in cases]
        the_model = is_the_model(pair)
    lines = verdict(records, the_model)
    save(args.out, {"claim": __doc__, "verdict": lines, "records": records})
    terminal.out.print(*terminal.tables(records, common["model"]))
    for line in [*terminal.remarks(records), "", *lines, "", f"written: {args.out}", SEND]:
        terminal.out.print(line, markup=False, highlight=False)
    return 1 if any("failed" in each for each in records if each["system"] == OURS) else 0


class Budget:
    """Asked after each repeat: whether another one, as long as those before, would end after so many seconds."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic):
        self.seconds, self.now, self.began, self.done = seconds, now, now(), 0

    def __call__(self) -> bool:
        self.done += 1
        return (self.now() - self.began) * (self.done + 1) / self.done > self.seconds


def opened(args: argparse.Namespace, work: Path) -> Pair:
    """The folders of both systems: as they are on a Mac, float32 copies on a CPU."""
    from benchmarks import folders
    from mlx_gemma_mtp.machine import device

    pair = find_pair(args.model, args.draft_model)
    if pair.drafter is None:
        raise UserError(f"{pair.target} has no drafter ({pair.reason}); name one with --draft-model")
    return pair if device.traits().float32_sums else folders.float32(pair, work / "mlx")


def fit_together(pair: Pair) -> bool:
    """Whether two processes can hold the weights at the same time."""
    from mlx_gemma_mtp.files.folder import weight_bytes
    from mlx_gemma_mtp.machine.memory import total_bytes

    needed = sum(weight_bytes(folder) for folder in (pair.target, pair.drafter))
    return 2 * needed < ROOM * total_bytes()


def is_the_model(pair: Pair) -> bool:
    text = json.loads((pair.target / "config.json").read_text()).get("text_config", {})
    return text.get("num_experts") == EXPERTS


def verdict(records: list[Record], the_model: bool) -> list[str]:
    """The judgement of a run, as sentences."""
    lines = (
        [] if the_model else ["A rehearsal: this is not the 26B-A4B, so nothing here speaks for or against the claim."]
    )
    measured = [r for r in records if "failed" not in r]
    lines += [f"failed: {r['system']}, {r['drafts']} drafts, {r['batch']} rows, {r['text']}: {r['failed']}"
              for r in records if "failed" in r]  # fmt: skip
    reached = None
    for batch in sorted({r["batch"] for r in measured}):
        for system in (OURS, "mlx-vlm"):
            if found := best_drafts(measured, system, batch):
                drafts, ratios = found
                mean, calls = (geometric_mean([each[i] for each in ratios.values()]) for i in range(2))
                each = ", ".join(f"{text} {ratio:.2f}x" for text, (ratio, _) in sorted(ratios.items()))
                lines.append(
                    f"{batch} rows: {system} with {drafts} drafts over the better plain decoding: {mean:.2f}x "
                    f"({each}; whole calls {calls:.2f}x)"
                )
                if system == OURS and batch in CLAIMED_AT:
                    reached = max(mean, reached or 0.0)
    doubts = [doubt for system in (OURS, "mlx-vlm") for doubt in insane(measured, system)]
    if doubts:
        lines += [f"the plain baseline is not sane: {doubt}" for doubt in doubts]
        lines.append("verdict: none; run again on a quiet machine")
    elif reached is None:
        lines.append("verdict: none; nothing was measured at 4 or 8 rows")
    else:
        word = "reached" if reached >= CLAIMED else "not reached"
        what = "verdict" if the_model else "of the rehearsal"
        lines.append(f"{what}: {CLAIMED}x at 4 or 8 rows is {word} by this package: {reached:.2f}x")
    return lines


Ratios = dict[str, tuple[float, float]]  # class -> speed-up of decoding, and of whole calls


def best_drafts(records: list[Record], system: str, batch: int) -> tuple[int | str, Ratios] | None:
    """A system's draft length with the best mean over the classes, and its tokens a second in each class over the
    better plain decoding of both systems, in as many rows. None where some of it was not measured.
    """
    alike = [r for r in records if r["batch"] == batch]
    texts = {r["text"] for r in alike}
    ratios: dict[int | str, Ratios] = {}
    for r in alike:
        plain = [each for each in alike if each["drafts"] == 0 and each["text"] == r["text"]]
        if plain and r["drafts"] != 0 and r["system"] == system:
            decoding, calls = (r[key] / max(each[key] for each in plain) for key in RATES)
            ratios.setdefault(r["drafts"], {})[r["text"]] = decoding, calls
    whole = {drafts: found for drafts, found in ratios.items() if found.keys() == texts}
    mean = lambda drafts: geometric_mean([decoding for decoding, _ in whole[drafts].values()])  # noqa: E731
    best = max(whole, key=mean, default=None)
    return None if best is None else (best, whole[best])


def insane(records: list[Record], system: str) -> list[str]:
    """What speaks against a system's plain steps: a larger batch that steps faster, or slower than its rows alone."""
    doubts = []
    for text in sorted({r["text"] for r in records}):
        plain = [r for r in records if (r["system"], r["drafts"], r["text"]) == (system, 0, text)]
        steps = {r["batch"]: r["ms_per_round"] for r in plain if "ms_per_round" in r}
        sizes = sorted(steps)
        for small, large in pairwise(sizes):
            least, most = steps[small] * (1 - TOLERANCE), steps[small] * large / small * (1 + TOLERANCE)
            if not least <= steps[large] <= most:
                doubts.append(
                    f"{system}, {text}: {steps[small]:.1f} ms a step of {small} rows, {steps[large]:.1f} of {large}"
                )
    return doubts


def save(path: Path, result: dict[str, Any]) -> None:
    """Writes a result whole, or not at all. Raises UserError."""
    with written(path) as part:
        part.write_text(json.dumps(result) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 1 where a case of this package failed, 2 for bad input, 130 after Ctrl-C."""
    return command(run, parser, argv)


if __name__ == "__main__":
    raise SystemExit(main())

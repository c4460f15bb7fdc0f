"""Plots and a page of Markdown from what benchmarks.decode measured: `python -m benchmarks.report FILES --out DIR`."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.command import command
from benchmarks.series import Record
from mlx_gemma_mtp.cli.command import Parser
from mlx_gemma_mtp.errors import UserError

NEEDED = ("run", "system", "drafts", "batch", "temperature", "text", "blas", "machine", "versions")
TABLE = (
    "| system | drafts | rows | T | text | tokens/s | repeats | decoding | tokens/round | primitives/round | equal |"
)


def read(paths: Sequence[Path]) -> list[Record]:
    """The records of decode's files and of claim's. Raises UserError for anything else."""
    records: list[Record] = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
            whole = json.loads(text) if text.lstrip().startswith('{"claim"') else None
            found = whole["records"] if whole else [json.loads(line) for line in text.splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError, ValueError, KeyError) as error:
            raise UserError(f"{path}: {error}; expected a file that benchmarks.decode --json wrote") from None
        for record in found:
            if not isinstance(record, dict) or any(key not in record for key in NEEDED):
                raise UserError(
                    f"{path} has a line that is no case; expected a file that benchmarks.decode --json wrote"
                )
        records += found
    if not records:
        raise UserError(f"{', '.join(map(str, paths))}: there is no case in it; run benchmarks.decode --json first")
    return records


def parts(records: Sequence[Record]) -> Iterator[tuple[str, list[Record]]]:
    """What may be compared: one run on one machine, of one model, with one BLAS; with a title."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        title = f"{record['model']}, {record['machine']['cpu']}, {record['blas']} BLAS, {record['run']}"
        groups.setdefault(title, []).append(record)
    yield from groups.items()


def page(titled: Sequence[tuple[str, list[Record], list[Path]]]) -> str:
    lines = ["# Measured with benchmarks.decode", ""]
    for title, records, pictures in titled:
        lines += [f"## {title}", "", *facts(records), ""]
        lines += [line for picture in pictures for line in (f"![{caption(picture)}]({picture.name})", "")]
        lines += [*rows(records), ""]
        lines += [f"- failed: {name(record)}: {record['failed']}" for record in records if "failed" in record]
        lines += [f"- {parted(record)}" for record in records if "first_difference" in record]
        lines.append("")
    return "\n".join(lines)


def facts(records: Sequence[Record]) -> list[str]:
    """Machine, versions, commit, weights and load, as far as the records agree, else of each."""

    def all_of(key: str) -> list[str]:
        return list(dict.fromkeys(json.dumps(record[key]) for record in records if key in record))

    named = (
        ("machine", "Machine"),
        ("versions", "Versions"),
        ("commit", "Commit"),
        ("folders", "SHA-256 of the weights"),
        ("thermal_after", "Thermal state afterwards"),
    )
    lines = [f"- {label}: {'; '.join(found)}" for key, label in named if (found := all_of(key))]
    loads = [record[key] for record in records for key in ("load_before", "load_after") if key in record]
    return lines + ([f"- Load before and after: {min(loads)} to {max(loads)}"] if loads else [])


def rows(records: Sequence[Record]) -> list[str]:
    lines = [TABLE, "|" + "---|" * (TABLE.count("|") - 1)]
    for r in records:
        if "failed" in r:
            continue
        cells = (
            r["system"], r["drafts"] or "plain", r["batch"], f"{r['temperature']:g}", r["text"],
            f"{r['tokens_per_s']:.1f}",
            " ".join(f"{rate:.0f}" for rate in r["tokens_per_s_all"]), f"{r['decode_tokens_per_s']:.1f}",
            r.get("tokens_per_round", ""), r.get("primitives_per_round", ""),
            f"{r['equal']}/{r['compared']}" if "equal" in r else "",
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def name(r: Record) -> str:
    return f"{r['system']}, {r['drafts'] or 'plain'}, {r['batch']} rows, T {r['temperature']:g}, {r['text']}"


def parted(r: Record) -> str:
    d = r["first_difference"]
    where = f"at token {d['position']} of prompt {d['prompt']}: {d['token']} for {d['reference']}"
    return f"differs from {r['reference']}'s plain text: {name(r)}, {where}"


def caption(picture: Path) -> str:
    return picture.stem.split("-", 1)[1].replace("_", " ")


def write(records: Sequence[Record], out: Path) -> list[Path]:
    """The page and its pictures in the folder `out`, which is replaced as a whole."""
    from benchmarks import plots

    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".report-", dir=out.parent))
    try:
        titled = [
            (title, some, plots.draw(some, title, work, str(number)))
            for number, (title, some) in enumerate(parts(records), 1)
        ]
        (work / "report.md").write_text(page(titled), encoding="utf-8")
        work.chmod(0o755)
        if out.exists():
            shutil.rmtree(out)
        work.rename(out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return [out / "report.md", *(out / picture.name for _, _, pictures in titled for picture in pictures)]


def parser() -> argparse.ArgumentParser:
    p = Parser("benchmarks.report", description=__doc__)
    p.add_argument("files", nargs="+", type=Path, help="what benchmarks.decode --json wrote")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder, or one that a report is in")
    return p


def run(args: argparse.Namespace) -> int:
    if args.out.exists() and not (args.out / "report.md").is_file() and (args.out.is_file() or any(args.out.iterdir())):
        raise UserError(f"--out {args.out} holds something that is no report; name another folder")
    records = read(args.files)
    if not any("failed" not in record for record in records):
        raise UserError(f"every case failed, the first with: {records[0]['failed']}; there is nothing to draw")
    for path in write(records, args.out):
        print(path)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 2 for bad input."""
    return command(run, parser, argv)


if __name__ == "__main__":
    raise SystemExit(main())

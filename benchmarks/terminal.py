"""Progress and tables on the terminal, through rich."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

WIDE = 150  # columns, where nobody looks
Reader = Callable[[dict[str, Any]], str]  # of a record; KeyError where it has no such figure

out = Console(width=None if sys.stdout.isatty() else WIDE)
err = Console(stderr=True)


def note(message: str) -> None:
    err.print(message, markup=False, highlight=False)


@contextmanager
def bar(total: int) -> Iterator[Progress]:
    """A progress bar on standard error, whose one task is `total` steps long."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with Progress(*columns, console=err, disable=not sys.stderr.isatty()) as progress:
        progress.add_task("", total=total)
        yield progress


CASE = (
    ("system", lambda r: r["system"]),
    ("drafts", lambda r: str(r["drafts"] or "plain")),
    ("rows", lambda r: str(r["batch"])),
    ("T", lambda r: f"{r['temperature']:g}"),
    ("text", lambda r: r["text"]),
)
SPEED = (
    ("tokens/s", lambda r: f"{r['tokens_per_s']:.1f}"),
    ("min-max", lambda r: f"{min(r['tokens_per_s_all']):.0f}-{max(r['tokens_per_s_all']):.0f}"),
    ("decoding", lambda r: f"{r['decode_tokens_per_s']:.1f}"),
    ("ms/token", lambda r: f"{r['ms_per_token']:.1f}"),
    ("first, ms", lambda r: f"{r['first_token_ms']:.0f}"),
    ("tokens/round", lambda r: f"{r['tokens_per_round']:.2f}"),
    ("kept by position", lambda r: " ".join(f"{p:.2f}".lstrip("0") for p in r["acceptance_by_position"])),
    ("equal", lambda r: f"{r['equal']}/{r['compared']}"),
)
WORK = (
    ("ms/round", lambda r: f"{r['ms_per_round']:.1f}"),
    ("forwards/token", lambda r: f"{r['target_forwards_per_token']:.2f}"),
    ("syncs/round", lambda r: f"{r['host_syncs_per_round']:g}"),
    ("primitives/round", lambda r: f"{r['primitives_per_round']:.0f}"),
    ("weights, MB/token", lambda r: f"{r['weight_bytes_per_token'] / 1e6:.1f}"),
    ("of bandwidth", lambda r: f"{r['bandwidth_share']:.0%}"),
    ("peak, GB", lambda r: f"{r['peak_memory_gb']:.2f}"),
    ("GPU, %", lambda r: f"{r['gpu_utilisation']:.0f}"),
    ("system, W", lambda r: f"{r['system_power_w']:.0f}"),
)


def tables(records: Sequence[dict[str, Any]], title: str) -> list[Table]:
    """The measured cases: how fast, and what a round is made of. A column that no case fills is left out."""
    measured = [record for record in records if "failed" not in record]
    return [_table(measured, CASE + columns, title) for columns in (SPEED, WORK)] if measured else []


def _table(records: Sequence[dict[str, Any]], columns: Sequence[tuple[str, Reader]], title: str) -> Table:
    cells = {name: [_cell(read, record) for record in records] for name, read in columns}
    filled = {name: column for name, column in cells.items() if any(column)}
    shown = Table(title=title)
    for name in filled:
        shown.add_column(name, no_wrap=name != "kept by position")
    for row in zip(*filled.values(), strict=True):
        shown.add_row(*row)
    return shown


def _cell(read: Reader, record: dict[str, Any]) -> str:
    try:
        return read(record)
    except KeyError:
        return ""


def remarks(records: Sequence[dict[str, Any]]) -> list[str]:
    """What failed, and where texts part from their reference."""
    lines = []
    for r in records:
        name = f"{r['system']}, {r['drafts'] or 'plain'}, {r['batch']} rows, T {r['temperature']:g}, {r['text']}"
        if "failed" in r:
            lines.append(f"failed: {name}: {r['failed']}")
        elif d := r.get("first_difference"):
            where = f"prompt {d['prompt']}, token {d['position']}: {d['token']}, reference {d['reference']}"
            lines.append(f"differs from {r['reference']}: {name}: {where}")
    return lines

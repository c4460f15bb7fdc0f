"""`Progress`: a callback that is told how many parts of how many are done."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]


def no_progress(done: int, total: int) -> None:
    """A Progress that does nothing."""

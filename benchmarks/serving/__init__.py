"""Many requests at once, measured: `python -m benchmarks.serving PART`."""

from __future__ import annotations


def main(argv: list[str] | None = None) -> int:
    """What `python -m benchmarks.serving` does."""
    from benchmarks.serving import __main__ as command  # which imports what a system's process has no need of

    return command.main(argv)

"""The server from outside: what HTTP costs, what rude clients do to others, and the servers of other projects:
`python -m benchmarks.server PART`.

Everything here speaks HTTP to a server, but for `scripted`, whose engine makes rounds of a given time.
"""

from __future__ import annotations


def main(argv: list[str] | None = None) -> int:
    """What `python -m benchmarks.server` does."""
    from benchmarks.server import __main__ as command  # which imports what the readers' process has no need of

    return command.main(argv)

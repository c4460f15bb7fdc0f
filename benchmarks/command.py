"""What the benchmarks' commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from mlx_gemma_mtp.cli import command as commands
from mlx_gemma_mtp.errors import UserError


def command(
    run: Callable[[argparse.Namespace], int], parser: Callable[[], argparse.ArgumentParser], argv: list[str] | None
) -> int:
    """Parses the arguments, calls `run` with them, and returns the exit code.

    A package that is not installed and a file that cannot be had are bad input, with exit code 2.
    """

    def asked(args: argparse.Namespace) -> int:
        try:
            return run(args)
        except ModuleNotFoundError as error:
            raise UserError(f"{error.name} is not installed; pip install 'mlx-gemma-mtp[bench]'") from None
        except OSError as error:
            raise UserError(str(error)) from None

    return commands.command(asked, parser, argv)

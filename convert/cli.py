"""Command line: Hugging Face checkpoint in, MLX folder out, or one line that says why not."""

import argparse
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from mlx_gemma_mtp.errors import UserError

from .quantize import Affine
from .run import convert
from .writer import DTYPES


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 2 after a user error, 130 after an interruption."""
    args = _parser().parse_args(argv)
    try:
        if not args.quantize and (args.q_bits or args.q_group_size):
            raise UserError("--q-bits and --q-group-size expect -q; add -q")
        affine = Affine(args.q_bits or 4, args.q_group_size or 64) if args.quantize else None
        with _terminate_like_interrupt():
            print(convert(args.hf_path, args.mlx_path, affine, args.dtype))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx-gemma-mtp-convert",
        description="Convert a Gemma 4 target or MTP drafter from the Hugging Face layout to MLX.",
    )
    parser.add_argument("--hf-path", required=True, metavar="SOURCE", help="local folder or hub id")
    parser.add_argument("--mlx-path", required=True, metavar="OUT", help="folder to create")
    parser.add_argument("-q", "--quantize", action="store_true", help="quantise the matrices")
    parser.add_argument("--q-bits", type=int, choices=(2, 3, 4, 5, 6, 8), help="default 4")
    parser.add_argument("--q-group-size", type=int, choices=(32, 64, 128), help="default 64")
    parser.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        default="bfloat16",
        help="of what stays float (default bfloat16)",
    )
    return parser


@contextmanager
def _terminate_like_interrupt() -> Iterator[None]:
    """SIGTERM unwinds the stack, so that a stopped job leaves no half-written gigabytes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)

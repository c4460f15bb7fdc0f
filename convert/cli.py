"""Command line: Hugging Face checkpoint in, MLX folder out, or one line that says why not."""

import argparse
from collections.abc import Callable

from mlx_gemma_mtp.cli.command import Parser, guarded, texts
from mlx_gemma_mtp.errors import UserError

from .blocks import DTYPES
from .check import check_command
from .inspect import inspect_command
from .quality import quality_command
from .quantize import AFFINE_BITS, GROUP_SIZES, MODES, RECIPES, Recipe, recipe
from .run import convert

MLX_PATH = "mlx_model"  # as mlx_lm.convert's


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 1 where `check` or `quality` found something, 2 after a user error, 130 after an
    interruption.
    """
    return guarded(lambda: _run(texts(argv)))


def _run(argv: list[str]) -> int:
    if argv and argv[0] in COMMANDS:
        return COMMANDS[argv[0]](argv[1:])
    return _convert(argv)


def _convert(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    given = (args.hf_path, args.mlx_path, _recipe(args), args.dtype, args.pair, args.upload_repo, args.adapter_path)
    print(convert(*given, args.quality, args.revision, args.dequantize, args.stream))
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "check": check_command,
    "inspect": inspect_command,
    "quality": quality_command,
}


def _recipe(args: argparse.Namespace) -> Recipe | None:
    given = (args.q_mode, args.q_bits, args.q_group_size, args.quant_predicate)
    if args.quantize:
        return recipe(*given)
    if any(given):
        raise UserError("--q-bits, --q-group-size, --q-mode and --quant-predicate expect -q; add -q")
    return None


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mlx-gemma-mtp-convert",
        description="Convert a Gemma 4 target or MTP drafter from the Hugging Face layout to MLX.",
        epilog="Also: inspect SOURCE (what a model is and needs), check OUT (is a converted folder sound), "
        "quality OUT (what it lost).",
    )
    parser.add_argument("--hf-path", required=True, metavar="SOURCE", help="local folder or hub id")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of SOURCE on the hub")
    parser.add_argument(
        "--stream",
        action="store_true",
        help="download, convert and drop SOURCE's weight files one by one; a run that was stopped goes on",
    )
    parser.add_argument("--mlx-path", default=MLX_PATH, metavar="OUT", help=f"folder to create (default {MLX_PATH})")
    parser.add_argument("--pair", action="store_true", help="also convert SOURCE-assistant to OUT-assistant")
    parser.add_argument(
        "--upload-repo", metavar="REPO", help="then upload to this hub repository (a drafter of --pair: REPO-assistant)"
    )
    parser.add_argument(
        "--adapter-path", metavar="FOLDER", help="fuse this LoRA adapter (mlx-lm's or PEFT's) into the weights"
    )
    parser.add_argument(
        "-d", "--dequantize", action="store_true", help="read weights that MLX quantised, and write them as floats"
    )
    parser.add_argument(
        "--quality", action="store_true", help="then measure what was lost, for the card too (as `quality` does)"
    )
    parser.add_argument("-q", "--quantize", action="store_true", help="quantise the matrices")
    parser.add_argument("--q-bits", type=int, choices=AFFINE_BITS, help="default 4")
    parser.add_argument("--q-group-size", type=int, choices=GROUP_SIZES, help="default 64")
    parser.add_argument("--q-mode", choices=("affine", *MODES), help="default affine; the others fix bits and groups")
    parser.add_argument(
        "--quant-predicate",
        choices=[name for name in RECIPES if name != "drafter"],
        help="which tensors get other bits (default: ple-safe for E2B and E4B, default for all others)",
    )
    parser.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        default="bfloat16",
        help="of what stays float (default bfloat16)",
    )
    return parser

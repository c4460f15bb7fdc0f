"""`mlx-gemma-mtp COMMAND ...`, also `python -m mlx_gemma_mtp COMMAND ...`: one name for all command lines."""

from __future__ import annotations

import sys
from importlib import import_module

from ._version import __version__
from .cli.command import guarded, texts
from .errors import UserError

# name -> (module with a `main(argv)`, what it does); nothing is imported before it is wanted: see blas.preload
COMMANDS = {
    "generate": ("mlx_gemma_mtp.generate", "text from a prompt"),
    "chat": ("mlx_gemma_mtp.chat", "a chat in the terminal; in a pipe each line is a turn"),
    "serve": ("mlx_gemma_mtp.serve", "the model behind OpenAI's and Anthropic's HTTP interfaces"),
    "convert": (
        "mlx_gemma_mtp.convert.cli",
        "a Hugging Face checkpoint to an MLX folder; inspect and check folders",
    ),
    "verify": ("mlx_gemma_mtp.verify", "does MTP keep the text, with this pair on this machine?"),
    "calibrate": ("mlx_gemma_mtp.calibrate", "measure what drafts cost on this machine"),
    "doctor": ("mlx_gemma_mtp.doctor", "check this machine's Metal kernels, and time the ways through them"),
    "trace-routing": ("mlx_gemma_mtp.trace_routing", "which experts a mixture of experts wakes"),
}
EXPECTED = f"expected one of {', '.join(COMMANDS)} (see mlx-gemma-mtp --help)"


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code of the command, 2 where there is none of that name."""
    return guarded(lambda: _run(texts(argv)))


def _run(argv: list[str]) -> int:
    if not argv:
        raise UserError(f"there is no command; {EXPECTED}")
    if argv[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if argv[0] == "--version":
        print(f"mlx_gemma_mtp {__version__}")
        return 0
    name = argv[0].replace("_", "-")
    if name not in COMMANDS:
        raise UserError(f"there is no command {argv[0]!r}; {EXPECTED}")
    return import_module(COMMANDS[name][0]).main(argv[1:])


def _usage() -> str:
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: mlx-gemma-mtp COMMAND [options]",
            "",
            "Gemma 4 with its MTP drafters on MLX: more tokens a second, the same text.",
            "",
            *(f"  {name:{width}}  {what}" for name, (_, what) in COMMANDS.items()),
            "",
            "mlx-gemma-mtp COMMAND --help shows its options. --version shows the version.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())

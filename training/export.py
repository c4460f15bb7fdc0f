"""Write a trained pair for use: bfloat16 in Hugging Face layout, then converted folders that mlx_gemma_mtp opens.

`python -m training.export --target RUN/target/hf --drafter RUN/drafter/hf --tokenizer DATA --out OUT`
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import torch

from convert.cli import main as convert
from mlx_gemma_mtp.errors import UserError
from training import gemma
from training.cli import command
from training.drafter import ROUND
from training.tokenizer import BOS, PAD

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def export(target: Path, drafter: Path, tokenizer: Path, out: Path) -> dict[str, int]:
    """Write out/hf/{target,drafter} and out/{target,drafter}. Returns the bytes of the two converted folders.

    Raises UserError where `out` holds a pair already.
    """
    if (out / "target").exists() or (out / "drafter").exists():
        raise UserError(f"--out {out} holds a pair already; name another folder")
    model, drafts = gemma.load_target(target), gemma.load_drafter(drafter)
    tokens = {"bos_token_id": BOS, "eos_token_id": model.config.eos_token_id, "pad_token_id": PAD, "do_sample": False}
    model.generation_config.update(**tokens)
    rounds = {"num_assistant_tokens": ROUND, "num_assistant_tokens_schedule": "constant"}
    drafts.generation_config.update(**tokens, **rounds)
    sizes = {}
    for name, trained in (("target", model), ("drafter", drafts)):
        gemma.save(trained.to(torch.bfloat16), out / "hf" / name)
        if name == "target":
            for file in TOKENIZER_FILES:
                shutil.copy(tokenizer / file, out / "hf" / name)
        if convert(["--hf-path", str(out / "hf" / name), "--mlx-path", str(out / name), "--dtype", "bfloat16"]):
            raise UserError(f"{out / 'hf' / name} could not be converted")
        sizes[name] = sum(file.stat().st_size for file in (out / name).iterdir())
    return sizes


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.export", description="Write a trained pair for use.")
    parser.add_argument("--target", type=Path, required=True, help="trained target, Hugging Face layout")
    parser.add_argument("--drafter", type=Path, required=True, help="trained drafter, Hugging Face layout")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with the tokenizer's files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write target/, drafter/ and hf/ into")
    args = parser.parse_args(argv)
    print(export(args.target, args.drafter, args.tokenizer, args.out))


if __name__ == "__main__":
    sys.exit(main())

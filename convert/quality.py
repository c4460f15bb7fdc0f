"""`quality OUT --against SOURCE`: what a conversion changed in what the model says, measured on a text.

Layer by layer, so that a model needs the memory of one layer: KL of the next token's distribution, how often the first
choice is another one, how often the drafter's first draft is the first choice, and which layer differs most by itself.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_gemma_mtp.cli.command import Parser
from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.files.files import whole

from . import check, source
from .checkpoint import Checkpoint
from .divergence import Quality, measure

TEXT = Path(__file__).with_name("quality.txt")
LENGTH = 512  # tokens of a row
TOKENS = 1024
HEADING = "## Quality"


def quality_command(argv: list[str]) -> int:
    """Runs `quality`; returns the exit code: 0, or 1 where something is out of line."""
    parser = Parser(prog="mlx-gemma-mtp-convert quality", description=__doc__)
    parser.add_argument("folder", metavar="OUT", help="a converted target")
    parser.add_argument("--against", metavar="SOURCE", required=True, help="the folder or hub id it was converted from")
    parser.add_argument(
        "--draft-model", metavar="DRAFTER", help="the drafter (default: SOURCE-assistant, if it is here)"
    )
    parser.add_argument("--text", metavar="FILE", help="text to measure on (default: one that comes with the package)")
    parser.add_argument("--tokens", metavar="N", type=int, default=TOKENS, help=f"of the text (default {TOKENS})")
    args = parser.parse_args(argv)
    folder = Path(args.folder).expanduser()
    if args.tokens < 2:
        raise UserError(f"--tokens is {args.tokens}; expected 2 or more")
    drafters = drafters_of(folder, args.against, args.draft_model)
    found = quality(folder, source.find(args.against), drafters, args.text, args.tokens)
    print(f"{folder} against {args.against}, {found.tokens} tokens")
    print("\n".join(lines(found)))
    if write_section(folder / "README.md", found):
        print(f"{folder / 'README.md'}: figures written")
    return 1 if found.findings else 0


def converted(folder: Path) -> Checkpoint:
    """Returns a folder that convert wrote, whose headers are as they should be. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"{folder}: not a folder; expected the --mlx-path of a conversion")
    model = Checkpoint.open(folder)
    if not model.converted:
        raise UserError(f"{folder} has Hugging Face tensor names; expected a converted folder; convert it first")
    for wrong in (finding for entry in model.entries for finding in check.headers(model, entry)):
        raise UserError(f"{folder}: {wrong}; convert it again")
    return model


def quality(
    folder: Path, against: Path, drafters: tuple[Path, Path] | None, text: str | None = None, tokens: int = TOKENS
) -> Quality:
    """Returns what the conversion of `against` to `folder` changed on the first `tokens` tokens of a text.

    drafters: the folders of the drafter before and after; text: a file (None: the one that comes with the package).
    Raises UserError for what cannot be measured.
    """
    model = converted(folder)
    opened = tuple(Checkpoint.open(each) for each in drafters) if drafters else None
    return measure(model, Checkpoint.open(against), opened, tokens_of(folder, text, tokens))


def drafters_of(folder: Path, against: str, given: str | None) -> tuple[Path, Path] | None:
    """Returns the folders of the drafter before and after: one that is given or lies beside the source, and
    OUT-assistant if it is there. None where there is none. Raises UserError for one that is given and not found.
    """
    beside = Path(f"{Path(against).expanduser()}-assistant")
    if given is None and not beside.is_dir():
        return None
    before = source.find(given) if given else beside
    own = folder.with_name(f"{folder.name}-assistant")
    return before, own if own.is_dir() else before


def tokens_of(folder: Path, text: str | None, limit: int) -> mx.array:
    """Returns rows of tokens of a text, each after <bos>, int32 [rows, length].

    Raises UserError for a text that is too short or cannot be read.
    """
    from tokenizers import Tokenizer

    path = Path(text).expanduser() if text else TEXT
    try:
        told = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {path} cannot be read ({error}); expected a text file in UTF-8") from None
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{file} is missing; expected the tokenizer beside the weights; convert the source again")
    ids = Tokenizer.from_file(str(file)).encode(told, add_special_tokens=False).ids[:limit]
    if len(ids) < 2:
        raise UserError(f"--text {path} has {len(ids)} tokens; expected 2 or more")
    rows = -(-len(ids) // (LENGTH - 1))
    length = len(ids) // rows
    text_config = Checkpoint.open(folder).text
    if max(ids) >= text_config["vocab_size"]:
        raise UserError(
            f"{file} has token {max(ids)}; expected ids below {text_config['vocab_size']}, the vocab_size of "
            "config.json; take the tokenizer of the source"
        )
    begin = text_config.get("bos_token_id")
    table = np.array(ids[: rows * length], np.int32).reshape(rows, length)
    if begin is not None:
        table = np.concatenate([np.full((rows, 1), begin, np.int32), table], axis=1)
    return mx.array(table)


def figures(found: Quality) -> Iterator[tuple[str, str]]:
    """Yields what was measured as people read it: (figure, value)."""
    yield "KL divergence, mean", f"{found.mean:.4g} nats"
    yield "KL divergence, 99th percentile", f"{found.p99:.4g} nats"
    yield "first choice is another", f"{found.flips:.2%} of tokens"
    if found.drafts:
        before, after = found.drafts
        yield "first draft is the first choice", f"{after:.1%} of tokens, {before:.1%} before the conversion"
    worst = max(range(len(found.layers)), key=found.layers.__getitem__)
    yield "layer that differs most by itself", f"{worst}, by {found.layers[worst]:.3g} of what it adds"


def lines(found: Quality) -> Iterator[str]:
    """Yields a line for each figure, then one for each finding."""
    yield from (f"{name}: {value}" for name, value in figures(found))
    yield from (f"finding: {finding}" for finding in found.findings)


def section(found: Quality) -> str:
    """Returns the section of a model card."""
    head = [f"{HEADING}\n", f"Against the source, float32, {found.tokens:,} tokens:\n", "| figure | value |"]
    return "\n".join([*head, "|---|---|", *(f"| {name} | {value} |" for name, value in figures(found))])


def write_section(card: Path, found: Quality) -> bool:
    """Puts the figures into a model card, in place of older ones. Returns whether there is a card."""
    if not card.is_file():
        return False
    text = re.sub(rf"\n*^{HEADING}\n.*?(?=^## |\Z)", "\n\n", card.read_text(encoding="utf-8"), flags=re.M | re.S)
    with whole(card) as part:
        part.write_text(f"{text.rstrip()}\n\n{section(found)}\n", encoding="utf-8")
    return True

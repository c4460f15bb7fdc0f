"""Flags that command lines share, and what they mean: the model, thoughts, sampling, drafts, limits."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

from ..engine.arguments import LONGEST
from ..errors import UserError, clipped, shown
from ..files import prefix_store
from ..sampling.params import ACCEPT, COUPLED, MTP, SamplingParams, number
from .command import loaded, tell
from .prompts import read_schema, read_source

if TYPE_CHECKING:
    from ..engine.engine import Engine

BUNDLED = (
    "This is the small bundled model, a demonstration trained on Python code; much of what it says is wrong. "
    "For a real one: python -m {command} --model FOLDER (see README.md: a real model)."
)


def add_models(p: argparse.ArgumentParser) -> None:
    """Adds the flags that name the pair."""
    group = p.add_argument_group("models")
    group.add_argument("--model", help="a converted folder or a hub id (default: the small bundled pair)")
    group.add_argument(
        "--draft-model", default="auto", metavar="PATH|auto|none", help="the drafter (default: auto, look for it)"
    )
    group.add_argument("--revision", help="the hub revision of --model")
    group.add_argument(
        "--draft-bits", type=int, metavar="N", help="quantise a bf16 drafter to N bits while loading: 2, 3, 4, 5, 6, 8"
    )
    add_kv_bits(group)
    add_row_invariant(group)


def add_kv_bits(parser: argparse._ActionsContainer) -> None:
    """Adds what says in how many bits keys and values are kept, to a parser or a group of one."""
    parser.add_argument(
        "--kv-bits",
        type=int,
        metavar="8|4",
        help="keep keys and values of full layers in 8 or 4 bits, for long contexts (default: the model's type)",
    )
    parser.add_argument("--kv-bits-rings", action="store_true", help="those of sliding layers, too")


def add_row_invariant(parser: argparse._ActionsContainer) -> None:
    """Adds what has products keep a row's bits, to a parser or a group of one."""
    parser.add_argument(
        "--row-invariant",
        action="store_true",
        help="on a GPU: products give a row the same bits whatever rows stand beside it, drafts or company",
    )


def add_thoughts(group: argparse._ArgumentGroup) -> None:
    """Adds the flags of thoughts to a group."""
    group.add_argument("--thinking", action="store_true", help="ask the chat template for a thought before the reply")
    group.add_argument("--thinking-budget", type=int, metavar="N", help="close thoughts after N tokens in all")
    group.add_argument(
        "--hide-thinking", action="store_true", help="leave thoughts out on a terminal (elsewhere they always are)"
    )


def add_sampling(p: argparse.ArgumentParser, max_tokens: int, what: str) -> None:
    """Adds the flags of sampling. max_tokens: the default. what: has so many tokens."""
    group = p.add_argument_group("sampling")
    group.add_argument(
        "--max-tokens",
        type=int,
        default=max_tokens,
        help=f"at most so many tokens a {what} (default: {max_tokens})",
    )
    group.add_argument(
        "--temp", type=float, help="temperature; 0 is greedy (default: as the model's generation_config.json says)"
    )
    group.add_argument("--top-p", type=float, help="keep the likeliest tokens up to this probability; 1 is off")
    group.add_argument("--top-k", type=int, help="keep so many of the likeliest tokens; -1 is off")
    group.add_argument(
        "--min-p", type=float, help="drop tokens below this share of the likeliest's probability (default: the model's)"
    )
    group.add_argument(
        "--seed", type=int, help="same seed, same text, for every draft length if coupled (default: a fresh one)"
    )
    group.add_argument("--stop", action="append", default=[], help="end at this text and leave it out; repeatable")
    group.add_argument(
        "--stop-repetition", type=int, metavar="N", help="end where the last N tokens repeat one block (default: off)"
    )
    group.add_argument("--ignore-eos", action="store_true", help="go on to --max-tokens")


def add_rules(p: argparse.ArgumentParser) -> None:
    """Adds the flags of penalties and grammars."""
    group = p.add_argument_group("penalties and grammars")
    group.add_argument(
        "--repetition-penalty",
        type=float,
        help="divides the logits of what was said; 1 is off (default: the model's)",
    )
    group.add_argument("--presence-penalty", type=float, default=0.0, help="taken from the logits of what was said")
    group.add_argument("--frequency-penalty", type=float, default=0.0, help="the same, for each time that it was said")
    group.add_argument(
        "--logit-bias", action="append", default=[], metavar="ID=BIAS", help="added to a token's logit; repeatable"
    )
    group.add_argument("--json-schema", metavar="FILE|TEXT", help="the reply is JSON of this schema (extra `grammar`)")
    group.add_argument("--regex", help="the reply matches this expression (extra `grammar`)")
    group.add_argument("--grammar", metavar="FILE|TEXT", help="the reply follows this Lark grammar (extra `grammar`)")


def add_drafts(p: argparse.ArgumentParser) -> None:
    """Adds the flags of drafts."""
    group = p.add_argument_group("drafts")
    group.add_argument(
        "--num-draft-tokens",
        default="auto",
        metavar="N|auto",
        help="drafts a round; 0 is plain decoding (default: auto, by measured cost and acceptance)",
    )
    group.add_argument(
        "--draft-sources",
        default=MTP,
        metavar="NAMES",
        help="who drafts: mtp is the drafter, copy finds drafts in the request's own text, forced has what a grammar "
        "leaves no choice of (default: %(default)s)",
    )
    group.add_argument(
        "--no-learning",
        dest="learning",
        action="store_false",
        help="take what rounds cost and drafts kept before as it is: equal calls, equal draft lengths",
    )
    group.add_argument(
        "--draft-temperature", type=float, default=1.0, metavar="T", help="the drafter's, times --temp (default: 1)"
    )
    group.add_argument(
        "--accept",
        choices=ACCEPT,
        default=COUPLED,
        help="which sampled drafts stay: coupled, where the text never depends on them (default), or rejection, which "
        "keeps more; the text then depends on the drafts, its distribution does not",
    )


def add_limits(group: argparse._ArgumentGroup, timeout: float | None = None) -> None:
    """Adds the flags of time and memory to a group. timeout: the default, in seconds; None is never."""
    group.add_argument(
        "--timeout",
        type=float,
        default=timeout,
        metavar="SECONDS",
        help="end texts that are not done so long after they were asked for, with what there is "
        f"(default: {'never' if timeout is None else f'{timeout:g}'})",
    )
    group.add_argument(
        "--memory-limit",
        type=float,
        metavar="GB",
        help="what weights, K/V and passes may take together, in GB of 10^9 bytes (default: what the machine has)",
    )
    group.add_argument(
        "--prefix-memory",
        type=float,
        metavar="GB",
        help="what of it the K/V of prompts that may come again take, 0 for none (default: a share of what is left)",
    )
    group.add_argument(
        "--prefix-cache",
        metavar="DIR",
        help="a folder in which the K/V of prompts outlast the command, for the next one (default: none)",
    )
    group.add_argument(
        "--prefix-cache-limit",
        type=float,
        default=prefix_store.LIMIT / 1e9,
        metavar="GB",
        help=f"what its files may take; what was used last stays (default: {prefix_store.LIMIT / 1e9:g})",
    )
    group.add_argument("--wired-limit", action="store_true", help="keep the weights wired in a Mac's memory")


def read_params(args: argparse.Namespace) -> SamplingParams:
    """Returns the sampling settings that the arguments name. A command without --logprobs sets its default.

    Raises UserError.
    """
    return SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temp,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        presence_penalty=args.presence_penalty,
        frequency_penalty=args.frequency_penalty,
        logit_bias=dict(map(read_bias, args.logit_bias)),
        logprobs=args.logprobs,
        json_schema=read_schema(args.json_schema),
        regex=args.regex,
        grammar=read_source("--grammar", args.grammar, lambda text: ":" in text or "\n" in text),
        thinking=args.thinking,
        thinking_budget=args.thinking_budget,
        seed=args.seed,
        stop=tuple(args.stop),
        ignore_eos=args.ignore_eos,
        stop_repetition=args.stop_repetition,
    )


def read_depth(text: str, flag: str = "--num-draft-tokens") -> int | str:
    """Returns the number of drafts a round that a flag names, or 'auto'. Raises UserError."""
    if text == "auto":
        return text
    if not re.fullmatch("[0-9]{1,18}", text):
        raise UserError(f"{flag} is {clipped(text)}, expected auto, 0 (plain decoding) or more")
    return int(text)


def read_timeout(seconds: float | None) -> float | None:
    """Returns the seconds of --timeout, None for no limit. Raises UserError."""
    expected = f"seconds above 0, at most {LONGEST:g}"
    return None if seconds is None else number("--timeout", seconds, lambda n: 0 < n <= LONGEST, expected)


def read_gigabytes(flag: str, gigabytes: float | None) -> int | None:
    """Returns the bytes that a flag names in GB, None where it is not given. Raises UserError."""
    if gigabytes is None:
        return None
    return int(number(flag, gigabytes, lambda n: 1e-9 <= n <= 1e6, "GB above 0, such as 12 or 7.5") * 1e9)


def read_prefix_memory(gigabytes: float | None) -> int | None:
    """Returns the bytes that --prefix-memory names in GB, None for a share of what is left. Raises UserError."""
    if gigabytes is None:
        return None
    return int(
        number("--prefix-memory", gigabytes, lambda n: 0 <= n <= 1e6, "GB, such as 2 or 0.5, or 0 for none") * 1e9
    )


def read_bias(text: str) -> tuple[int, float]:
    """Returns (token id, bias) of a --logit-bias 'ID=BIAS'. Raises UserError."""
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise UserError(f"--logit-bias is {shown(text)}, expected ID=BIAS such as 106=-5 or 106=-inf") from None


def load_options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the options of `load` that the arguments name. args: with what read_depth returns. Raises UserError."""
    return {
        "revision": args.revision,
        "num_draft_tokens": args.num_draft_tokens,
        "draft_bits": args.draft_bits,
        "kv_bits": args.kv_bits,
        "kv_bits_rings": args.kv_bits_rings,
        "row_invariant": args.row_invariant,
        "memory_limit": read_gigabytes("--memory-limit", args.memory_limit),
        "prefix_memory": read_prefix_memory(args.prefix_memory),
        "prefix_cache": args.prefix_cache,
        "prefix_cache_limit": read_gigabytes("--prefix-cache-limit", args.prefix_cache_limit),
        "wired_limit": args.wired_limit,
        "draft_temperature": args.draft_temperature,
        "accept": args.accept,
        "draft_sources": args.draft_sources,
        "learning": args.learning,
    }


def load_engine(args: argparse.Namespace, command: str, **options: Any) -> Engine:
    """Loads the engine that the arguments name. Says on standard error where it is the bundled pair.

    args: as of load_options. command: a module, to name in a note. options: of `load`, beside those that the flags
    name. Raises UserError.
    """
    named = load_options(args)
    if args.model is None:
        tell(BUNDLED.format(command=command))
    return loaded(args.model, args.draft_model, **named, **options)

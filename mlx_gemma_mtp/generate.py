"""`python -m mlx_gemma_mtp.generate`: text on standard output as it is made."""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .cli.command import Bar, Parser, Stage, command, loaded, note, tell
from .cli.prompts import read_choice, read_messages, read_prompts, read_schema, read_source, read_tools
from .cli.replies import Printer
from .engine.arguments import LONGEST
from .errors import UserError, clipped, shown
from .files import prefix_store
from .sampling.params import ACCEPT, COUPLED, MAX_ROWS, SamplingParams, number
from .text.tool_choice import ToolChoice
from .text.tools import Tools

if TYPE_CHECKING:
    from .engine.engine import Engine, Result
    from .text.encode import Prompt

BUNDLED = (
    "This is the small bundled model, a demonstration trained on Python code; it knows nothing. "
    "For a real one: python -m mlx_gemma_mtp.generate --model FOLDER (see README.md: a real model)."
)


def parser() -> argparse.ArgumentParser:
    p = Parser("mlx_gemma_mtp.generate", description="Gemma 4 with its MTP drafter: the same text, faster.")
    _add_models(p)
    _add_prompts(p)
    _add_tools(p)
    _add_sampling(p)
    _add_rules(p)
    _add_drafts(p)
    _add_limits(p)
    _add_output(p)
    return p


def _add_models(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("models")
    group.add_argument("--model", help="a converted folder or a hub id (default: the small bundled pair)")
    group.add_argument(
        "--draft-model", default="auto", metavar="PATH|auto|none", help="the drafter (default: auto, look for it)"
    )
    group.add_argument("--revision", help="the hub revision of --model")
    group.add_argument(
        "--draft-bits", type=int, metavar="N", help="quantise a bf16 drafter to N bits while loading: 2, 3, 4, 5, 6, 8"
    )


def _add_prompts(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("prompts")
    group.add_argument("--prompt", action="append", default=[], help="a prompt; repeatable; - reads standard input")
    group.add_argument("--prompt-file", metavar="FILE", help="prompts, one a line")
    group.add_argument(
        "--messages",
        action="append",
        default=[],
        metavar="FILE|TEXT",
        help="a prompt of chat messages, a JSON list; repeatable; - reads standard input",
    )
    group.add_argument("--system-prompt", help="a system turn before each prompt")
    group.add_argument("--ignore-chat-template", action="store_true", help="take prompts as raw text")
    group.add_argument(
        "--allow-special", action="store_true", help="let control strings such as <turn|> in prompts be control tokens"
    )
    group.add_argument("--image", "--audio", dest="media", action="append", help=argparse.SUPPRESS)


def _add_tools(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("thoughts and tools")
    group.add_argument("--thinking", action="store_true", help="ask the chat template for a thought before the reply")
    group.add_argument("--thinking-budget", type=int, metavar="N", help="close thoughts after N tokens in all")
    group.add_argument(
        "--hide-thinking", action="store_true", help="leave thoughts out on a terminal (elsewhere --json has them)"
    )
    group.add_argument(
        "--tools",
        metavar="FILE|TEXT",
        help="functions that may be called, a JSON list as OpenAI's; - reads standard input",
    )
    group.add_argument(
        "--tool-choice",
        metavar="CHOICE",
        help="auto (default), none, required, the name of the tool to call, or OpenAI's object in JSON "
        "(extra `grammar` for all but the first two)",
    )


def _add_sampling(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int, default=512, help="at most so many tokens a prompt (default: 512)")
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
    group.add_argument("--ignore-eos", action="store_true", help="go on to --max-tokens")


def _add_rules(p: argparse.ArgumentParser) -> None:
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


def _add_drafts(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("drafts")
    group.add_argument(
        "--num-draft-tokens",
        default="auto",
        metavar="N|auto",
        help="drafts a round; 0 is plain decoding (default: auto, by measured cost and acceptance)",
    )
    group.add_argument(
        "--frozen-costs",
        action="store_true",
        help="take the measured costs as they are: equal calls, equal draft lengths",
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


def _add_limits(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("limits")
    group.add_argument(
        "--max-rows",
        type=int,
        default=MAX_ROWS,
        metavar="N",
        help=f"prompts that are decoded at once; the others wait (default: {MAX_ROWS})",
    )
    group.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help="end texts that are not done so long after the model is loaded, with what there is (default: never)",
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


def _add_output(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("output")
    group.add_argument("--stats", action="store_true", help="print figures on standard error")
    group.add_argument(
        "--json", action="store_true", help="one JSON object a prompt on standard output, instead of text"
    )
    group.add_argument("--logprobs", type=int, metavar="N", help="with --json: the N likeliest tokens at each place")
    group.add_argument("--version", action="version", version=f"mlx_gemma_mtp {__version__}")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 1 where a prompt ended with an error, 2 for bad input, 130 after Ctrl-C."""
    return command(run, parser, argv)


def run(args: argparse.Namespace) -> int:
    if args.media:
        raise UserError(f"{args.media[0]!r}: image and audio input are not supported; this package takes text alone")
    messages = [read_messages(each) for each in args.messages]
    if args.ignore_chat_template and messages:
        raise UserError("--messages are given with --ignore-chat-template; expected one of the two: drop the other")
    prompts, params = [*read_prompts(args, not messages), *messages], read_params(args)
    options = read_options(args, params)
    args.num_draft_tokens = read_depth(args.num_draft_tokens)
    args.timeout, args.memory_limit = read_timeout(args.timeout), read_memory(args.memory_limit)
    args.prefix_memory = read_prefix_memory(args.prefix_memory)
    args.prefix_cache_limit = read_gigabytes("--prefix-cache-limit", args.prefix_cache_limit)
    engine = load_engine(args, len(prompts))
    cancel = threading.Event()
    with _ctrl_c(cancel):
        results = generate(engine, prompts, params, args, options, cancel)
    if args.json:
        print_json(prompts, results)
    failed = [place for place, result in enumerate(results, 1) if result.error is not None]
    late = [place for place, result in enumerate(results, 1) if result.finish_reason == "timeout"]
    if args.model is None and not (args.json or failed or late or cancel.is_set()):
        print_speedup(engine, prompts, params, options, results)
    if args.stats:
        print_stats(results)
        tell(f"computed: {engine.description}")
        if engine.advice:
            note(engine.advice)
    for place in late:
        note(f"prompt {place} was ended by --timeout {args.timeout:g}")
    for place in failed:
        tell(f"error: prompt {place}: {results[place - 1].error}")
    return 130 if cancel.is_set() else 1 if failed else 0


def read_params(args: argparse.Namespace) -> SamplingParams:
    """Returns the sampling settings that the arguments name, for every prompt. Raises UserError."""
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
    )


def read_options(args: argparse.Namespace, params: SamplingParams) -> dict[str, Any]:
    """Returns what holds for every prompt, as options of `Engine.stream`. params: those of every prompt, which some
    options exclude. Raises UserError.
    """
    tools = None if args.tools is None else Tools.of(read_tools(args.tools))
    choice = read_choice(args.tool_choice)
    ToolChoice.of(choice, () if tools is None else tools.names).check(params)  # before anything is loaded
    if tools is not None and args.ignore_chat_template:
        raise UserError("--tools are given with --ignore-chat-template, which tells the model; drop one of the two")
    return {
        "system_prompt": args.system_prompt,
        "chat_template": not args.ignore_chat_template,
        "tools": tools,
        "tool_choice": choice,
        "allow_special": args.allow_special,
    }


def read_depth(text: str) -> int | str:
    """Returns the number of drafts a round that --num-draft-tokens names, or 'auto'. Raises UserError."""
    if text == "auto":
        return text
    if not re.fullmatch("[0-9]{1,18}", text):
        raise UserError(f"--num-draft-tokens is {clipped(text)}, expected auto, 0 (plain decoding) or more")
    return int(text)


def read_timeout(seconds: float | None) -> float | None:
    """Returns the seconds of --timeout, None for no limit. Raises UserError."""
    expected = f"seconds above 0, at most {LONGEST:g}"
    return None if seconds is None else number("--timeout", seconds, lambda n: 0 < n <= LONGEST, expected)


def read_memory(gigabytes: float | None) -> int | None:
    """Returns the bytes that --memory-limit names in GB, None for what the machine has. Raises UserError."""
    return None if gigabytes is None else read_gigabytes("--memory-limit", gigabytes)


def read_gigabytes(flag: str, gigabytes: float) -> int:
    """Returns the bytes that a flag names in GB. Raises UserError."""
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


def load_engine(args: argparse.Namespace, prompts: int) -> Engine:
    """Loads the engine that the arguments name.

    prompts: their number, which bounds the rows that are made ready; so many may wait.
    """
    if args.model is None:
        tell(BUNDLED)
    return loaded(
        args.model,
        args.draft_model,
        revision=args.revision,
        num_draft_tokens=args.num_draft_tokens,
        draft_bits=args.draft_bits,
        max_rows=min(args.max_rows, max(prompts, 1)) if args.max_rows > 0 else args.max_rows,
        max_waiting=max(prompts, 1),
        memory_limit=args.memory_limit,
        prefix_memory=args.prefix_memory,
        prefix_cache=args.prefix_cache,
        prefix_cache_limit=args.prefix_cache_limit,
        wired_limit=args.wired_limit,
        draft_temperature=args.draft_temperature,
        accept=args.accept,
        frozen_costs=args.frozen_costs,
    )


def generate(
    engine: Engine,
    prompts: list[Prompt],
    params: SamplingParams,
    args: argparse.Namespace,
    options: dict[str, Any],
    cancel: threading.Event,
) -> list[Result]:
    """Generates and prints all texts; returns their results in order, those before a Ctrl-C included.

    A single text is printed as it is made; several are printed whole, in order, each under a header.
    """
    chunks = engine.stream(prompts, params, **options, timeout=args.timeout, cancel=cancel, progress=Bar("prefill"))
    results: dict[int, Result] = {}
    single, printed = Printer(args.hide_thinking), 0
    for chunk in chunks:
        if len(prompts) == 1 and not args.json:
            single(chunk)
        if chunk.result is not None:
            results[chunk.index] = chunk.result
        while len(prompts) > 1 and not args.json and printed in results:
            print(f"=== {printed + 1}: {_title(prompts[printed])}")
            each = Printer(args.hide_thinking)
            each(results[printed])
            each.end()
            print(flush=True)
            printed += 1
    if len(prompts) == 1 and not args.json:
        single.end()
    return [results[index] for index in sorted(results)]


def _title(prompt: Prompt) -> str:
    """A prompt in a line; of messages the last one."""
    said = prompt if isinstance(prompt, str) else prompt[-1].get("content")
    line = " ".join(said.split()) if isinstance(said, str) else f"{len(prompt)} messages"
    return line if len(line) <= 70 else f"{line[:69]}\u2026"


def print_json(prompts: list[Prompt], results: list[Result]) -> None:
    for prompt, result in zip(prompts, results, strict=False):
        record = {
            "prompt": prompt,
            "text": result.text,
            "reasoning": result.reasoning,
            "tool_calls": [call.as_openai() for call in result.tool_calls],
            "tokens": result.tokens,
            "end_token": result.end_token,
            "finish_reason": result.finish_reason,
            "stats": result.stats.as_dict(),
        }
        if result.error is not None:
            record["error"] = result.error
        if result.logprobs is not None:
            record["logprobs"] = [asdict(each) for each in result.logprobs]
        print(json.dumps(record, ensure_ascii=False), flush=True)


def print_speedup(
    engine: Engine, prompts: list[Prompt], params: SamplingParams, options: dict[str, Any], results: list[Result]
) -> None:
    """Prints what MTP is worth on these prompts; for the bundled model, which is small enough to run both ways."""
    from .checks import speedup

    if not any(result.stats.rounds and result.stats.mtp for result in results):
        return
    some, same = prompts[: engine.max_rows], replace(params, seed=results[0].stats.seed)
    with Stage() as stage:
        stage("measuring what MTP is worth on this prompt")
        found = speedup.measure(engine, some, same, **options)
    tell(str(found))


def print_stats(results: list[Result]) -> None:
    """Prints the figures of each prompt, and of all together, on standard error."""
    for place, result in enumerate(results, 1):
        s = result.stats
        positions = " ".join(f"{share:.2f}" for share in s.acceptance_by_position) or "none"
        mtp = "on" if s.mtp else f"off: {s.mtp_reason}"
        lines = [
            f"prompt {place}: {s.prompt_tokens} tokens, {s.prompt_tps:.1f} tokens/s; first after {s.ttft_s:.3f} s",
            f"  generation: {s.generation_tokens} tokens, {s.generation_tps:.1f} tokens/s; end: {result.finish_reason}",
            f"  MTP {mtp}; {s.rounds} rounds, {s.tokens_per_round:.2f} tokens a round, {s.host_syncs} readbacks",
            f"  drafts: {s.accepted} of {s.drafted} accepted ({s.accept}); by position {positions}; seed {s.seed}",
            f"  rounds by draft length: {depths(s.depths)}",
        ]
        tell(*lines)
    if results:
        s = results[-1].stats
        peak = max(result.stats.peak_memory_gb for result in results)
        rate = f"{s.batch_generation_tps:.1f} tokens/s"
        rate += f" of all while the last one was decoded, {s.rows:.1f} at once" if len(results) > 1 else ""
        tell(f"all: {rate}; peak memory {peak:.3f} GB; BLAS: {s.blas}")


def depths(counts: dict[int, dict[str, int]]) -> str:
    """Returns how often each draft length was taken, and why, as in '4: 31 best, 2 confidence; 0: 1 limit'."""
    each = {drafts: ", ".join(f"{n} {reason}" for reason, n in counts[drafts].items()) for drafts in sorted(counts)}
    return "; ".join(f"{drafts}: {text}" for drafts, text in each.items()) or "none"


@contextmanager
def _ctrl_c(cancel: threading.Event) -> Iterator[None]:
    """The first Ctrl-C ends after the current round, the second at once."""

    def stop(signum: int, frame: object) -> None:
        if cancel.is_set():
            raise KeyboardInterrupt
        cancel.set()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    sys.exit(main())

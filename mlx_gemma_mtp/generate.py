"""`python -m mlx_gemma_mtp.generate`: text on standard output as it is made."""

from __future__ import annotations

import argparse
import json
import sys
import threading
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .cli import figures, flags
from .cli.command import Bar, Parser, Stage, command, interruptible, note, tell
from .cli.flags import (
    add_drafts,
    add_limits,
    add_models,
    add_rules,
    add_sampling,
    add_thoughts,
    read_depth,
    read_params,
    read_timeout,
)
from .cli.prompts import read_choice, read_messages, read_prompts, read_tools
from .cli.replies import Printer
from .engine.arguments import MOST_SAMPLES
from .errors import UserError
from .sampling.params import MAX_ROWS, SamplingParams, count
from .text.tool_choice import ToolChoice
from .text.tools import Tools

if TYPE_CHECKING:
    from .engine.engine import Engine, Result
    from .text.encode import Prompt


def parser() -> argparse.ArgumentParser:
    p = Parser("mlx_gemma_mtp.generate", description="Gemma 4 with its MTP drafter: the same text, faster.")
    add_models(p)
    _add_prompts(p)
    _add_tools(p)
    add_sampling(p, 512, "prompt")
    add_rules(p)
    add_drafts(p)
    _add_limits(p)
    _add_output(p)
    return p


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
    group.add_argument(
        "--samples", type=int, default=1, metavar="N", help="texts of each prompt, with the seeds from --seed on"
    )
    group.add_argument("--system-prompt", help="a system turn before each prompt")
    group.add_argument("--ignore-chat-template", action="store_true", help="take prompts as raw text")
    group.add_argument(
        "--allow-special", action="store_true", help="let control strings such as <turn|> in prompts be control tokens"
    )
    group.add_argument("--image", "--audio", dest="media", action="append", help=argparse.SUPPRESS)


def _add_tools(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("thoughts and tools")
    add_thoughts(group)
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


def _add_limits(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("limits")
    group.add_argument(
        "--max-rows",
        type=int,
        default=MAX_ROWS,
        metavar="N",
        help=f"prompts that are decoded at once; the others wait (default: {MAX_ROWS})",
    )
    add_limits(group)


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
    prompts = [each for each in prompts for _ in range(count("--samples", args.samples, MOST_SAMPLES))]  # of each text
    args.num_draft_tokens = read_depth(args.num_draft_tokens)
    args.timeout = read_timeout(args.timeout)
    engine = load_engine(args, len(prompts))
    cancel = threading.Event()
    with interruptible(cancel):
        results = generate(engine, prompts, params, args, options, cancel)
    if args.json:
        print_json(prompts, results)
    failed = [place for place, result in enumerate(results, 1) if result.error is not None]
    late = [place for place, result in enumerate(results, 1) if result.finish_reason == "timeout"]
    if args.model is None and not (args.json or failed or late or cancel.is_set()):
        print_speedup(engine, prompts[:: args.samples], params, options, results)
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


def load_engine(args: argparse.Namespace, prompts: int) -> Engine:
    """Loads the engine that the arguments name.

    prompts: their number, which bounds the rows that are made ready; so many may wait.
    """
    rows = min(args.max_rows, max(prompts, 1)) if args.max_rows > 0 else args.max_rows
    return flags.load_engine(args, "mlx_gemma_mtp.generate", max_rows=rows, max_waiting=max(prompts, 1))


def generate(
    engine: Engine,
    prompts: list[Prompt],
    params: SamplingParams,
    args: argparse.Namespace,
    options: dict[str, Any],
    cancel: threading.Event,
) -> list[Result]:
    """Generates and prints all texts; returns their results in order, those before a Ctrl-C included.

    prompts: of each text, those of the samples of one prompt one after another.

    A single text is printed as it is made; several are printed whole, in order, each under a header.
    """
    options = options | {"n": args.samples, "timeout": args.timeout, "cancel": cancel, "progress": Bar("prefill")}
    chunks = engine.stream(prompts[:: args.samples], params, **options)
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
        if result.cut_call is not None:
            record["cut_call"] = result.cut_call.as_openai()
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
        first, *rest = figures.lines(result.stats, result.finish_reason)
        tell(f"prompt {place}: {first}", *rest)
    if results:
        s = results[-1].stats
        peak = max(result.stats.peak_memory_gb for result in results)
        rate = f"{s.batch_generation_tps:.1f} tokens/s"
        rate += f" of all while the last one was decoded, {s.rows:.1f} at once" if len(results) > 1 else ""
        tell(f"all: {rate}; peak memory {peak:.3f} GB; BLAS: {s.blas}")


if __name__ == "__main__":
    sys.exit(main())

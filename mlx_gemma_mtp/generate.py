"""`python -m mlx_gemma_mtp.generate`: text on standard output as it is made."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from . import __version__, blas
from .cli import Bar, Parser, command, note
from .errors import UserError
from .params import ACCEPT, COUPLED, MAX_ROWS, SamplingParams

if TYPE_CHECKING:
    from .engine import Engine, Result

BUNDLED = (
    "This is the small bundled model, a demonstration trained on Python code; it knows nothing. "
    "For a real one: python -m mlx_gemma_mtp.generate --model FOLDER (see README.md, conversion)."
)


def parser() -> argparse.ArgumentParser:
    p = Parser("mlx_gemma_mtp.generate", description="Gemma 4 with its MTP drafter: the same text, faster.")
    p.add_argument("--model", help="a converted folder or a hub id (default: the small bundled pair)")
    p.add_argument(
        "--draft-model", default="auto", metavar="PATH|auto|none", help="the drafter (default: auto, look for it)"
    )
    p.add_argument("--revision", help="the hub revision of --model")
    p.add_argument(
        "--prompt", action="append", default=[], help="a prompt; repeat it for a batch; - reads standard input"
    )
    p.add_argument("--prompt-file", metavar="FILE", help="a prompt a line, made as a batch")
    p.add_argument(
        "--max-rows", type=int, default=MAX_ROWS, metavar="N", help=f"prompts in one batch (default: {MAX_ROWS})"
    )
    p.add_argument("--system-prompt", help="a system turn before each prompt")
    p.add_argument("--ignore-chat-template", action="store_true", help="take prompts as raw text")
    p.add_argument("--max-tokens", type=int, default=512, help="at most so many tokens a prompt (default: 512)")
    p.add_argument(
        "--temp", type=float, help="temperature; 0 is greedy (default: as the model's generation_config.json says)"
    )
    p.add_argument("--top-p", type=float, help="keep the likeliest tokens up to this probability; 1 is off")
    p.add_argument("--top-k", type=int, help="keep so many of the likeliest tokens; -1 is off")
    p.add_argument(
        "--min-p", type=float, default=0.0, help="drop tokens below this share of the likeliest's probability"
    )
    p.add_argument(
        "--repetition-penalty", type=float, default=1.0, help="divides the logits of what was said; 1 is off"
    )
    p.add_argument("--presence-penalty", type=float, default=0.0, help="taken from the logits of what was said")
    p.add_argument("--frequency-penalty", type=float, default=0.0, help="the same, for each time that it was said")
    p.add_argument(
        "--logit-bias", action="append", default=[], metavar="ID=BIAS", help="added to a token's logit; repeatable"
    )
    p.add_argument("--logprobs", type=int, metavar="N", help="with --json: the N likeliest tokens at each place")
    p.add_argument("--json-schema", metavar="FILE|TEXT", help="the reply is JSON of this schema (extra `grammar`)")
    p.add_argument("--regex", help="the reply matches this expression (extra `grammar`)")
    p.add_argument("--grammar", metavar="FILE|TEXT", help="the reply follows this Lark grammar (extra `grammar`)")
    p.add_argument("--thinking", action="store_true", help="ask the chat template for a thought before the reply")
    p.add_argument("--thinking-budget", type=int, metavar="N", help="close the thought after N tokens")
    p.add_argument(
        "--seed", type=int, help="same seed, same text, for every draft length if coupled (default: a fresh one)"
    )
    p.add_argument("--stop", action="append", default=[], help="end at this text and leave it out; repeatable")
    p.add_argument(
        "--num-draft-tokens",
        default="auto",
        metavar="N|auto",
        help="drafts a round; 0 is plain decoding (default: auto, by measured cost and acceptance)",
    )
    p.add_argument(
        "--frozen-costs",
        action="store_true",
        help="take the measured costs as they are: equal calls, equal draft lengths",
    )
    p.add_argument(
        "--draft-bits", type=int, metavar="N", help="quantise a bf16 drafter to N bits while loading: 2, 3, 4, 5, 6, 8"
    )
    p.add_argument(
        "--draft-temperature", type=float, default=1.0, metavar="T", help="the drafter's, times --temp (default: 1)"
    )
    p.add_argument(
        "--accept",
        choices=ACCEPT,
        default=COUPLED,
        help="which sampled drafts stay: coupled, where the text never depends on them (default), or rejection, which "
        "keeps more; the text then depends on the drafts, its distribution does not",
    )
    p.add_argument("--ignore-eos", action="store_true", help="go on to --max-tokens")
    p.add_argument("--image", "--audio", dest="media", action="append", help=argparse.SUPPRESS)
    p.add_argument("--stats", action="store_true", help="print figures on standard error")
    p.add_argument("--json", action="store_true", help="one JSON object a prompt on standard output, instead of text")
    p.add_argument("--version", action="version", version=f"mlx_gemma_mtp {__version__}")
    return p


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # whatever the locale says
    try:
        return command(run, parser, argv)
    except BrokenPipeError:  # the reader has gone, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def run(args: argparse.Namespace) -> int:
    if args.media:
        raise UserError(f"{args.media[0]!r}: image and audio input are not supported; this package takes text alone")
    prompts = read_prompts(args)
    blas.preload()
    params = SamplingParams(
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
        json_schema=read_source(args.json_schema),
        regex=args.regex,
        grammar=read_source(args.grammar),
        thinking=args.thinking,
        thinking_budget=args.thinking_budget,
        seed=args.seed,
        stop=tuple(args.stop),
        ignore_eos=args.ignore_eos,
    )
    args.num_draft_tokens = read_depth(args.num_draft_tokens)
    engine = load_engine(args)
    cancel = threading.Event()
    with _ctrl_c(cancel):
        results = generate(engine, prompts, params, args, cancel)
    if args.json:
        print_json(prompts, results)
    if args.model is None and not args.json and not cancel.is_set():
        print_speedup(engine, prompts, params, args, results)
    if args.stats:
        print_stats(results)
        print(f"computed: {engine.description}", file=sys.stderr)
        if engine.advice:
            print(f"note: {engine.advice}", file=sys.stderr)
    return 130 if cancel.is_set() else 0


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of --prompt, standard input and --prompt-file, in this order."""
    prompts = [_decode(sys.stdin.buffer.read(), "standard input") if p == "-" else p for p in args.prompt]
    if args.prompt_file:
        prompts += read_lines(args.prompt_file)
    if not prompts:
        raise UserError("there is no prompt; give --prompt TEXT, --prompt - for standard input, or --prompt-file FILE")
    for prompt in prompts:
        if not prompt.strip():
            raise UserError(f"the prompt {prompt!r} is empty; expected some text")
    return prompts


def read_lines(path: str) -> list[str]:
    """The prompts of a --prompt-file: its lines, without empty ones."""
    try:
        with open(path, "rb") as file:
            lines = _decode(file.read(), path).splitlines()
    except OSError as error:
        raise UserError(f"--prompt-file {path}: {error.strerror}; expected a text file, a prompt a line") from None
    return [line for line in lines if line.strip()]


def read_source(source: str | None) -> str | None:
    """The text of a file where `source` names one, else `source`."""
    if source is None or len(source) > 1000 or not os.path.isfile(source):
        return source
    with open(source, "rb") as file:
        return _decode(file.read(), source)


def read_depth(text: str) -> int | str:
    """A number of drafts, or 'auto'."""
    if text == "auto":
        return text
    if not text.isdecimal():
        raise UserError(f"--num-draft-tokens is {text}, expected auto, 0 (plain decoding) or more")
    return int(text)


def read_bias(text: str) -> tuple[int, float]:
    """'ID=BIAS' of --logit-bias."""
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise UserError(f"--logit-bias is {text!r}, expected ID=BIAS such as 106=-5 or 106=-inf") from None


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 (byte {data[error.start]:#04x} at {error.start}); convert it to UTF-8"
        ) from None


def load_engine(args: argparse.Namespace) -> Engine:
    from .engine import load

    if args.model is None:
        print(BUNDLED, file=sys.stderr)
    return load(
        args.model,
        args.draft_model,
        revision=args.revision,
        num_draft_tokens=args.num_draft_tokens,
        draft_bits=args.draft_bits,
        max_rows=args.max_rows,
        draft_temperature=args.draft_temperature,
        accept=args.accept,
        frozen_costs=args.frozen_costs,
        notice=note,
        progress=Bar("loading"),
    )


def generate(
    engine: Engine, prompts: list[str], params: SamplingParams, args: argparse.Namespace, cancel: threading.Event
) -> list[Result]:
    """Streams a single prompt; prints several whole, in order, each under a header."""
    chunks = engine.stream(
        prompts,
        params,
        system_prompt=args.system_prompt,
        chat_template=not args.ignore_chat_template,
        cancel=cancel,
        progress=Bar("prefill"),
    )
    results: dict[int, Result] = {}
    printed = 0
    for chunk in chunks:
        if len(prompts) == 1 and not args.json:
            print(chunk.text, end="", flush=True)
        if chunk.result is not None:
            results[chunk.index] = chunk.result
        while len(prompts) > 1 and not args.json and printed in results:
            print(f"=== {printed + 1}: {_title(prompts[printed])}\n{results[printed].text}\n", flush=True)
            printed += 1
    if len(prompts) == 1 and not args.json:
        print()
    return [results[index] for index in sorted(results)]


def _title(prompt: str) -> str:
    line = " ".join(prompt.split())
    return line if len(line) <= 70 else f"{line[:69]}\u2026"


def print_json(prompts: list[str], results: list[Result]) -> None:
    for prompt, result in zip(prompts, results, strict=False):
        record = {
            "prompt": prompt,
            "text": result.text,
            "tokens": result.tokens,
            "finish_reason": result.finish_reason,
            "stats": result.stats.as_dict(),
        }
        if result.logprobs is not None:
            record["logprobs"] = [asdict(each) for each in result.logprobs]
        print(json.dumps(record, ensure_ascii=False), flush=True)


def print_speedup(
    engine: Engine, prompts: list[str], params: SamplingParams, args: argparse.Namespace, results: list[Result]
) -> None:
    """What MTP is worth on these prompts, for the bundled model, which is small enough to try it both ways."""
    from . import speedup

    if not any(result.stats.rounds and result.stats.mtp for result in results):
        return
    some, same = prompts[: engine.max_rows], replace(params, seed=results[0].stats.seed)
    options = {"system_prompt": args.system_prompt, "chat_template": not args.ignore_chat_template}
    print(speedup.measure(engine, some, same, **options), file=sys.stderr)


def print_stats(results: list[Result]) -> None:
    """Figures of each prompt, and of the batch, on standard error."""
    for number, result in enumerate(results, 1):
        s = result.stats
        positions = " ".join(f"{share:.2f}" for share in s.acceptance_by_position) or "none"
        mtp = "on" if s.mtp else f"off: {s.mtp_reason}"
        lines = [
            f"prompt {number}: {s.prompt_tokens} tokens, {s.prompt_tps:.1f} tokens/s; first after {s.ttft_s:.3f} s",
            f"  generation: {s.generation_tokens} tokens, {s.generation_tps:.1f} tokens/s; end: {result.finish_reason}",
            f"  MTP {mtp}; {s.rounds} rounds, {s.tokens_per_round:.2f} tokens a round, {s.host_syncs} readbacks",
            f"  drafts: {s.accepted} of {s.drafted} accepted ({s.accept}); by position {positions}; seed {s.seed}",
            f"  rounds by draft length: {depths(s.depths)}",
        ]
        print("\n".join(lines), file=sys.stderr)
    if results:
        s = results[-1].stats
        peak = max(result.stats.peak_memory_gb for result in results)
        batch = f"{s.batch_generation_tps:.1f} tokens/s" + (" in the last batch" if len(results) > 1 else "")
        print(f"all: {batch}; peak memory {peak:.3f} GB; BLAS: {s.blas}", file=sys.stderr)


def depths(counts: dict[int, dict[str, int]]) -> str:
    """'4: 31 best, 2 confidence; 0: 1 limit'."""
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

"""`python -m mlx_gemma_mtp.chat`: a chat in the terminal, or in a pipe a turn a line."""

from __future__ import annotations

import argparse
import sys
import threading

from ._version import __version__
from .cli import slash
from .cli.command import Parser, command, interruptible
from .cli.console import Console
from .cli.entry import Entry, Pipe, entry
from .cli.flags import (
    add_drafts,
    add_limits,
    add_models,
    add_rules,
    add_sampling,
    add_thoughts,
    load_engine,
    read_depth,
    read_params,
    read_timeout,
)
from .cli.session import Session, Settings
from .errors import UserError
from .files.files import cache_folder

MAX_TOKENS = 2048  # of a reply
HISTORY = "chat_history"  # in the cache folder


def parser() -> argparse.ArgumentParser:
    p = Parser(
        "mlx_gemma_mtp.chat",
        description="A chat with Gemma 4 and its MTP drafter. In a pipe each line is a turn, and the replies alone "
        "go to standard output.",
        epilog="Within the chat, /help shows its commands.",
    )
    add_models(p)
    group = p.add_argument_group("the chat")
    group.add_argument("--system-prompt", metavar="TEXT", help="a system turn before all others")
    group.add_argument("--load", metavar="FILE", help="go on with a chat that /save wrote")
    group.add_argument(
        "--history",
        action="store_true",
        help="keep what is typed for the next chat's up-arrow, in the cache folder, for you alone to read",
    )
    add_thoughts(group)
    add_sampling(p, MAX_TOKENS, "reply")
    add_rules(p)
    add_drafts(p)
    add_limits(p.add_argument_group("limits"))
    p.add_argument("--version", action="version", version=f"mlx_gemma_mtp {__version__}")
    p.set_defaults(logprobs=None)
    return p


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0; in a pipe 1 where a turn failed, and 130 after Ctrl-C; 2 for bad flags."""
    return command(run, parser, argv)


def run(args: argparse.Namespace) -> int:
    settings = Settings(read_params(args), read_depth(args.num_draft_tokens), read_timeout(args.timeout))
    args.num_draft_tokens = settings.drafts
    if args.system_prompt is not None and args.load is not None:
        raise UserError("--system-prompt is given with --load, whose chat has its own; drop one of the two")
    read = entry(slash.NAMES, cache_folder() / HISTORY if args.history else None)
    console = Console(args.hide_thinking, read.by_key)
    engine = load_engine(args, "mlx_gemma_mtp.chat", max_rows=1, notice=console.notice)
    with engine:
        session = Session(engine, settings, args.model or "the bundled pair", args.system_prompt)
        if args.load is not None:
            session.load(args.load)
        console.tell_notices()
        return talk(session, read, console)


def talk(session: Session, read: Entry, console: Console) -> int:
    """Reads, obeys and replies until the end; returns the exit code."""
    piped, failed = isinstance(read, Pipe), False
    if not piped:
        console.show("/help shows the commands, Ctrl-C stops a reply, Ctrl-D ends.")
    while True:
        try:
            turn(session, read(), console, piped)
        except (EOFError, slash.Leave):
            return int(piped and failed)
        except KeyboardInterrupt:
            if piped:
                raise
            console.show("Ctrl-D ends.")
        except UserError as error:
            console.error(error)
            failed = True


def turn(session: Session, text: str, console: Console, piped: bool) -> None:
    """Obeys a command, or says something and shows the reply.

    piped: nobody types, so Ctrl-C is meant for the chat. Raises UserError where that fails, Leave where the chat is to
    end, and KeyboardInterrupt where Ctrl-C ended it.
    """
    if not text.strip():
        return
    if slash.is_command(text):
        console.show(slash.obey(session, text))
        return
    cancel = threading.Event()
    try:
        with interruptible(cancel):
            result = console.reply(session, slash.message(text), cancel)
    except UserError as error:
        raise UserError(f"{error} (the turn was left out; /undo takes back more)") from None
    if piped and cancel.is_set():
        raise KeyboardInterrupt
    if result.error is not None:
        raise UserError(result.error)


if __name__ == "__main__":
    sys.exit(main())

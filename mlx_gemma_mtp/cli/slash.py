"""Commands within a chat: a line that begins with a slash."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import UserError, shown
from . import figures
from .flags import read_depth
from .session import Session, read_switch
from .terminal import printable

ESCAPE = "//"  # begins a message that begins with one slash
OFF = "off"


class Leave(Exception):
    """Ends the chat."""


@dataclass(frozen=True)
class Command:
    """A command: its argument as the help names it, what it does in a line, and the function that does it.

    The function takes the session and the argument, which may be empty, and returns lines to show.
    """

    argument: str
    what: str
    run: Callable[[Session, str], str]


def is_command(text: str) -> bool:
    """Returns whether a text is a command and nothing to say to the model."""
    return text.startswith("/") and not text.startswith(ESCAPE)


def message(text: str) -> str:
    """Returns what a text that is no command says to the model: of two slashes in front one goes."""
    return text[1:] if text.startswith(ESCAPE) else text


def obey(session: Session, text: str) -> str:
    """Does what a command says and returns lines to show. Raises UserError, and Leave where the chat is to end."""
    name, *rest = text.split(maxsplit=1)
    command = COMMANDS.get(ALIASES.get(name, name))
    if command is None:
        raise UserError(f"there is no command {shown(name, 40)}; /help shows them, // begins a message with a slash")
    argument = rest[0].strip() if rest else ""
    if argument and not command.argument:
        raise UserError(f"{name} takes no argument, and has {shown(argument)}")
    return command.run(session, argument)


def _help(session: Session, argument: str) -> str:
    forms = {f"{name} {command.argument}".rstrip(): command.what for name, command in COMMANDS.items()}
    width = max(map(len, forms))
    return "\n".join(f"{form:{width}}  {what}" for form, what in forms.items())


def _reset(session: Session, argument: str) -> str:
    session.reset()
    return "a new chat"


def _undo(session: Session, argument: str) -> str:
    session.undo()
    return f"the last turn is taken back; {_turns(session)}"


def _system(session: Session, argument: str) -> str:
    if argument:
        session.instruct(None if argument == OFF else argument)
    prompt = session.system_prompt
    return "there is no system prompt" if prompt is None else f"system prompt: {printable(prompt)}"


def _save(session: Session, argument: str) -> str:
    return f"{_turns(session)} saved in {session.save(argument)}"


def _load(session: Session, argument: str) -> str:
    return f"{session.load(argument)}: {_turns(session)}"


def _stats(session: Session, argument: str) -> str:
    if session.last is None:
        raise UserError("there are no figures yet; they are those of the last reply")
    first, *rest = figures.lines(session.last.stats, session.last.finish_reason)
    peak, blas = session.last.stats.peak_memory_gb, session.last.stats.blas
    return "\n".join([f"prompt: {first}", *rest, f"  peak memory {peak:.3f} GB; BLAS: {blas}"])


def _draft(session: Session, argument: str) -> str:
    if argument:
        session.draft(read_depth(argument, "/draft"))
    drafts = session.settings.drafts
    return "plain decoding" if drafts == 0 or session.engine.drafter is None else f"drafts a round: {drafts}"


def _think(session: Session, argument: str) -> str:
    if argument:
        session.think(read_switch(argument))
    return f"thoughts are {'on' if session.settings.params.thinking else 'off'}"


def _tokens(session: Session, argument: str) -> str:
    if session.last is None:
        raise UserError("nothing is counted yet; a reply's prompt is")
    stats, context = session.last.stats, session.engine.target.config.context
    used = stats.prompt_tokens + stats.generation_tokens
    return f"{figures.tokens(used)} of a context of {context:,} with the last reply; {_turns(session)}"


def _exit(session: Session, argument: str) -> str:
    raise Leave


def _turns(session: Session) -> str:
    return f"{session.turns} turn{'' if session.turns == 1 else 's'}"


COMMANDS = {
    "/help": Command("", "these commands", _help),
    "/undo": Command("", "take the last turn and its reply back", _undo),
    "/reset": Command("", "begin anew; the system prompt stays", _reset),
    "/system": Command("TEXT|off", "set the system prompt; alone: show it", _system),
    "/save": Command("FILE", "write the chat to a file", _save),
    "/load": Command("FILE", "go on with a chat from a file", _load),
    "/draft": Command("N|auto", "draft so many tokens a round; 0: decode plainly", _draft),
    "/think": Command("on|off", "ask for a thought before the reply", _think),
    "/stats": Command("", "figures of the last reply", _stats),
    "/tokens": Command("", "how full the context is", _tokens),
    "/exit": Command("", "end (also Ctrl-D)", _exit),
}
ALIASES = {"/quit": "/exit", "/bye": "/exit", "/?": "/help", "/clear": "/reset"}
NAMES = tuple(COMMANDS)

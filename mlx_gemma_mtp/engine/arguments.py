"""What a caller gives, checked once: the draft length, the settings of each prompt, tools, an event, who is told."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from ..errors import UserError, shown
from ..sampling.params import LARGEST_COUNT, SamplingParams, flag, listed, number, whole
from ..speculative.depth import AUTO
from ..text.messages import are_messages
from ..text.tool_choice import ToolChoice
from ..text.tools import Tools

PRIORITIES = 100
MOST_SAMPLES = 1000  # of a prompt in a call
LONGEST = 1e9  # seconds: more than a machine runs


@runtime_checkable
class Cancel(Protocol):
    """An event that ends a call once it is set: one of threading, multiprocessing or asyncio."""

    def is_set(self) -> bool: ...


def check_depth(drafts: int | str) -> int | str:
    """Returns the draft length that was asked for. Raises UserError for what is none."""
    if isinstance(drafts, str) and drafts == AUTO:
        return AUTO
    expected = f"'{AUTO}', or a whole number from 0 (plain decoding) to {LARGEST_COUNT}"
    return whole("num_draft_tokens", drafts, lambda n: 0 <= n <= LARGEST_COUNT, expected)


def check_priority(priority: int) -> int:
    """Returns the priority as Python's int. Raises UserError for what is none."""
    expected = f"a whole number from {-PRIORITIES} to {PRIORITIES}; the higher goes first"
    return whole("priority", priority, lambda n: -PRIORITIES <= n <= PRIORITIES, expected)


def seconds(name: str, value: float | None) -> float | None:
    """Returns seconds as Python's float, None for no limit. Raises UserError."""
    expected = f"seconds above 0, at most {LONGEST:g}, or None, which is no limit"
    return None if value is None else number(name, value, lambda s: 0 < s <= LONGEST, expected)


def limit_of(name: str, value: int | None) -> int | None:
    """Returns a limit in bytes as Python's int, None for the machine's own. Raises UserError."""
    expected = "bytes, a whole number of 1 or more, or None, which is what the machine has"
    return None if value is None else whole(name, value, lambda n: 1 <= n <= 2**63 - 1, expected)


def prefix_memory_of(value: int | None) -> int | None:
    """Returns the bytes for prefixes as Python's int, None for the engine's choice. Raises UserError."""
    expected = "bytes, a whole number of 0 (keep no prefixes) or more, or None, which is a share of the memory"
    return None if value is None else whole("prefix_memory", value, lambda n: 0 <= n <= 2**63 - 1, expected)


def event(cancel: Any) -> Cancel:
    """Returns the event that ends a call, or one that nobody sets. Raises UserError for what is no event."""
    if cancel is None:
        return threading.Event()
    if isinstance(cancel, type) or not isinstance(cancel, Cancel) or not callable(cancel.is_set):
        raise UserError(f"cancel is {shown(cancel)}, expected an event, such as threading.Event()")
    return cancel


def salt_of(salt: Any) -> str | None:
    """Returns the salt of a call's prefixes. Raises UserError for what is no text."""
    if salt is not None and not isinstance(salt, str):
        raise UserError(f"cache_salt is {shown(salt)}, expected text, or None, which shares prefixes with every call")
    return salt


def settings_of(params: SamplingParams | Sequence[SamplingParams | None] | None, prompts: int) -> list[SamplingParams]:
    """Returns one SamplingParams for each prompt. Raises UserError for other types and another number of them."""
    if params is None or isinstance(params, SamplingParams):
        every = [params or SamplingParams()] * prompts
    else:
        every = listed("params", params, "SamplingParams, or a list of them, one a prompt")
        every = [SamplingParams() if each is None else each for each in every]
    for each in every:
        if not isinstance(each, SamplingParams):
            raise UserError(f"params has {shown(each)}, expected SamplingParams")
    if not prompts or len(every) != prompts:
        raise UserError(
            f"{prompts} prompts with {len(every)} settings; expected a prompt or more, each with its settings"
        )
    return every


def tools_of(tools: Any, choice: Any, several: Any) -> tuple[Tools | None, ToolChoice]:
    """Returns the tools, None where there are none, and what may be called. Raises UserError."""
    found = None if tools is None else tools if isinstance(tools, Tools) else Tools.of(tools)
    found = found if found is not None and found.names else None
    several = flag("parallel_tool_calls", several)
    return found, ToolChoice.of(choice, found.names if found is not None else (), several)


def told_of(tools: Tools | None, prompt: Any) -> list[dict[str, Any]] | None:
    """Returns the tools as the chat template renders them, None for a prompt of ids, which holds what it should."""
    return tools.schemas if tools is not None and (isinstance(prompt, str) or are_messages(prompt)) else None


def told(name: str, listener: Callable[..., None] | None) -> Callable[..., None]:
    """Returns the listener, or one that ignores everything. Raises UserError for what cannot be called."""
    if listener is None:
        return lambda *_: None
    if not callable(listener):
        raise UserError(f"{name} is {shown(listener)}, expected a function")
    return listener

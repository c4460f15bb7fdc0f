"""The one exception that command lines turn into a message instead of a traceback, and how messages name things."""

from typing import Any

LONGEST = 300  # characters of a reason


class UserError(ValueError):
    """Bad input. The message is one line that names the value, what was expected, and the fix."""


def shown(value: Any, most: int = 80) -> str:
    """Returns the repr of a value for a message: one line of at most `most` characters."""
    try:
        text = " ".join(repr(value).split())
    except (ValueError, RecursionError):  # an integer of thousands of digits; an object within thousands of others
        text = f"a huge {type(value).__name__}"
    return clipped(text, most)


def clipped(text: str, most: int = 200) -> str:
    """Returns at most `most` characters of a text for a message; an ellipsis stands for the rest."""
    return text if len(text) <= most else f"{text[: most - 1]}\u2026"


def size(count: int) -> str:
    """Returns a number of bytes for a message, in the unit in which it says something."""
    if count < 1e6:
        return f"{count} bytes"
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"


def in_a_line(error: BaseException) -> str:
    """Returns what an exception says, in one line of at most LONGEST characters.

    The exception's type comes first, unless it is a UserError, which is written for users.
    """
    text = " ".join(str(error).split())
    whole = text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
    return clipped(whole, LONGEST)

"""The one exception that command lines turn into a message instead of a traceback, and how any other is named."""

LONGEST = 300  # characters of a reason


class UserError(ValueError):
    """bad input: one line naming the value, what was expected, the fix"""


def in_a_line(error: Exception) -> str:
    """What an exception says, in one line; its type comes first where it is not written for users."""
    text = " ".join(str(error).split())
    whole = text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
    return whole if len(whole) <= LONGEST else f"{whole[: LONGEST - 1]}\u2026"

"""The one exception that command lines turn into a message instead of a traceback."""


class UserError(ValueError):
    """bad input: one line naming the value, what was expected, the fix"""

"""The systems that are compared, each behind one call.

Only `__main__` imports them: each needs a library of its own, and runs in a process of its own.
"""

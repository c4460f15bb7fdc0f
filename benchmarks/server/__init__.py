"""The server from outside: what HTTP costs, what rude clients do to others, and the servers of other projects.

Everything here speaks HTTP to a server, but for `scripted`, whose engine makes rounds of a given time.
"""

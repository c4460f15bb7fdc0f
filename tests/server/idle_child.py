"""A server without a model, as a child of the supervisor: `python idle_child.py SECONDS INHERITED`.

It answers with its process's id, and ends after so many seconds without requests. SLEEP in a path is how long it takes.
"""

from __future__ import annotations

import asyncio
import os
import sys
from types import SimpleNamespace

from mlx_gemma_mtp.server.drain import Server
from mlx_gemma_mtp.server.supervisor import UNLOADED, Inherited


async def app(scope, receive, send):
    await asyncio.sleep(float(scope["path"].partition("sleep/")[2] or 0))
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(os.getpid()).encode()})


def main(seconds: float, parent: Inherited) -> int:
    parent.follow()
    engine = SimpleNamespace(call=lambda function: None, close=lambda: None)
    server = Server(app, SimpleNamespace(draining=False, engine=engine), 5.0, parent, seconds)
    server.run([parent.socket()])
    return UNLOADED if server.unloaded else 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), Inherited.of(sys.argv[2])))

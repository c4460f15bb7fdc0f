"""How the server is: /health and /ready."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from .._version import __version__
from .answers import Health, Ready, told
from .pulse import Pulse
from .service import Served


def status_routes(served: Served) -> APIRouter:
    """Returns the routes that tell how a server is."""
    router, pulse, began = APIRouter(), Pulse(served.engine), time.monotonic()

    @router.get("/health", responses=told(Health) | {503: {"model": Health, "description": "The engine has ended"}})
    async def health(request: Request) -> JSONResponse:
        """Tells whether the engine computes; to those with a key also what computes, and how it is set."""
        trouble = await pulse.trouble()
        state = "failed" if trouble and not served.draining else "stopping" if served.draining else "ok"
        about = {"status": state, "seconds": round(time.monotonic() - began, 3)}
        if request.state.salt is not None:
            about |= _about(served)
        return JSONResponse(about, 503 if state == "failed" else 200)

    @router.get("/ready", responses=told(Ready) | {503: {"model": Ready, "description": "No requests are taken"}})
    async def ready() -> JSONResponse:
        """Tells whether requests are taken: the kernels are warm, and the server does not stop."""
        good = not served.draining and await pulse.trouble() is None
        return JSONResponse({"ready": good}, 200 if good else 503)

    return router


def _about(served: Served) -> dict[str, Any]:
    return {
        "version": __version__,
        "model": served.name,
        "aliases": list(served.aliases),
        "computed": served.description,
        "context": served.context,
        "mtp": {"on": served.mtp_reason is None, "reason": served.mtp_reason},
        "settings": served.settings,
        "choices": {"now": served.places.taken, "most": served.places.most, "refused": served.places.refused},
    }

"""The app: an engine's routes behind the gate."""

from __future__ import annotations

from fastapi import FastAPI

from .._version import __version__
from .answers import name_keys
from .anthropic import anthropic_routes
from .errors import handle_errors
from .metrics import metrics_routes
from .models import model_routes
from .page import page_routes
from .responses import responses_routes
from .responses_kept import Kept
from .routes import openai_routes
from .security import OPEN, Gate, Rules
from .service import Served
from .status import status_routes


def make_app(served: Served, rules: Rules) -> FastAPI:
    """Returns the ASGI app that serves an engine to those whom the rules let through."""
    app = FastAPI(
        title="mlx_gemma_mtp", version=__version__, docs_url=None, redoc_url=None, separate_input_output_schemas=False
    )
    app.add_middleware(Gate, rules=rules)
    handle_errors(app)
    app.include_router(page_routes())
    app.include_router(status_routes(served))
    app.include_router(metrics_routes(served.metrics))
    responses = responses_routes(served, Kept())
    for routes in (openai_routes(served), responses, anthropic_routes(served), model_routes(served)):
        app.include_router(routes, prefix="/v1")
        app.include_router(routes, include_in_schema=False)
    if rules.keys:
        name_keys(app, OPEN)
    return app

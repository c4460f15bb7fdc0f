"""The model under its names, as OpenAI's clients list models, and as Anthropic's do."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ..errors import shown
from .answers import ListedModel, Model, ModelPage, Models, told
from .errors import Refusal, speaks_anthropic
from .service import Served

PAGE, MOST = 20, 1000  # models in a page of Anthropic's, where nobody says, and at most


def model_routes(served: Served) -> APIRouter:
    """Returns the routes that tell of the model."""
    router = APIRouter()

    @router.get("/models", responses=told(Models | ModelPage))
    async def models(request: Request) -> Response:
        """Lists the model and its other names."""
        if speaks_anthropic(request.url.path, request.headers):
            return JSONResponse(_page([_anthropic(each) for each in served.models()], request.query_params))
        return JSONResponse({"object": "list", "data": served.models()})

    @router.get("/models/{name:path}", responses=told(Model | ListedModel))
    async def model(name: str, request: Request) -> Response:
        """Tells of the model under one of its names."""
        found = served.model(name)
        return JSONResponse(_anthropic(found) if speaks_anthropic(request.url.path, request.headers) else found)

    return router


def _anthropic(model: Mapping[str, Any]) -> dict[str, Any]:
    """A model of OpenAI's list as Anthropic writes it."""
    created = datetime.fromtimestamp(model["created"], UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {"type": "model", "id": model["id"], "display_name": model["id"], "created_at": created}


def _page(models: list[dict[str, Any]], query: Mapping[str, str]) -> dict[str, Any]:
    """The page of a list that a query asks for. Raises Refusal for a limit, or an id, that is none."""
    limit, ids = query.get("limit", str(PAGE)), [model["id"] for model in models]
    if not (limit.isascii() and limit.isdecimal() and 1 <= int(limit[:9]) <= MOST):
        raise Refusal(400, f"limit is {shown(limit)}, expected 1 to {MOST}", param="limit")
    for name in ("after_id", "before_id"):
        if name in query and query[name] not in ids:
            raise Refusal(400, f"{name} is {shown(query[name])}, expected the id of a model that is listed", param=name)
    first = ids.index(query["after_id"]) + 1 if "after_id" in query else 0
    last = ids.index(query["before_id"]) if "before_id" in query else len(ids)
    some, count = models[first:last], int(limit)
    found = some[-count:] if "before_id" in query else some[:count]
    ends = (found[0]["id"], found[-1]["id"]) if found else (None, None)
    return {"data": found, "has_more": len(found) < len(some), "first_id": ends[0], "last_id": ends[1]}

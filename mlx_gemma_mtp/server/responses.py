"""OpenAI's Responses, with and without /v1: made, gone on with, read again and forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ..engine.request import Chunk
from ..errors import clipped
from .answers import told
from .errors import GONE, Refusal
from .responses_input import Functions, items_of, of_responses
from .responses_kept import Kept, Saved
from .responses_output import Output, response_object
from .responses_schema import Deleted, InputItems, ResponsesAnswer, ResponsesRequest
from .routes import begun, streamed
from .run import ClientGone, Run, unless_gone
from .service import Served
from .stream import DONE, event
from .usage import repairs_header

Item = dict[str, Any]


class ResponseStream:
    """The events of a response that is streamed, numbered from 0 on.

    kept: where it goes once it has ended. owner: whose it is.
    """

    def __init__(self, output: Output, model: str, kept: Kept, owner: str):
        self._output, self._model, self._kept, self._owner = output, model, kept, owner
        self._number = 0

    def opening(self) -> bytes:
        """Returns the first events."""
        first = {"response": response_object(self._output, self._model)}
        return self._event("response.created", first) + self._event("response.in_progress", first)

    def of(self, chunk: Chunk) -> bytes:
        """Returns the events of a chunk, which may be none."""
        return b"".join(self._event(kind, fields) for kind, fields in self._output.take(chunk))

    def closing(self) -> bytes:
        """Returns the last event, and the mark after it."""
        whole = finished(self._output, self._model, self._kept, self._owner)
        return self._event(f"response.{whole['status']}", {"response": whole}) + DONE

    def failed(self, refusal: Refusal) -> bytes:
        """Returns the same of a stream that cannot go on. Its code tells clients whether to try again."""
        self._output.break_off()
        final = (refusal.headers or {}).get("x-should-retry") == "false"
        error = {"code": "invalid_prompt" if final else "server_error", "message": refusal.message}
        whole = response_object(self._output, self._model, error=error)
        return self._event("response.failed", {"response": whole}) + DONE

    def _event(self, kind: str, fields: dict[str, Any]) -> bytes:
        numbered = {"type": kind, "sequence_number": self._number} | fields
        self._number += 1
        return event(numbered, kind)


def finished(output: Output, model: str, kept: Kept, owner: str) -> dict[str, Any]:
    """Returns the object of a response that has ended, and keeps it unless its request says not to."""
    whole, body = response_object(output, model, output.run.results[0]), output.body
    if whole["store"]:
        kept.put(owner, whole, items_of(body.input), body.previous_response_id)
    return whole


async def collected(run: Run, output: Output) -> None:
    """Reads a response to its end."""
    await run.begin()
    try:
        async for chunk in run.chunks():
            for _ in output.take(chunk):
                pass
    finally:
        run.close()


def responses_routes(served: Served, kept: Kept) -> APIRouter:
    """Returns the routes of an engine. kept: responses that can be gone on with."""
    router = APIRouter()

    @router.post("/responses", responses=told(ResponsesAnswer, events=True))
    async def respond(body: ResponsesRequest, request: Request) -> Response:
        """Answers a conversation, or goes on with one."""
        model, owner = served.check_model(body.model), request.state.salt
        make = partial(of_responses, before=earlier(kept, owner, body.previous_response_id))
        run = await begun(served, make, body, request, "responses")
        output = Output(run, Functions.of(body.tools), body)
        if body.stream:
            return await streamed(run, ResponseStream(output, model, kept, owner))
        try:
            await unless_gone(collected(run, output), request.receive)
        except ClientGone:
            return Response(status_code=GONE)
        return JSONResponse(finished(output, model, kept, owner), headers=repairs_header([run.results[0]]))

    @router.get("/responses/{id}", responses=told(ResponsesAnswer))
    async def response(id: str, request: Request) -> Response:
        """Tells a response that is kept."""
        return JSONResponse(found(kept, request.state.salt, id).answer)

    @router.get("/responses/{id}/input_items", responses=told(InputItems))
    async def input_items(id: str, request: Request) -> Response:
        """Tells the items that a response's request brought."""
        given = found(kept, request.state.salt, id).given
        items = [{"id": f"in_{id}_{place}", "type": "message"} | item for place, item in enumerate(given)]
        ends = (items[0]["id"], items[-1]["id"]) if items else (None, None)
        return JSONResponse(
            {"object": "list", "data": items, "has_more": False, "first_id": ends[0], "last_id": ends[1]}
        )

    @router.delete("/responses/{id}", responses=told(Deleted))
    async def forget(id: str, request: Request) -> Response:
        """Forgets a response."""
        found(kept, request.state.salt, id)
        kept.drop(request.state.salt, id)
        return JSONResponse({"id": id, "object": "response", "deleted": True})

    return router


def earlier(kept: Kept, owner: str, id: str | None) -> Sequence[Any]:
    """Returns the items of the conversation that a response ended. Raises Refusal where it is not kept."""
    before = [] if id is None else kept.conversation(owner, id)
    if before is None:
        message = (
            f"previous_response_id is {clipped(str(id), 80)!r}, expected a response that is kept here (store: true, "
            "newest ones, until the server ends): send the whole conversation"
        )
        raise Refusal(400, message, param="previous_response_id", code="previous_response_not_found")
    return before


def found(kept: Kept, owner: str, id: str) -> Saved:
    """Returns a response that is kept. Raises Refusal for another."""
    saved = kept.get(owner, id)
    if saved is None:
        raise Refusal(404, f"there is no response {clipped(id, 80)!r} here, or none any more", param="id")
    return saved

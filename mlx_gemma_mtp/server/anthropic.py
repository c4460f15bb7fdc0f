"""Anthropic's routes, with and without /v1."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from .answers import Counted, MessageAnswer, MessageFailure, told
from .messages import MessageStream, message_object
from .routes import answered, asked, begun, streamed
from .schema import CountRequest, MessagesRequest
from .service import Served
from .turns import of_messages, tokens_of


def anthropic_routes(served: Served) -> APIRouter:
    """Returns the routes of an engine."""
    router = APIRouter()

    @router.post("/messages", responses=told(MessageAnswer, MessageFailure, events=True))
    async def messages(body: MessagesRequest, request: Request) -> Response:
        """Answers a conversation."""
        model = served.check_model(body.model)
        run = await begun(served, of_messages, body, request, "messages")
        if body.stream:
            return await streamed(run, MessageStream(run, model))
        return await answered(request, run, lambda results: message_object(run, model, results[0]))

    @router.post("/messages/count_tokens", responses=told(Counted, MessageFailure))
    async def count_tokens(body: CountRequest) -> Response:
        """Counts the tokens of a prompt."""
        served.check_model(body.model)
        return JSONResponse({"input_tokens": await asked(served, tokens_of, body)})

    return router

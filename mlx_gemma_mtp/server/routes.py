"""OpenAI's routes, with and without /v1."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ..engine.request import Chunk, Result
from ..engine.streams import encoders
from ..errors import UserError
from .answers import ChatAnswer, TextAnswer, told
from .ask import Ask, salted
from .chat import ChatStream, chat_object
from .completions import CompletionStream, completion_object
from .errors import GONE, Refusal, of_user_error
from .fields import of_chat, of_completion
from .run import PARAMS, ClientGone, Run, unless_gone
from .schema import Body, ChatRequest, CompletionRequest, Sampling
from .service import Served
from .stream import EventStream
from .usage import repairs_header

B = TypeVar("B", bound=Body)
T = TypeVar("T")


class Events(Protocol):
    """What writes a stream of one kind."""

    def opening(self) -> bytes: ...

    def of(self, chunk: Chunk) -> bytes: ...

    def closing(self) -> bytes: ...

    def failed(self, refusal: Refusal) -> bytes: ...


async def asked(served: Served, make: Callable[[Served, B], T], body: B) -> T:
    """Returns what is made of a body, in one of the threads that encode. Raises Refusal."""
    served.check_open()
    try:
        return await asyncio.get_running_loop().run_in_executor(encoders(), make, served, body)
    except UserError as error:
        raise of_user_error(error, (*PARAMS, *type(body).model_fields)) from None


async def begun(served: Served, make: Callable[[Served, B], Ask], body: B, request: Request, route: str) -> Run:
    """Returns the call of the engine that a body asks for. route: its name in the log. Raises Refusal."""
    ask = salted(await asked(served, make, body), request.state.salt)
    return Run(served, ask, request.state.id, route)


async def answered(request: Request, run: Run, whole: Callable[[list[Result]], dict[str, Any]]) -> Response:
    """Returns the answer in one piece, made unless the client leaves. whole: its JSON object."""
    try:
        results = await unless_gone(run.whole(), request.receive)
    except ClientGone:
        return Response(status_code=GONE)
    return JSONResponse(whole(results), headers=repairs_header(results))


async def streamed(run: Run, events: Events) -> EventStream:
    """Returns the answer as events. Raises Refusal before anything is sent, where the engine does not take it in."""
    await run.begin()
    limits = run.served.limits
    return EventStream(written(run, events), run.close, limits.reading, limits.beat)


async def written(run: Run, events: Events) -> AsyncIterator[bytes]:
    """Yields the body of a stream, in pieces."""
    try:
        if first := events.opening():
            yield first
        async for chunk in run.chunks():
            if piece := events.of(chunk):
                yield piece
        yield events.closing()
    except Refusal as refusal:
        yield events.failed(refusal)


def wants_usage(body: Sampling) -> bool:
    """Returns whether a stream is to end with its usage."""
    return body.stream_options is not None and bool(body.stream_options.include_usage)


def openai_routes(served: Served) -> APIRouter:
    """Returns the routes of an engine."""
    router = APIRouter()

    @router.post("/chat/completions", responses=told(ChatAnswer, events=True))
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answers a conversation."""
        model = served.check_model(body.model)
        run = await begun(served, of_chat, body, request, "chat")
        if body.stream:
            return await streamed(run, ChatStream(run, model, wants_usage(body), bool(body.draft_positions)))
        return await answered(request, run, lambda results: chat_object(run, model, results))

    @router.post("/completions", responses=told(TextAnswer, events=True))
    async def completion(body: CompletionRequest, request: Request) -> Response:
        """Goes on with a text."""
        model = served.check_model(body.model)
        run = await begun(served, of_completion, body, request, "completion")
        if body.stream:
            return await streamed(run, CompletionStream(run, model, wants_usage(body)))
        return await answered(request, run, lambda results: completion_object(run, model, results))

    return router

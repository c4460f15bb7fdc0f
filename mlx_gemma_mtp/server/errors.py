"""Refusals: what a client is told instead of an answer, in OpenAI's shape and in Anthropic's."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ..errors import UserError, clipped, shown

log = logging.getLogger(__name__)
RETRY_AFTER = 2  # seconds
GONE = 499  # of a client that has left; for logs and metrics alone
# By status: OpenAI's type, Anthropic's type.
TYPES = {
    400: ("invalid_request_error", "invalid_request_error"),
    401: ("authentication_error", "authentication_error"),
    403: ("permission_error", "permission_error"),
    404: ("not_found_error", "not_found_error"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("rate_limit_error", "rate_limit_error"),
    500: ("server_error", "api_error"),
    503: ("server_error", "overloaded_error"),
}
# What was expected, by pydantic's name of the error; its own texts are for programmers.
EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a whole number of a sensible size",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "value_error": "text of UTF-8's characters",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "a JSON object",
}


class Refusal(HTTPException):
    """A request that is not answered. It is an HTTPException since FastAPI passes those through alone.

    status: of HTTP. param: the field that is wrong. code: OpenAI's word for the case. retry: whether the same request
    may be answered later; None says nothing. headers: further ones.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry: bool | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        told = dict(headers or {})
        if status == 503:
            told["retry-after"] = str(RETRY_AFTER)
        if retry is not None:
            told["x-should-retry"] = str(retry).lower()
        super().__init__(status, message, told)
        self.message, self.param, self.code = message, param, code

    def body(self, path: str, headers: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Returns what the client reads. path, headers: of the request, which tell whose client it is."""
        known = TYPES.get(self.status_code) or TYPES[500 if self.status_code >= 500 else 400]
        if speaks_anthropic(path, headers):
            return {"type": "error", "error": {"type": known[1], "message": self.message}}
        return {"error": {"message": self.message, "type": known[0], "param": self.param, "code": self.code}}

    def response(self, path: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
        """Returns the whole answer. path, headers: of the request."""
        return JSONResponse(self.body(path, headers), self.status_code, self.headers)


def speaks_anthropic(path: str, headers: Mapping[str, str] | None = None) -> bool:
    """Returns whether a request is of Anthropic's client: by its path, and where OpenAI's has the same path by the
    header that no other sends.
    """
    route = path.removeprefix("/v1")
    return route.startswith("/messages") or (route.startswith("/models") and "anthropic-version" in (headers or ()))


def full() -> Refusal:
    """The refusal where too many requests wait."""
    return Refusal(503, "too many requests wait here already; try again a little later", code="overloaded")


def stopping() -> Refusal:
    """The refusal of a server that ends."""
    return Refusal(503, "the server is stopping; it takes no more requests", code="stopping")


def too_large(what: str, limit: int) -> Refusal:
    """The refusal of what is beyond a limit in bytes."""
    return Refusal(413, f"{what} has more than the {limit} bytes that this server takes; make it smaller")


@contextmanager
def about(param: str) -> Iterator[None]:
    """Has a UserError within the block be a Refusal that names a field."""
    try:
        yield
    except UserError as error:
        raise Refusal(400, str(error), param=param) from None


def of_user_error(error: UserError, names: Sequence[str] = ()) -> Refusal:
    """Returns the refusal that says what a UserError says. names: of fields; the one that it begins with is wrong."""
    message = str(error)
    first = message.removeprefix("the ").split(" ", 1)[0]
    first = {"json_schema": "response_format"}.get(first, first)
    return Refusal(400, message, param=first if first in names else None)


def of_validation(error: RequestValidationError) -> Refusal:
    """Returns the refusal of a body that does not have the shape of its route. It names the first field alone."""
    errors: list[dict[str, Any]] = list(error.errors())
    first = errors[0]
    if first["type"] == "json_invalid":
        return Refusal(400, "the body is no JSON; expected one JSON object")
    param = _param(first)
    same = [each for each in errors if _param(each) == param]  # of the types that the field may have
    expected = " or ".join(dict.fromkeys(map(_expected, same)))
    what = param or "the body"
    if first["type"] == "missing":
        return Refusal(400, f"{what} is missing, expected it to be given", param=param)
    return Refusal(400, f"{what} is {shown(first['input'])}, expected {expected}", param=param)


def _param(found: Mapping[str, Any]) -> str | None:
    """The field that an error is about, without the names that pydantic gives to the types it may have."""
    place = [str(each) for each in found["loc"][1:]]
    return ".".join(each for each in place if "[" not in each and each not in ("str", "int", "float", "bool")) or None


def _expected(found: Mapping[str, Any]) -> str:
    context = found.get("ctx", {})
    return EXPECTED.get(found["type"]) or (
        f"one of {context['expected']}" if "expected" in context else "another value"
    )


def handle_errors(app: FastAPI) -> None:
    """Has an app answer every error as a Refusal. What is no fault of the client is logged, and it is told no more than
    that.
    """

    @app.exception_handler(Refusal)
    async def refuse(request: Request, error: Refusal) -> JSONResponse:
        return error.response(request.url.path, request.headers)

    @app.exception_handler(UserError)
    async def bad_input(request: Request, error: UserError) -> JSONResponse:
        return of_user_error(error).response(request.url.path, request.headers)

    @app.exception_handler(RequestValidationError)
    async def bad_shape(request: Request, error: RequestValidationError) -> JSONResponse:
        return of_validation(error).response(request.url.path, request.headers)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        path = clipped(request.url.path)
        what = {404: f"there is no {path} here", 405: f"{path} does not take {request.method}"}
        message = what.get(error.status_code, "the body cannot be read; expected one JSON object")
        return Refusal(error.status_code, message, headers=error.headers).response(request.url.path, request.headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return unexpected().response(request.url.path, request.headers)  # uvicorn logs the traceback


def unexpected() -> Refusal:
    """The refusal after a fault of the server itself."""
    return Refusal(500, "the server has made a mistake; its log has the reason", code="internal_error", retry=False)

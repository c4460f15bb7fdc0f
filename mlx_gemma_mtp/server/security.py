"""The gate before the app: who may ask, from where, and how much."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import re
import secrets
import socket
from collections.abc import Iterable
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import UserError, shown
from .errors import Refusal, too_large

log = logging.getLogger(__name__)
OPEN = ("/", "/health", "/ready")  # paths that need no key
LOCAL = ("localhost", "127.0.0.1", "::1")
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#*\s]+")


@dataclass(frozen=True)
class Rules:
    """Whom a server answers.

    hosts: names in the Host header that are this server's. addresses: whether every IP address is, too. origins: web
    pages that may ask, beside the server's own. keys: SHA-256 of the API keys; without any, no key is needed. body:
    bytes of a request.
    """

    hosts: frozenset[str]
    addresses: bool
    origins: frozenset[str]
    keys: tuple[bytes, ...]
    body: int

    @classmethod
    def of(
        cls, host: str, keys: Iterable[str], body: int, hosts: Iterable[str] = (), origins: Iterable[str] = ()
    ) -> Rules:
        """Returns the rules of a server that is bound to an address.

        Raises UserError where others could reach it without a key, for an origin that no browser sends, and for a key
        that no header can carry: without one a request has the empty key.
        """
        keys, names = tuple(keys), {*LOCAL, host.lower(), *map(str.lower, hosts)}
        if not all(key and key.isascii() and key.isprintable() and key == key.strip() for key in keys):
            raise UserError(
                "an API key (--api-key) is empty or has characters that no header carries; expected printable ASCII "
                "without spaces at its ends"
            )
        origins = tuple(map(str.lower, origins))
        for each in origins:
            if not ORIGIN.fullmatch(each):
                raise UserError(
                    f"--allowed-origin is {shown(each)}, expected one web page's scheme, host and port, such as "
                    "http://localhost:3000: no path, and no * for all of them"
                )
        local = is_local(host)
        if not local and not keys:
            raise UserError(
                f"--host {host} lets other machines ask without a key; expected --api-key, or the variable "
                "MLX_GEMMA_MTP_API_KEY, or --host 127.0.0.1"
            )
        if not local:
            own = socket.gethostname().lower()
            names |= {own, f"{own}.local"}
        return cls(frozenset(names), not local, frozenset(origins), tuple(map(digest, keys)), body)

    def check_host(self, header: str) -> None:
        """Raises Refusal for a request to another name: a web page that has its own name lead here sends such."""
        name = header.lower()
        name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
        if name not in self.hosts and not (self.addresses and _is_address(name)):
            raise Refusal(403, "the Host header names another server; expected this one's (--allowed-host)")

    def check_origin(self, origin: str | None, host: str) -> bool:
        """Returns whether a web page of another origin asks that may read the answer. Raises Refusal for one that may
        not ask.
        """
        if origin is None or origin.lower() in (f"http://{host.lower()}", f"https://{host.lower()}"):
            return False
        if origin not in self.origins:
            raise Refusal(403, "the request comes from a web page that is not allowed (--allowed-origin)")
        return True

    def check_key(self, headers: Headers) -> str:
        """Returns the salt of whoever asks, '' without keys. Raises Refusal for a key that is missing or wrong."""
        if not self.keys:
            return ""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        found = digest(given)
        good = [key for key in self.keys if hmac.compare_digest(key, found)]
        if not good:
            message = "the API key is missing or wrong; expected it as a Bearer token or as x-api-key"
            raise Refusal(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        return good[0].hex()


def digest(key: str) -> bytes:
    """Returns the SHA-256 of a key: so keys are compared in a time that tells nothing, and kept nowhere."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def is_local(host: str) -> bool:
    """Returns whether only this machine reaches what is bound to `host`."""
    return host.lower() == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Gate:
    """Lets requests through to an app by rules, and gives each an id, which its answer carries."""

    def __init__(self, app: ASGIApp, rules: Rules):
        self.app, self.rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = _Answer(send, secrets.token_hex(12), f"{scope['method']} {scope['path']}")
        scope.setdefault("state", {})["id"] = answer.id
        try:
            response = self._check(scope, Headers(scope=scope), answer)
        except Refusal as refusal:
            response = refusal.response(scope["path"], Headers(scope=scope))
        if response is not None:
            await response(scope, receive, answer)
        else:
            # HEAD is GET without a body, which uvicorn leaves out: clients see by it whether a server is there.
            seen = scope | {"method": "GET"} if scope["method"] == "HEAD" else scope
            await self.app(seen, _Limited(receive, self.rules.body), answer)

    def _check(self, scope: Scope, headers: Headers, answer: _Answer) -> Response | None:
        """Returns the answer to a request that the app need not see. Raises Refusal."""
        host, origin = headers.get("host", ""), headers.get("origin")
        self.rules.check_host(host)
        if self.rules.check_origin(origin, host):
            answer.origin = origin
            if scope["method"] == "OPTIONS":
                return Response(status_code=204, headers=_preflight(headers))
        scope["state"]["salt"] = self._salt(scope["path"], headers)
        if scope["method"] == "POST":
            _check_type(headers.get("content-type", ""))
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self.rules.body:
            raise too_large("the body", self.rules.body)
        return None

    def _salt(self, path: str, headers: Headers) -> str | None:
        """Returns the salt of whoever asks, None for a stranger at a path that is open to all. Raises Refusal."""
        try:
            return self.rules.check_key(headers)
        except Refusal:
            if path in OPEN:
                return None
            raise


def _check_type(given: str) -> None:
    """Raises Refusal for a body that a form of any web page could have sent."""
    if given.partition(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "the content type is not application/json; expected a JSON object under that type")


def _preflight(headers: Headers) -> dict[str, str]:
    asked = headers.get("access-control-request-headers", "")
    return {
        "access-control-allow-methods": "GET, POST",
        "access-control-allow-headers": asked,
        "access-control-max-age": "600",
    }


class _Answer:
    """Sends an answer with the headers that each has, and logs the refusals.

    id: of the request. what: was asked for, in the log. origin: of the web page that may read the answer.
    """

    def __init__(self, send: Send, id: str, what: str):
        self.send, self.id, self.what = send, id, what
        self.origin: str | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=message.setdefault("headers", []))
            headers["x-request-id"] = headers["request-id"] = f"req_{self.id}"
            headers["x-content-type-options"] = "nosniff"
            if self.origin is not None:
                headers["access-control-allow-origin"] = self.origin
                headers.add_vary_header("Origin")
            if message["status"] >= 400:
                log.info("%s: %s: %d", self.id, shown(self.what, 120), message["status"])
        await self.send(message)


class _Limited:
    """Receives a body up to a limit in bytes. Raises Refusal beyond it."""

    def __init__(self, receive: Receive, most: int):
        self.receive, self.most, self.read = receive, most, 0

    async def __call__(self) -> Message:
        message = await self.receive()
        if message["type"] == "http.request":
            self.read += len(message.get("body", b""))
            if self.read > self.most:
                raise too_large("the body", self.most)
        return message

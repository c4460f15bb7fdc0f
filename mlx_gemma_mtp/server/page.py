"""The page at `/`: a chat in the browser. It is one file, which loads nothing and asks this server alone."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import Response

FILE = Path(__file__).with_suffix(".html")


def page_routes() -> APIRouter:
    """Returns the route of the page."""
    router, text = APIRouter(), FILE.read_bytes()
    headers = page_headers(text)

    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        """Shows a chat. It holds nothing that needs a key."""
        return Response(text, media_type="text/html", headers=headers)

    return router


def page_headers(text: bytes) -> dict[str, str]:
    """Returns the headers of a page: what it brings along runs, by its hash, and nothing else."""
    policy = (
        "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'; "
        f"script-src {_hashes(text, b'script')}; style-src {_hashes(text, b'style')}"
    )
    return {
        "content-security-policy": policy,
        "referrer-policy": "no-referrer",
        "x-frame-options": "DENY",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "permissions-policy": "camera=(), geolocation=(), microphone=()",
        "cache-control": "no-cache",
    }


def _hashes(text: bytes, tag: bytes) -> str:
    """The hashes of the elements of a name, as a policy lists them."""
    found = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), text, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(each).digest()).decode()}'" for each in found)

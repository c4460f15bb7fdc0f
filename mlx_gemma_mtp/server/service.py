"""What is served: an engine under its names, with its limits."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from .._version import __version__
from ..errors import UserError, clipped
from ..ops import bandwidth
from .errors import Refusal, stopping
from .limits import Limits, Places
from .logprobs import speller
from .metrics import PREFIX, Metrics

if TYPE_CHECKING:
    from ..engine.engine import Engine
    from ..engine.kv_bytes import KVBytes

REASONING = ("reasoning_content", "reasoning", "both")  # names of the field of thoughts


class Served:
    """An engine as clients see it.

    name: of the model. aliases: other names that it answers to, with the wildcards of fnmatch. thinking: whether
    replies think where a request does not say. reasoning: the field of thoughts, one of REASONING. settings: how the
    server was started, each with its origin. mtp_reason: why there are no drafts, None where there are. metrics_prefix:
    what the names of figures begin with. draining: whether the server ends, so that nothing new begins.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        *,
        aliases: Sequence[str] = (),
        limits: Limits | None = None,
        thinking: bool = False,
        reasoning: str = REASONING[0],
        settings: Mapping[str, Any] | None = None,
        mtp_reason: str | None = None,
        metrics_prefix: str = PREFIX,
    ):
        self.engine, self.name, self.aliases = engine, name, tuple(aliases)
        self.limits = Limits() if limits is None else limits
        self.thinking, self.draining = thinking, False
        self.settings, self.mtp_reason = dict(settings or {}), mtp_reason
        self.reasoning_fields = REASONING[:2] if reasoning == REASONING[2] else (reasoning,)
        self.context = engine.target.config.context
        self.places = Places(engine.max_rows + self.limits.waiting)
        self.metrics = Metrics(self.places, engine.max_rows, metrics_prefix, self.kv_bytes, bandwidth.known())
        self.created = int(time.time())
        self.description = engine.description
        self.spell = speller(engine.text)
        said = (__version__, mx.__version__, name, self.description, str(engine.settings))
        self.fingerprint = "fp_" + hashlib.sha256("\n".join(said).encode()).hexdigest()[:16]

    def check_model(self, name: str | None) -> str:
        """Returns the name that a reply carries: the one that was asked for. Raises Refusal for an unknown one."""
        if not name:
            return self.name
        if name != self.name and not any(fnmatchcase(name, alias) for alias in self.aliases):
            message = f"there is no model {clipped(name, 80)!r} here, expected {self.name!r} or an alias (--alias)"
            raise Refusal(404, message, param="model", code="model_not_found")
        return name

    def kv_bytes(self) -> KVBytes | None:
        """Returns what the engine's K/V take, None once it is closed."""
        try:
            return self.engine.kv_bytes
        except UserError:
            return None

    def check_open(self) -> None:
        """Raises Refusal where nothing new begins."""
        if self.draining:
            raise stopping()

    def models(self) -> list[dict[str, Any]]:
        """Returns the model and its aliases as OpenAI lists models; aliases with wildcards are no names."""
        names = (self.name, *(alias for alias in self.aliases if not any(mark in alias for mark in "*?[")))
        return [self.model(name) for name in names]

    def model(self, name: str) -> dict[str, Any]:
        """Returns the model under one of its names. Raises Refusal for another."""
        id = self.check_model(name)
        more = {"max_model_len": self.context, "context_window": self.context}
        about = {"id": id, "object": "model", "created": self.created, "owned_by": "mlx_gemma_mtp"}
        return about | ({} if id == self.name else {"root": self.name}) | more

    def thoughts(self, text: str) -> Mapping[str, str]:
        """Returns a thought in the fields that carry it."""
        return dict.fromkeys(self.reasoning_fields, text)

"""The intake: what callers give, checked, encoded and made into requests."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import UserError, shown
from ..files.progress import Progress
from ..machine import blas
from ..models.config import GenerationDefaults, TargetConfig
from ..sampling.params import SamplingParams, check_unicode, count, flag
from .arguments import (
    MOST_SAMPLES,
    Cancel,
    check_depth,
    check_priority,
    event,
    salt_of,
    seconds,
    settings_of,
    told,
    told_of,
    tools_of,
)
from .constraints import Calls, Constraints
from .prefix_disk import PrefixDisk
from .request import Request
from .stats import Stats

if TYPE_CHECKING:
    from ..text.encode import Prompt, Text


@dataclass(frozen=True)
class Options:
    """What holds for every prompt of a call, as `Engine.stream` describes it."""

    n: int = 1
    system_prompt: str | None = None
    chat_template: bool = True
    tools: Sequence[Mapping[str, Any]] | None = None
    tool_choice: str | Mapping[str, Any] | None = None
    parallel_tool_calls: bool = True
    allow_special: bool = False
    continue_final_message: bool = False
    num_draft_tokens: int | str | None = None
    timeout: float | None = None
    priority: int = 0
    cancel: Cancel | None = None
    progress: Progress | None = None
    cache_salt: str | None = None
    prediction: str | None = None


class Intake:
    """Makes the requests of an engine, in the threads of its callers.

    figures: what the Stats of every request say. reason: why requests are decoded plainly; None where they are not.
    disk: where prompts may be known from; None where nowhere.
    """

    def __init__(
        self,
        text: Text,
        defaults: GenerationDefaults,
        config: TargetConfig,
        drafts: int | str,
        reason: str | None,
        figures: Mapping[str, Any],
        disk: PrefixDisk | None = None,
    ):
        self.text, self.defaults, self.config = text, defaults, config
        self.drafts, self.reason, self.figures, self.disk = drafts, reason, figures, disk
        self.end_tokens = text.end_token_ids.union(defaults.eos_token_ids, config.eos_token_ids)
        self._constraints = Constraints(text, config.vocab_size, self.end_tokens)
        self._ids = itertools.count()  # of requests, whichever call they come from

    def requests(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams | None] | None,
        options: Options,
    ) -> list[Request]:
        """Returns n requests for each prompt, those of a prompt one after another. Their time runs from now on. Raises
        UserError.
        """
        began = time.monotonic()
        n = count("n", options.n, MOST_SAMPLES)
        every = settings_of(params, len(prompts))
        drafts = self.drafts if options.num_draft_tokens is None else check_depth(options.num_draft_tokens)
        flag("chat_template", options.chat_template)
        tools, choice = tools_of(options.tools, options.tool_choice, options.parallel_tool_calls)
        event(options.cancel)
        told("progress", options.progress)
        patience = seconds("timeout", options.timeout)
        common = {
            "drafts": drafts,
            "priority": check_priority(options.priority),
            "deadline": None if patience is None else began + patience,
            "salt": salt_of(options.cache_salt),
            "prediction": self._prediction(options.prediction),
        }
        encode = partial(
            self.text.encode,
            system_prompt=options.system_prompt,
            chat_template=options.chat_template,
            allow_special=options.allow_special,
            continue_final_message=options.continue_final_message,
        )
        encoded = [
            encode(prompt, thinking=settings.thinking, tools=told_of(tools, prompt))
            for prompt, settings in zip(prompts, every, strict=True)
        ]
        calls = self._constraints.calls(tools, choice, any(settings.grammars for settings in every))
        made: list[Request] = []
        for ids, settings in zip(encoded, every, strict=True):
            own = common | self._beginning(ids, common["salt"])
            for params in settings.samples(n):
                made.append(self._request(len(made), ids, params, calls, own))
        return made

    def _prediction(self, text: Any) -> tuple[int, ...]:
        """Returns the tokens of a prediction. Raises UserError for what is no text."""
        if text is None:
            return ()
        if not isinstance(text, str):
            raise UserError(f"prediction is {shown(text)}, expected text, or None where there is none")
        check_unicode("the prediction", text)
        return tuple(token for token in self.text.spelled(text) if token < self.config.vocab_size)

    def _beginning(self, prompt: list[int], salt: str | None) -> dict[str, Any]:
        """Returns where turns begin in a prompt, and what is known of it from disk. Raises UserError for one that is
        too long.
        """
        context = self.config.context
        if len(prompt) >= context:
            raise UserError(
                f"the prompt has {len(prompt)} tokens, expected fewer than the context of {context}; shorten it"
            )
        restored = None if self.disk is None else self.disk.read(prompt, salt)
        return {"borders": self.text.borders(prompt), "restored": restored}

    def _request(
        self, index: int, prompt: list[int], params: SamplingParams, calls: Calls, common: dict[str, Any]
    ) -> Request:
        vocabulary = self.config.vocab_size
        params = params.resolved(self.defaults)
        for token in params.logit_bias:
            if token >= vocabulary:
                raise UserError(f"logit_bias has token id {token}, expected 0 to {vocabulary - 1}")
        reason = self.reason or (None if common["drafts"] else "the draft length is 0")
        in_thought = self.text.opens_thought(prompt)
        return Request(
            next(self._ids),
            index,
            prompt,
            params,
            self.text.stream(params.stop, calls.read, in_thought),
            frozenset() if params.ignore_eos else self.end_tokens,
            min(params.max_tokens, self.config.context - len(prompt)),
            Stats(
                len(prompt), mtp=reason is None, mtp_reason=reason, blas=blas.name(), seed=params.seed, **self.figures
            ),
            self._constraints.of(params, calls, in_thought),
            **common,
        )

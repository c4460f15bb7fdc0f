"""transformers on torch's CPU, plain or with its assisted generation, one row, on the Hugging Face folders.

Two faults of 5.23 keep a target whose layers all own their K/V from handing them to its drafter; training/gemma.py
corrects them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.candidate_generator import SinglePositionMultiTokenCandidateGenerator as Generator
from transformers.generation.streamers import BaseStreamer

from benchmarks.systems.call import TOP_K, TOP_P, Clock, Request, System, Timing, plain
from training.gemma import prepare_transformers


class Transformers(System):
    def __init__(self, target: str, drafter: str) -> None:
        prepare_transformers()
        options = {"dtype": torch.float32, "attn_implementation": "eager"}
        self.model = AutoModelForCausalLM.from_pretrained(target, **options, experts_implementation="grouped_mm").eval()
        self.drafter = AutoModelForCausalLM.from_pretrained(drafter, **options).eval() if drafter else None

    def about(self) -> dict[str, Any]:
        return {"device": "torch, cpu", "threads": torch.get_num_threads()}

    def call(self, request: Request) -> Timing:
        (prompt,) = request.prompts
        torch.manual_seed(request.seed)
        clock, ids, noted = Clock(1), torch.tensor([prompt]), []
        options = {"attention_mask": torch.ones_like(ids), "generation_config": self._config(request)}
        if request.drafts:
            rounds = {"num_assistant_tokens": request.drafts, "num_assistant_tokens_schedule": "constant"}
            self.drafter.generation_config.update(**rounds)
            options["assistant_model"] = self.drafter
        with torch.no_grad(), _rounds_noted(noted):
            out = self.model.generate(ids, streamer=_FirstToken(clock), **options)
        timing = clock.timing([out[0, len(prompt) :].tolist()], out.shape[1] - len(prompt) - 1)
        if not request.drafts:
            return plain(timing)
        timing.passes = len(noted) - 1  # the first is the prefill's, with drafts of its own
        for drafted, accepted in noted[1:]:
            timing.count(drafted, accepted)
        return timing

    def _config(self, request: Request) -> GenerationConfig:
        sampling = {"temperature": request.temperature, "top_k": TOP_K, "top_p": TOP_P} if request.temperature else {}
        return GenerationConfig(
            max_new_tokens=request.max_tokens,
            do_sample=bool(request.temperature),
            eos_token_id=self.model.generation_config.eos_token_id,
            pad_token_id=0,
            **sampling,
        )


class _FirstToken(BaseStreamer):
    """Told the prompt, then the tokens as they come."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.prompt_seen = clock, False

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_seen:
            self.clock.saw(0)
        self.prompt_seen = True

    def end(self) -> None:
        """Nothing is kept back."""


@contextmanager
def _rounds_noted(noted: list[tuple[int, int]]) -> Iterator[None]:
    """Notes the (drafted, accepted) of each of transformers' rounds."""
    stock = Generator.update_candidate_strategy

    def note(self: Generator, input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int) -> None:
        noted.append((scores.shape[1] - 1, int(num_matches)))
        stock(self, input_ids, scores, num_matches)

    with mock.patch.object(Generator, "update_candidate_strategy", note):
        yield

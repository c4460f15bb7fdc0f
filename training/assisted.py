"""transformers' own assisted generation with a drafter, its rounds counted. transformers 5.23.0."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import torch
from transformers import GenerationConfig
from transformers.generation.candidate_generator import SinglePositionMultiTokenCandidateGenerator as Generator

from training.drafter import ROUND
from training.gemma import FULL
from training.tokenizer import PAD


class Acceptance(NamedTuple):
    """How many drafts were kept in each round of a number of replies."""

    rounds: int
    tokens: int
    by_position: list[float]  # the share of rounds that kept at least k + 1 drafts
    tokens_a_round: float
    same_as_greedy: int | None = None  # replies equal to plain decoding

    @classmethod
    def of(cls, accepted: Sequence[int], tokens: int, same: int | None = None) -> Acceptance:
        rounds = max(1, len(accepted))
        shares = [sum(count > k for count in accepted) / rounds for k in range(ROUND)]
        return cls(len(accepted), tokens, shares, 1 + sum(accepted) / rounds, same)


@contextmanager
def _rounds(accepted: list[int]) -> Iterator[None]:
    """Note the accepted drafts of each call, and drop the keys and values of rejected ones.

    Stock cuts to len(input_ids), one too many as the newest token has no K/V yet; past the window, where the sliding
    K/V is shorter than the text, it cuts nothing.
    """
    stock = Generator.get_candidates

    def get_candidates(self, input_ids, model_kwargs, model_outputs, is_first_iteration, n_last_matches, **kwargs):
        if not is_first_iteration:
            shared = model_outputs.shared_kv_states
            rejected = shared[FULL][0].shape[2] - (input_ids.shape[1] - 1)
            model_outputs.shared_kv_states = {
                kind: (k[:, :, : k.shape[2] - rejected], v[:, :, : v.shape[2] - rejected])
                for kind, (k, v) in shared.items()
            }
        return stock(self, input_ids, model_kwargs, model_outputs, is_first_iteration, n_last_matches, **kwargs)

    def note(self, input_ids, scores, num_matches):
        accepted.append(int(num_matches))

    with (
        mock.patch.object(Generator, "get_candidates", get_candidates),
        mock.patch.object(Generator, "update_candidate_strategy", note),
    ):
        yield


@torch.no_grad()
def measure(target, drafter, prompts: Sequence[Sequence[int]], new_tokens: int) -> Acceptance:
    """Greedy replies to prompts (token ids) with ROUND drafts a round; the prefill is no round."""
    drafter.generation_config.update(num_assistant_tokens=ROUND, num_assistant_tokens_schedule="constant")
    stop = target.config.eos_token_id
    config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=stop, pad_token_id=PAD)
    accepted: list[int] = []
    tokens = same = 0
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        options = {"attention_mask": torch.ones_like(ids), "generation_config": config}
        noted: list[int] = []
        with _rounds(noted):
            reply = target.generate(ids, assistant_model=drafter, **options)
        accepted += noted[1:]
        tokens += reply.shape[1] - ids.shape[1]
        same += torch.equal(reply, target.generate(ids, **options))
    return Acceptance.of(accepted, tokens, same)

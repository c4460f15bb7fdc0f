"""mlx-vlm, plain or with its Gemma 4 MTP, one row or a ragged batch.

Its block is the newest token and the drafts; a block above the drafter's own (4) is a ceiling.
"""

from __future__ import annotations

import time

import mlx.core as mx
from mlx_lm.sample_utils import make_sampler
from mlx_vlm import load
from mlx_vlm.generate import BatchGenerator, stream_generate
from mlx_vlm.speculative.drafters import load_drafter
from mlx_vlm.speculative.utils import speculative_stats_since, speculative_stats_snapshot

from benchmarks.systems.call import TOP_K, TOP_P, Backlog, Clock, MlxSystem, Request, Served, Timing, plain


class MlxVlm(MlxSystem):
    def __init__(self, target: str, drafter: str) -> None:
        self.model, self.processor = load(target)
        self.drafter, self.kind = load_drafter(drafter) if drafter else (None, None)

    def measured(self, request: Request) -> Timing:
        run = self._one if len(request.prompts) == 1 else self._many
        if not request.drafts:
            return plain(run(request, {}))
        drafting = self._drafting(request.drafts)
        before = speculative_stats_snapshot(self.drafter)
        timing = run(request, drafting)
        # A round is counted once for the whole batch, with the mean of its rows' accepted drafts.
        rounds, accepted, drafted = speculative_stats_since(self.drafter, before)
        timing.passes = timing.rounds = rounds or 0
        timing.accepted, timing.drafted = accepted or 0, drafted or 0
        return timing

    def _drafting(self, drafts: int) -> dict:
        return {"draft_model": self.drafter, "draft_kind": self.kind, "draft_block_size": drafts + 1} if drafts else {}

    def _one(self, request: Request, drafting: dict) -> Timing:
        clock, tokens = Clock(1), []
        ids = mx.array(request.prompts)
        sampling = {"temperature": request.temperature}
        if request.temperature:
            sampling |= {"top_p": TOP_P, "top_k": TOP_K}
        for response in stream_generate(
            self.model, self.processor, "", input_ids=ids, max_tokens=request.max_tokens, **sampling, **drafting
        ):
            clock.saw(0)
            if response.token_ids is not None:  # only the last response has them
                tokens = list(response.token_ids)
        return clock.timing([tokens], max(0, len(tokens) - 1))

    def _many(self, request: Request, drafting: dict) -> Timing:
        """The steps of mlx_vlm's batch_generate, with token ids in and out."""
        rows = len(request.prompts)
        clock = Clock(rows)
        if request.temperature:
            drafting = drafting | {"sampler": make_sampler(request.temperature, top_p=TOP_P, top_k=TOP_K)}
        generator = self._generator(rows, rows, drafting)
        uids = self._insert(generator, request.prompts, [request.max_tokens] * rows)
        tokens: dict[int, list[int]] = {uid: [] for uid in uids}
        while generator.has_work:
            for response in generator.next()[1]:
                if response.token is not None:
                    clock.saw(uids.index(response.uid))
                    tokens[response.uid].append(response.token)
        generator.close()
        made = [tokens[uid] for uid in uids]
        return clock.timing(made, max(len(row) for row in made) - 1)

    def _generator(self, rows: int, joining: int, options: dict) -> BatchGenerator:
        """joining: rows that must be free before the next prompts are taken in."""
        return BatchGenerator(
            self.model.language_model,
            self.processor,
            prefill_batch_size=joining,
            completion_batch_size=rows,
            compute_logprobs=False,
            **options,
        )

    def _insert(self, generator: BatchGenerator, prompts: list[list[int]], limits: list[int]) -> list[int]:
        kwargs = []
        for prompt in prompts:
            embedded = self.model.get_input_embeddings(mx.array([prompt]), None).to_dict()
            kwargs.append({key: value for key, value in embedded.items() if value is not None})
        return generator.insert(prompts, limits, prompt_kwargs=kwargs)

    def serve(self, backlog: Backlog) -> Served:
        """Its continuous batching: all requests are inserted at once, and it takes them in as rows become free. A batch
        with drafts takes nothing in before all of its rows have ended.
        """
        criteria = self.processor.tokenizer.stopping_criteria
        ends, criteria.eos_token_ids = criteria.eos_token_ids, []
        began, tokens, first = time.perf_counter(), {}, {}
        try:
            generator = self._generator(backlog.rows, backlog.joining, self._drafting(backlog.drafts))
            uids = self._insert(generator, backlog.prompts, backlog.limits)
            while generator.has_work:
                for response in generator.next()[1]:
                    if response.token is not None:
                        first.setdefault(response.uid, time.perf_counter() - began)
                        tokens.setdefault(response.uid, []).append(response.token)
            generator.close()
        finally:
            criteria.eos_token_ids = ends
        seconds = time.perf_counter() - began
        return Served([tokens[uid] for uid in uids], seconds, [first[uid] for uid in uids])

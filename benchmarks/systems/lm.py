"""mlx-lm, plain, one row or a batch."""

from __future__ import annotations

from mlx_lm import load, stream_generate
from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import make_sampler

from benchmarks.systems.call import TOP_K, TOP_P, Clock, MlxSystem, Request, Timing, plain


class MlxLm(MlxSystem):
    def __init__(self, target: str, drafter: str) -> None:
        self.model, self.tokenizer = load(target)

    def measured(self, request: Request) -> Timing:
        options = {}
        if request.temperature:
            options["sampler"] = make_sampler(request.temperature, top_p=TOP_P, top_k=TOP_K)
        run = self._one if len(request.prompts) == 1 else self._many
        return plain(run(request, options))

    def _one(self, request: Request, options: dict) -> Timing:
        clock, tokens = Clock(1), []
        (prompt,) = request.prompts
        for response in stream_generate(self.model, self.tokenizer, prompt, max_tokens=request.max_tokens, **options):
            clock.saw(0)
            # A last response may repeat a token only to carry the reason; its count does not.
            if response.generation_tokens > len(tokens):
                tokens.append(response.token)
        return clock.timing([tokens], max(0, len(tokens) - 1))

    def _many(self, request: Request, options: dict) -> Timing:
        """The steps of mlx_lm.batch_generate, with the times of the first tokens."""
        clock = Clock(len(request.prompts))
        stop = [[token] for token in self.tokenizer.eos_token_ids]
        generator = BatchGenerator(self.model, stop_tokens=stop, **options)
        uids = generator.insert(request.prompts, [request.max_tokens] * len(request.prompts))
        tokens: dict[int, list[int]] = {uid: [] for uid in uids}
        passes = -1  # the first answers are the prefill's
        while responses := generator.next_generated():
            passes += 1
            for response in responses:
                clock.saw(uids.index(response.uid))
                tokens[response.uid].append(response.token)
        generator.close()
        return clock.timing([tokens[uid] for uid in uids], passes)

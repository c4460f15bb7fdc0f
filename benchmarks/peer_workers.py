"""A system under measurement in a process of its own.

`Worker` is the end that asks. The other end, `python -m benchmarks.peer_workers SYSTEM TARGET
DRAFTER`, loads and says what it is on one line of JSON; then each line on stdin is one greedy call,
{"prompts": [[id, ...], ...], "drafts": K, "max_tokens": n}, answered by one line, a `Timing`. What
a library prints goes to stderr. A call has ended when its time is read: its ids are on the host.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).parent.parent
OPENBLAS = "libopenblas.so.0"
Prompts = list[list[int]]


@dataclass
class Timing:
    """What a call took. accepted / rounds: drafts kept a round and row, both zero when plain."""

    tokens: list[list[int]]  # generated ids a prompt
    seconds: float  # the whole call, prefill included
    prefill_seconds: float  # until every row had its first token
    rounds: int = 0
    accepted: int = 0


class WorkerFailed(Exception):
    """A system could not be loaded or stopped answering."""


class Worker:
    """A running `benchmarks.peer_workers` and the pipe to it."""

    def __init__(self, system: str, folders: tuple[Path, Path], blas: str, log: Path) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
        environment |= {"HF_HUB_OFFLINE": "1", "OPENBLAS_NUM_THREADS": "1"}
        if blas == "openblas":
            environment["LD_PRELOAD"] = OPENBLAS
        command = [sys.executable, "-m", "benchmarks.peer_workers", system, *map(str, folders)]
        self.system, self.log = system, log
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"),
        )  # fmt: skip
        try:
            self.about = self._read()
        except WorkerFailed:
            self.close()
            raise

    def _read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            last = self.log.read_text().strip().splitlines()[-1:] or ["no message"]
            raise WorkerFailed(f"{self.system}: {last[0]}")
        return json.loads(line)

    def ask(self, **request: Any) -> dict[str, Any]:
        with suppress(BrokenPipeError):  # a worker that died says why in its log; `_read` reports it
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


class System(Protocol):
    def call(self, prompts: Prompts, drafts: int, max_tokens: int) -> Timing: ...


class MlxLm:
    """mlx-lm, plain, one row."""

    def __init__(self, target: str, drafter: str) -> None:
        from mlx_lm import load, stream_generate

        self.stream_generate = stream_generate
        self.model, self.tokenizer = load(target)

    def call(self, prompts: Prompts, drafts: int, max_tokens: int) -> Timing:
        (prompt,) = prompts
        start, first, tokens = time.perf_counter(), 0.0, []
        for response in self.stream_generate(self.model, self.tokenizer, prompt, max_tokens=max_tokens):
            first = first or time.perf_counter()
            # A last response may repeat a token only to carry the reason; its count does not.
            if response.generation_tokens > len(tokens):
                tokens.append(response.token)
        return Timing([tokens], time.perf_counter() - start, first - start)


class MlxVlm:
    """mlx-vlm, plain or with its Gemma 4 MTP, one row or a ragged batch.

    Its block is the newest token and the drafts; a block above the drafter's own (4) is a ceiling.
    """

    def __init__(self, target: str, drafter: str) -> None:
        import mlx.core as mx
        from mlx_vlm import load
        from mlx_vlm.generate import BatchGenerator, stream_generate
        from mlx_vlm.speculative.drafters import load_drafter
        from mlx_vlm.speculative.utils import speculative_stats_since, speculative_stats_snapshot

        self.array, self.stream_generate, self.batch_generator = (
            mx.array,
            stream_generate,
            BatchGenerator,
        )
        self.snapshot, self.since = speculative_stats_snapshot, speculative_stats_since
        self.model, self.processor = load(target)
        self.drafter, self.kind = load_drafter(drafter)

    def call(self, prompts: Prompts, drafts: int, max_tokens: int) -> Timing:
        options = {}
        if drafts:
            options = {
                "draft_model": self.drafter,
                "draft_kind": self.kind,
                "draft_block_size": drafts + 1,
            }
        before = self.snapshot(self.drafter)
        timing = (self.one if len(prompts) == 1 else self.many)(prompts, max_tokens, options)
        rounds, accepted, _ = self.since(self.drafter, before)
        # A round is counted once for the whole batch, with the mean of its rows' accepted drafts.
        timing.rounds, timing.accepted = rounds or 0, accepted or 0
        return timing

    def one(self, prompts: Prompts, max_tokens: int, options: dict) -> Timing:
        start, first, tokens = time.perf_counter(), 0.0, []
        ids = self.array(prompts)
        for response in self.stream_generate(
            self.model,
            self.processor,
            "",
            input_ids=ids,
            max_tokens=max_tokens,
            temperature=0.0,
            **options,
        ):
            first = first or time.perf_counter()
            if response.token_ids is not None:  # only the last response has them
                tokens = response.token_ids
        return Timing([tokens], time.perf_counter() - start, first - start)

    def many(self, prompts: Prompts, max_tokens: int, options: dict) -> Timing:
        """The steps of mlx_vlm's batch_generate, with token ids in and out."""
        start, first = time.perf_counter(), 0.0
        rows = len(prompts)
        generator = self.batch_generator(
            self.model.language_model,
            self.processor,
            prefill_batch_size=rows,
            completion_batch_size=rows,
            compute_logprobs=False,
            **options,
        )
        kwargs = []
        for prompt in prompts:
            embedded = self.model.get_input_embeddings(self.array([prompt]), None).to_dict()
            kwargs.append({key: value for key, value in embedded.items() if value is not None})
        uids = generator.insert(prompts, max_tokens, prompt_kwargs=kwargs)
        tokens: dict[int, list[int]] = {uid: [] for uid in uids}
        while generator.has_work:
            for response in generator.next()[1]:
                first = first or time.perf_counter()
                if response.token is not None:
                    tokens[response.uid].append(response.token)
        generator.close()
        return Timing([tokens[uid] for uid in uids], time.perf_counter() - start, first - start)


class Ours:
    """mlx_gemma_mtp through its Python interface."""

    def __init__(self, target: str, drafter: str) -> None:
        from mlx_gemma_mtp import SamplingParams, load

        self.params = SamplingParams
        self.engine = load(model=target, draft_model=drafter)

    def call(self, prompts: Prompts, drafts: int, max_tokens: int) -> Timing:
        params = self.params(max_tokens=max_tokens, temperature=0.0)
        start = time.perf_counter()
        results = self.engine.generate(prompts, params, num_draft_tokens=drafts)
        seconds = time.perf_counter() - start
        prefill = max(result.stats.ttft_s for result in results)
        timing = Timing([list(result.tokens) for result in results], seconds, prefill)
        if drafts:
            timing.rounds = sum(result.stats.rounds for result in results)
            timing.accepted = sum(result.stats.accepted for result in results)
        return timing


SYSTEMS: dict[str, type[System]] = {"mlx-lm": MlxLm, "mlx-vlm": MlxVlm, "mlx_gemma_mtp": Ours}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="One system of benchmarks.peers; started by it.")
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("target", help="MLX folder of the target, float32")
    parser.add_argument("drafter", help="folder of the drafter, float32")
    args = parser.parse_args(argv)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not end up between the replies

    import mlx.core as mx

    from mlx_gemma_mtp import blas

    system = SYSTEMS[args.system](args.target, args.drafter)
    about = {"device": str(mx.default_device()), "blas_library": blas.name()}
    print(json.dumps(about), file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(asdict(system.call(**json.loads(line)))), file=replies, flush=True)


if __name__ == "__main__":
    main()

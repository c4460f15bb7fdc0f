"""Generates in a process of its own: `python -m tests.engine.restarts JSON`, the tokens and figures as JSON on
standard output. Prompts are ids, and each is {"tokens", "salt", "temperature"}.
"""

import json
import sys

from mlx_gemma_mtp import SamplingParams, load


def main(asked: dict) -> dict:
    told: list[str] = []
    texts, cached = [], []
    options = {"dtype": asked["dtype"], "prefix_cache": asked["folder"], "prefill_chunk": 64, "notice": told.append}
    with load(asked["model"], **options) as engine:
        for prompt in asked["prompts"]:
            greedy = SamplingParams(temperature=prompt["temperature"], seed=5, max_tokens=12, ignore_eos=True)
            result = engine.generate(prompt["tokens"], greedy, num_draft_tokens=3, cache_salt=prompt["salt"])
            texts.append(result.tokens)
            cached.append(result.stats.cached_tokens)
    return {"texts": texts, "cached": cached, "told": [line for line in told if "prefix" in line]}


if __name__ == "__main__":
    json.dump(main(json.loads(sys.argv[1])), sys.stdout)

"""How many drafts are kept when text is sampled: `python -m benchmarks.acceptance [--model FOLDER] [--json FILE]`.

Every round drafts K tokens along the text that the target itself samples, and records p (the target's distribution at
each draft position, after temperature and filters) and q (the drafter's). On these same rounds it counts

  greedy     drafts are the drafter's likeliest tokens, the target's are sampled (most systems)
  coupled    both are sampled with the same noise: what this package does (arXiv 2408.07978)
  rejection  expected drafts kept by rejection sampling with residual (arXiv 2211.17192)
  block      expected drafts kept by block verification (arXiv 2403.10444)

and the limit of any rule for the first draft, sum min(p, q). With `--live N` the engine then writes N tokens a prompt
by each rule that it has, coupled and rejection (which is block verification), and counts its own tokens a round. Counts
only: nothing here depends on the machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlx_gemma_mtp import SamplingParams, UserError, load
from mlx_gemma_mtp.engine.engine import Engine
from mlx_gemma_mtp.sampling.distribution import Rules, soft_cap
from mlx_gemma_mtp.sampling.noise import gumbel
from mlx_gemma_mtp.sampling.params import ACCEPT
from mlx_gemma_mtp.speculative.drafting import Drafting
from mlx_gemma_mtp.speculative.prefill import batch

PROMPTS = Path(__file__).parent.parent / "tests" / "data" / "prompts.json"


@dataclass
class Counts:
    """Drafts kept, summed over rounds."""

    rounds: int = 0
    first: dict[str, float] = field(default_factory=lambda: dict.fromkeys(RULES, 0.0))
    kept: dict[str, float] = field(default_factory=lambda: dict.fromkeys(RULES, 0.0))
    limit: float = 0.0

    def row(self) -> dict[str, float]:
        """Means: first-draft acceptance and tokens a round (drafts kept and the bonus token) of each rule."""
        means = {f"first_{rule}": self.first[rule] / self.rounds for rule in RULES}
        means |= {f"tokens_{rule}": 1 + self.kept[rule] / self.rounds for rule in RULES}
        return means | {"first_limit": self.limit / self.rounds, "rounds": self.rounds}


RULES = ("greedy", "coupled", "rejection", "block")


def probabilities(logits: np.ndarray, params: SamplingParams, factor: float = 1.0) -> np.ndarray:
    """[V] logits -> the distribution after temperature (times factor), top-k, top-p and min-p."""
    scaled = logits.astype(np.float64) / (params.temperature * factor)
    order = np.argsort(-scaled, kind="stable")
    weights = np.exp(scaled - scaled.max())
    kept = order[: params.top_k] if params.top_k > 0 else order
    shares = weights[kept] / weights[kept].sum()
    kept = kept[(np.cumsum(shares) - shares < params.top_p) & (shares >= (params.min_p or 0.0) * shares[0])]
    p = np.zeros_like(weights)
    p[kept] = weights[kept] / weights[kept].sum()
    return p


class Walk:
    """One prompt's text, sampled by the target alone; `drafts` looks ahead from where it stands, changing nothing."""

    def __init__(self, engine: Engine, prompt: str, params: SamplingParams, steps: int):
        self.target, self.drafter, self.steps = engine.target, engine.drafter, steps
        self.params, self.key = params, Rules.of([params], engine.target.config.vocab_size).keys
        tokens = engine.text.encode(prompt)
        self.cache, self.hidden = batch(self.target, [tokens], chunk=64, block=steps + 1)
        self.position = len(tokens)
        self.token = self.drawn(self.target_p(self.hidden[:, None])[0], self.position)

    def noise(self, position: int) -> np.ndarray:
        ids = mx.arange(self.target.config.vocab_size)[None, None]
        return np.array(gumbel(self.key, mx.array([[position]]), ids))[0, 0]

    def drawn(self, p: np.ndarray, position: int) -> int:
        with np.errstate(divide="ignore"):
            return int(np.argmax(np.log(p) + self.noise(position)))

    def target_p(self, hidden: mx.array) -> list[np.ndarray]:
        logits = soft_cap(self.target.logits(hidden), self.target.config.softcap)
        return [probabilities(row, self.params) for row in np.array(logits)[0]]

    def drafts(self, factor: float, greedy: bool) -> tuple[list[int], list[np.ndarray]]:
        """The drafts after the newest token, and q at each: sampled with the text's noise, or the likeliest."""
        span = self.cache.span(0)
        rotations = self.drafter.ropes.tables(span.positions)
        token, hidden, tokens, qs = self.token, self.hidden, [], []
        for i in range(self.steps):
            y, hidden = self.drafter(self.target.embed(mx.array([token])), hidden, span, rotations)
            scores, ids = self.drafter.scores(y)
            logits = np.full(self.target.config.vocab_size, -np.inf)
            logits[slice(None) if ids is None else np.array(ids)[0]] = np.array(scores)[0]
            q = probabilities(logits, self.params, factor)
            token = int(np.argmax(q)) if greedy else self.drawn(q, self.position + 1 + i)
            tokens.append(token)
            qs.append(q)
        return tokens, qs

    def verify(self, drafts: list[int]) -> list[np.ndarray]:
        """p at each draft's position and after the last; commits nothing."""
        tokens = mx.array([[self.token, *drafts]])
        self._verified = self.target(tokens, self.cache.span(tokens.shape[1]))
        return self.target_p(self._verified)

    def advance(self, drafts: list[int], ps: list[np.ndarray]) -> int:
        """Goes on as the package does; drafts kept."""
        kept = agreeing(self, drafts, ps)
        token = self.drawn(ps[kept], self.position + 1 + kept)
        self.cache.commit(mx.array([kept + 1]), [kept + 1])
        self.hidden = self._verified[:, kept]
        self.position, self.token = self.position + kept + 1, token
        return kept


def agreeing(walk: Walk, drafts: list[int], ps: list[np.ndarray]) -> int:
    for i, draft in enumerate(drafts):
        if walk.drawn(ps[i], walk.position + 1 + i) != draft:
            return i
    return len(drafts)


def by_rejection(drafts: list[int], ps: list[np.ndarray], qs: list[np.ndarray]) -> tuple[float, float]:
    """Expected: the first draft is kept; drafts kept. The drafts were drawn from q."""
    chances = np.cumprod([min(1.0, p[d] / q[d]) for d, p, q in zip(drafts, ps, qs, strict=False)])
    return chances[0], chances.sum()


def by_block(drafts: list[int], ps: list[np.ndarray], qs: list[np.ndarray]) -> float:
    """Expected drafts kept by block verification (algorithm 2 of arXiv 2403.10444)."""
    reach, chances = 1.0, []
    for i, draft in enumerate(drafts):
        reach = min(1.0, reach * ps[i][draft] / qs[i][draft])
        if i + 1 == len(drafts):
            chances.append(reach)
        else:
            rest = np.maximum(reach * ps[i + 1] - qs[i + 1], 0).sum()
            chances.append(rest / (rest + 1 - reach) if rest + 1 - reach > 0 else 1.0)
    stays = np.append(np.cumprod([1 - h for h in chances[::-1]])[::-1][1:], 1.0)  # no later block is kept
    return float(sum((i + 1) * h * s for i, (h, s) in enumerate(zip(chances, stays, strict=True))))


def measure(engine: Engine, prompts: list[str], params: SamplingParams, factor: float, steps: int, rounds: int) -> dict:
    """All rules on the same rounds; params: resolved, sampled."""
    counts = Counts()
    for prompt in prompts:
        walk = Walk(engine, prompt, params, steps)
        for _ in range(rounds):
            likeliest, _ = walk.drafts(factor, greedy=True)
            kept = agreeing(walk, likeliest, walk.verify(likeliest))
            counts.first["greedy"] += kept > 0
            counts.kept["greedy"] += kept
            drafts, qs = walk.drafts(factor, greedy=False)
            ps = walk.verify(drafts)
            counts.limit += np.minimum(ps[0], qs[0]).sum()
            first, expected = by_rejection(drafts, ps, qs)
            counts.first["rejection"] += first
            counts.kept["rejection"] += expected
            counts.kept["block"] += by_block(drafts, ps, qs)
            counts.first["block"] += first
            kept = walk.advance(drafts, ps)
            counts.first["coupled"] += kept > 0
            counts.kept["coupled"] += kept
            counts.rounds += 1
    return counts.row()


def live(engine: Engine, prompts: list[str], params: SamplingParams, factor: float, steps: int) -> dict[str, float]:
    """The engine's own tokens a round by rule, all rounds together, and the rounds: `steps` drafts each, but for the
    last ones of a text.
    """
    found = {}
    for rule in ACCEPT:
        drafting = Drafting(temperature=factor, accept=rule)
        own = Engine(engine.target, engine.drafter, engine.text, engine.defaults, drafting=drafting)
        stats = [result.stats for result in own.generate(prompts, params, num_draft_tokens=steps)]
        rounds = sum(each.rounds for each in stats)
        found |= {f"live_{rule}": 1 + sum(each.accepted for each in stats) / rounds, f"live_{rule}_rounds": rounds}
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.acceptance", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: the bundled pair")
    parser.add_argument("--draft-model", default="auto")
    parser.add_argument("--temps", type=float, nargs="+", default=[0.3, 0.7, 1.0, 1.5])
    parser.add_argument("--draft-temperatures", type=float, nargs="+", default=[0.7, 0.85, 1.0, 1.2])
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--num-draft-tokens", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=40, help="of each prompt")
    parser.add_argument("--live", type=int, default=0, metavar="N", help="tokens a prompt that the engine writes")
    parser.add_argument("--json", help="append one line for each case")
    args = parser.parse_args(argv)
    try:
        engine = load(args.model, args.draft_model)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if engine.drafter is None:
        print("error: there is no drafter; name one with --draft-model", file=sys.stderr)
        return 2
    prompts = [each["prompt"] for each in json.loads(PROMPTS.read_text())][: args.prompts]
    print("temp draft-temp | first: greedy coupled limit | tokens a round: greedy coupled rejection block")
    for temp, factor in tqdm([(t, f) for t in args.temps for f in args.draft_temperatures], disable=None):
        params = SamplingParams(temperature=temp, top_k=args.top_k, top_p=args.top_p, seed=0)
        row = measure(engine, prompts, params, factor, args.num_draft_tokens, args.rounds)
        first = " ".join(f"{row[f'first_{name}']:.3f}" for name in ("greedy", "coupled", "limit"))
        tokens = " ".join(f"{row[f'tokens_{rule}']:.3f}" for rule in RULES)
        print(f"{temp} {factor} | {first} | {tokens}", flush=True)
        if args.live:
            written = replace(params, max_tokens=args.live, ignore_eos=True)
            row |= live(engine, prompts, written, factor, args.num_draft_tokens)
            print(*(f"  live {rule}: {row[f'live_{rule}']:.3f} ({row[f'live_{rule}_rounds']})" for rule in ACCEPT))
        if args.json:
            with open(args.json, "a", encoding="utf-8") as file:
                print(json.dumps({"temperature": temp, "draft_temperature": factor} | row), file=file)
    return 0


if __name__ == "__main__":
    sys.exit(main())

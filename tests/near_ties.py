"""Two texts count as equal where they part at a near-tie: OpenBLAS gives a row other bits in another width."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_gemma_mtp.checks.equality import Divergence, divergence
from mlx_gemma_mtp.engine.engine import Engine

NEAR = 1e-4  # between the two logits
FORGIVEN = 2  # places of all texts of a pair, in however many runs they come up


class NearTies:
    """The places where texts parted so far."""

    def __init__(self):
        self.places: set[tuple[str, int]] = set()

    def found(
        self, engine: Engine, prompts: Sequence[str], plain: Sequence[list[int]], texts: Sequence[list[int]]
    ) -> list[Divergence]:
        """Where `texts` leave the plain ones. Fails at the first that is no near-tie, or one place too many."""
        every = [divergence(engine, i, *each) for i, each in enumerate(zip(prompts, plain, texts, strict=True))]
        differing = [each for each in every if each is not None]
        self.places |= {(prompts[each.prompt], each.position) for each in differing}
        assert all(abs(each.gap) <= NEAR for each in differing), [str(each) for each in differing]
        assert len(self.places) <= FORGIVEN, self.places
        return differing

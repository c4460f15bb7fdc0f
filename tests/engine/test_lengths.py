"""What the choice of draft lengths is told of the batch."""

from types import SimpleNamespace

import pytest

from mlx_gemma_mtp.engine.lengths import Lengths
from mlx_gemma_mtp.speculative.depth import AUTO, Depth
from mlx_gemma_mtp.speculative.mixture import Chain


class Told(Depth):
    """Keeps the contexts that it was asked for."""

    def __init__(self):
        super().__init__(None)
        self.contexts = []

    def draft(self, rows, context):
        self.contexts.append(context)
        return super().draft(rows, context)

    def verify(self, rows, context, *others):
        self.contexts.append(context)
        return super().verify(rows, context, *others)


@pytest.mark.parametrize(("contexts", "told"), [([32768], 32768), ([32768, 100, 100, 100], 8267), ([3, 4], 4)])
def test_a_batch_is_as_long_as_its_texts_are_on_average(contexts, told):
    """One long text beside short ones does not make their attention dear."""
    loop = SimpleNamespace(needs_no_drafter=lambda counts: False, chains=[], confidences=[], waiting=[])
    params = SimpleNamespace(temperature=0.0)
    held = [
        SimpleNamespace(request=SimpleNamespace(id=id, drafts=AUTO, remaining=50, params=params), context=context)
        for id, context in enumerate(contexts)
    ]
    lengths = Lengths(depth := Told(), 16, drafting=True)
    lengths.draft(loop, held)
    loop.chains = [Chain.none()] * len(held)
    loop.confidences, loop.waiting = [[]] * len(held), [0] * len(held)
    lengths.verify(loop, held)
    assert depth.contexts == [told, told]

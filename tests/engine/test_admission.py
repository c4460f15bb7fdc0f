"""What a request takes alone, and what is refused: each phase of its life may be the one that does not fit."""

from dataclasses import replace

import mlx.core as mx
import pytest
import tiny

from mlx_gemma_mtp.cache.cache import Cache
from mlx_gemma_mtp.engine.admission import Memory, memory_of
from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.machine.device import TABLE, Kind
from mlx_gemma_mtp.speculative import prefill

GB = 10**9
NOTHING = Memory(
    limit=20 * GB,
    weights=10 * GB,
    row=lambda tokens: 0,
    staged=lambda tokens: 0,
    saved=lambda tokens: 0,
    chunk=lambda tokens, context: 0,
    verify=lambda rows, context: 0,
    advance=256,
)


@pytest.mark.parametrize(
    ("terms", "needed"),
    [
        ({}, 0),
        (
            {"staged": lambda tokens: tokens, "chunk": lambda tokens, context: 7 * tokens + context},
            1000 + 7 * 64 + 1000,
        ),
        ({"chunk": lambda tokens, context: 7 * tokens}, 7 * 64),  # no more tokens than a chunk has
        ({"saved": lambda tokens: 10 * tokens, "row": lambda tokens: tokens}, 10_000 + 1256 + 8),
        ({"row": lambda tokens: tokens, "verify": lambda rows, context: 9 * rows * context}, 5000 + 8 + 9 * 5000),
    ],
    ids=["weights", "prefill", "chunk", "join", "decode"],
)
def test_a_request_alone_takes_what_its_largest_phase_takes(terms, needed):
    memory = replace(NOTHING, **terms)
    assert memory.alone(1000, 4000, 64, 8) == 10 * GB + needed


def test_a_short_text_reserves_no_more_than_its_limit():
    memory = replace(NOTHING, saved=lambda tokens: tokens, row=lambda tokens: tokens)
    assert memory.alone(1000, 3, 64, 8) == 10 * GB + 1000 + 1003 + 8


def test_what_does_not_fit_alone_is_refused_with_the_numbers():
    memory = replace(NOTHING, row=lambda tokens: tokens * 1_000_000)
    memory.check(1000, 8992, 64, 8)
    expected = (
        r"a prompt of 1000 tokens with max_tokens=9000 needs 20\.0 GB with the model, the limit is 20\.0 GB; lower"
    )
    with pytest.raises(UserError, match=expected):
        memory.check(1000, 9000, 64, 8)


@pytest.mark.parametrize("kind", ["moe", "e2b"])
@pytest.mark.parametrize("tokens", [5, 255, 257, 900, 1100])
def test_bytes_are_those_of_caches(kind, tokens):
    """A prompt while it is prefilled, saved, and in a row of the batch."""
    model = tiny.target(kind)
    sizes = {"chunk": 64, "block": 8, "item_size": 4, "lookback": 1, "traits": TABLE[Kind.CPU]}
    memory = memory_of(model.config, model.config.kv, 0, 0, **sizes)
    (staged,), _ = prefill.prefill(model, [[2 + i % 90 for i in range(tokens)]], 64, 1)
    saved, batch = staged.save(0), Cache(model.config.kv, 8, mx.float32, 1)
    batch.arrange([saved])
    held = memory.staged(tokens), memory.saved(tokens), memory.row(tokens)
    assert (staged.bytes, saved.bytes, batch.bytes) == held

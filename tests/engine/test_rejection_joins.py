"""Rows that join and leave where drafts are accepted by rejection: none is cut, and greedy texts are those of their
requests alone.
"""

from __future__ import annotations

from functools import cache
from unittest import mock

import pytest
import schedules
from schedules import CHUNK, DRAFTS, EVERY, PAIRS, Asked, Drive, Schedule, check, drawn
from watchdog import within

from mlx_gemma_mtp import load
from mlx_gemma_mtp.engine.engine import Engine

pytest.importorskip("llguidance")


@cache
def engine_of(pair: str) -> Engine:
    return load(
        **PAIRS[pair], num_draft_tokens=4, dtype="float32", prefill_chunk=CHUNK, learning=False, accept="rejection"
    )


def check_all(schedule: Schedule) -> None:
    with within(300):
        outcomes = Drive(engine_of("bundled"), schedule).run()
    for each in outcomes:
        assert each.result.error is None, (each.asked, each.result.error)
        if EVERY[each.asked.settings][0].temperature == 0.0:
            with mock.patch.object(schedules, "engine_of", engine_of):
                check("bundled", each)


def test_every_setting_in_one_crowd():
    """In three rows, with memory for little more than one of them."""
    requests = tuple(
        Asked(at=i // 2, prompt=(i % 3, 5 + 9 * (i % 5)), settings=name, limit=6 + i % 7, drafts=(*DRAFTS, 15)[i % 5])
        for i, name in enumerate(EVERY)
    )
    check_all(Schedule(requests, rows=3, spare=1.5))


@pytest.mark.parametrize("seed", range(3))
def test_some_schedules(seed):
    check_all(drawn(seed, 8, rows=(8, 2, 3)[seed]))

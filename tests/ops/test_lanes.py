"""Two lanes of a CPU: the same bits as one lane has, where they gain something, and each thread's own."""

import threading
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from trained import OF_MOE

from mlx_gemma_mtp.cache.cache import Cache
from mlx_gemma_mtp.engine.load import load
from mlx_gemma_mtp.machine import blas, device
from mlx_gemma_mtp.ops import lanes
from mlx_gemma_mtp.speculative.prefill import chunk


@pytest.fixture
def lanes_of(monkeypatch):
    """Sets how many cores there are, and asks anew whether two lanes gain something."""

    def cores(number: int) -> int:
        monkeypatch.setattr(device.os, "sched_getaffinity", lambda _: set(range(number)), raising=False)
        forget()
        return lanes.number()

    def forget() -> None:
        device.streams_take_cores.cache_clear()
        lanes._second.cache_clear()

    yield cores
    monkeypatch.undo()
    forget()


def test_one_core_a_gpu_and_a_blas_of_many_threads_have_one_lane(lanes_of, monkeypatch):
    threads = blas.threads()
    monkeypatch.setattr(blas, "threads", lambda: 1)
    kind = device.kind()
    monkeypatch.setattr(device, "kind", lambda: device.Kind.CPU)
    assert (lanes_of(1), lanes_of(2), lanes_of(8)) == (1, 2, 2)
    for many in (2, 0):
        monkeypatch.setattr(blas, "threads", lambda many=many: many)
        assert lanes_of(2) == 1
    monkeypatch.setattr(blas, "threads", lambda: 1)
    for gpu in (device.Kind.METAL, device.Kind.CUDA):
        monkeypatch.setattr(device, "kind", lambda gpu=gpu: gpu)
        assert lanes_of(2) == 1
    monkeypatch.undo()
    assert (threads, device.kind()) == (blas.threads(), kind)


@pytest.mark.skipif(device.kind() is not device.Kind.CPU, reason="lanes are a CPU's")
def test_every_second_lane_is_another_stream_and_each_thread_has_its_own(lanes_of, monkeypatch):
    monkeypatch.setattr(blas, "threads", lambda: 1)
    lanes_of(2)
    found: dict[str, list[str]] = {}

    def ask(who: str) -> None:
        found[who] = []
        for index in range(4):
            with lanes.lane(index):
                found[who].append(str(mx.default_stream(mx.cpu)))

    ask("here")
    other = threading.Thread(target=ask, args=("there",))
    other.start()
    other.join()
    for one, two, *again in found.values():
        assert one != two and [one, two] == again
    assert len({stream for each in found.values() for stream in each}) == 4
    lanes_of(1)
    ask("alone")
    assert len(set(found["alone"])) == 1


@pytest.mark.skipif(device.kind() is not device.Kind.CPU or blas.threads() != 1, reason="lanes are a CPU's")
def test_a_prefill_has_the_same_bits_on_two_lanes(lanes_of):
    """Two prompts in one forward, of several blocks each, then the last token of both; in the thread that loaded."""
    engine = load(**OF_MOE)
    model, rng, found = engine.target, np.random.default_rng(0), {}
    pieces = [[rng.integers(10, 4000, size).tolist() for size in sizes] for sizes in ((300, 160), (130, 2))]

    def prefill(cores: int) -> None:
        made = lanes_of(cores)
        caches = [Cache(model.config.kv, 512, model.dtype, 0).open(1024) for _ in range(2)]
        hidden = [chunk(model, caches, each) for each in pieces]
        mx.eval(hidden, [cache.lengths for cache in caches], [list(cache.buffers) for cache in caches])
        kept = [array for cache in caches for buffer in cache.buffers for array in buffer]
        found[cores] = made, [np.array(each) for each in (*hidden, *kept)]

    for cores in (1, 2):
        engine.call(partial(prefill, cores))
    assert (found[1][0], found[2][0]) == (1, 2)
    for one, two in zip(found[1][1], found[2][1], strict=True):
        np.testing.assert_array_equal(one, two)

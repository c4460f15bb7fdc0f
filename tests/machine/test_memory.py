"""Memory of the machine: what it has, what MLX keeps of it unused, what is wired."""

import pytest

from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.machine import device, memory
from mlx_gemma_mtp.machine.device import TABLE, Kind


def test_what_does_not_fit_is_named_with_both_numbers(monkeypatch):
    monkeypatch.setattr(memory, "total_bytes", lambda: 8 * 10**9)
    memory.check(8 * 10**9, "the model", "take a smaller one")
    with pytest.raises(
        UserError, match=r"the model needs 9\.0 GB, this machine has 8\.0 GB for it; take a smaller one"
    ):
        memory.check(9 * 10**9, "the model", "take a smaller one")


def test_a_gpu_has_its_own_memory(monkeypatch):
    monkeypatch.setattr(device, "traits", lambda: TABLE[Kind.METAL])
    monkeypatch.setattr(memory.device, "info", lambda: {"max_recommended_working_set_size": 22 * 10**9})
    assert memory.total_bytes() == 22 * 10**9
    monkeypatch.setattr(device, "traits", lambda: TABLE[Kind.CUDA])
    monkeypatch.setattr(device, "info", lambda: {"total_memory": 80 * 10**9})
    assert memory.total_bytes() == 72 * 10**9


@pytest.fixture
def limits(monkeypatch):
    """MLX's limit of unused buffers as it was set, call by call."""
    given = []
    monkeypatch.setattr(memory, "_kept", memory._Kept())
    monkeypatch.setattr(memory.mx, "set_cache_limit", given.append)
    return given


def test_unused_buffers_are_limited_to_what_a_round_needs(limits):
    memory.limit_cache(10 << 20)
    memory.limit_cache(300 << 20)
    memory.limit_cache(200 << 20)  # another engine, smaller: the first still needs its own
    assert limits == [memory.LEAST_CACHE, 300 << 20]


def test_mlx_keeps_to_the_limit(monkeypatch):
    monkeypatch.setattr(memory, "_kept", memory._Kept())
    mx = memory.mx
    before = mx.set_cache_limit(1 << 40)
    try:
        memory.limit_cache(100 << 20)
        arrays = [mx.zeros(((8 + i) << 18,)) for i in range(20)]  # from 8 to 27 MiB
        mx.eval(arrays)
        arrays.clear()
        mx.synchronize()
        assert mx.get_cache_memory() <= 100 << 20
        assert mx.set_cache_limit(before) == 100 << 20
    finally:
        mx.set_cache_limit(before)
        mx.clear_cache()


def test_weights_are_wired_where_it_is_asked_for_alone(monkeypatch):
    given = []
    monkeypatch.setattr(memory.mx, "set_wired_limit", lambda limit: given.append(limit) or 7)
    monkeypatch.setattr(memory, "total_bytes", lambda: 99)
    for on, kind in ((False, Kind.METAL), (True, Kind.CUDA), (True, Kind.CPU)):
        monkeypatch.setattr(device, "traits", lambda kind=kind: TABLE[kind])
        with memory.wired_limit(on):
            pass
    assert given == []
    monkeypatch.setattr(device, "traits", lambda: TABLE[Kind.METAL])
    with memory.wired_limit(True), memory.wired_limit(True):
        assert given == [99]
    assert given == [99, 7]

"""benchmarks.server: what it takes for a whole answer, and what it makes of its figures."""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
from pathlib import Path

import pytest

from benchmarks.server import allocator, peers, soak
from benchmarks.server.__main__ import main, soak_part
from mlx_gemma_mtp.files.hub import Pair


def lines(*events: dict | str) -> bytes:
    return "".join(f"data: {each if isinstance(each, str) else json.dumps(each)}\n\n" for each in events).encode()


def chunk(text: str) -> dict:
    return {"choices": [{"delta": {"content": text}}]}


def test_a_stream_that_is_cut_is_no_answer():
    good = soak.Good(soak.CHAT, {"stream": True}, "ab")
    assert soak.text_of(good, lines(chunk("a"), chunk("b"), "[DONE]")) == "ab"
    for cut in (lines(chunk("a"), chunk("b")), lines(chunk("a"), {"error": {"message": "x"}}, "[DONE]")):
        with pytest.raises((ValueError, LookupError)):
            soak.text_of(good, cut)
    claude = soak.Good(soak.CLAUDE, {"stream": True})
    said = {"type": "content_block_delta", "delta": {"text": "x"}}
    assert soak.text_of(claude, lines(said, {"type": "message_stop"})) == "x"
    with pytest.raises(ValueError):
        soak.text_of(claude, lines(said))


def test_another_s_text_is_wrong_and_an_error_has_failed(monkeypatch):
    answers = iter(["its own", "another's", ValueError("500")])

    async def ask(port: int, good: soak.Good) -> str:
        answer = next(answers)
        if isinstance(answer, ValueError):
            raise answer
        return answer

    monkeypatch.setattr(soak, "ask", ask)
    seen, good = soak.Seen(), soak.Good(soak.CHAT, {}, "its own")
    for _ in range(3):
        asyncio.run(soak._well(0, good, seen))
    assert (seen.good, len(seen.wrong), len(seen.failed)) == (3, 1, 1)


def test_good_requests_are_of_all_routes_and_settings():
    some = soak.goods(soak.KINDS)
    assert {good.path for good in some} == {soak.CHAT, soak.TEXT, soak.CLAUDE}
    assert {good.body["stream"] for good in some} == {True, False}
    assert some == soak.goods(soak.KINDS)


def soaked(held: float, kept: float) -> dict:
    """The record of a soak in which so many bytes more are held, and kept by the allocator, from look to look."""
    seen, megabyte = soak.Seen(trimmed=400_000_000), 1e6
    for i in range(60):
        told = {"resident": int(400 * megabyte + i * (held + kept)), "kept": int(50 * megabyte + i * kept)}
        figures = (
            f"mlx_gemma_mtp:memory_active_bytes {55 * megabyte}\nmlx_gemma_mtp:memory_cache_bytes {60 * megabyte}\n"
        )
        seen.sizes.append(soak.sizes_of(told, figures.encode()))
    return soak.record(seen, [])


@pytest.mark.parametrize(
    ("held", "kept", "missed"), [(0, 0, []), (0, 1e6, []), (1e6, 0, ["held"]), (1e6, 1e6, ["held"])]
)
def test_what_is_held_is_told_from_what_the_allocator_keeps(monkeypatch, held, kept, missed):
    monkeypatch.setattr(soak, "measure", lambda *_: soaked(held, kept))
    found, shown = soak_part(argparse.Namespace(soak_clients=1, seconds=1.0), lambda _: None)
    assert found["held_slope"][0] == pytest.approx(held / soak.EVERY, abs=1)
    assert [each.what.partition(":")[0] for each in shown if each.missed] == missed
    assert found["held"].startswith(f"{290 + 20 * held / 1e6:.1f}, ") and found["trimmed"] == "400.0"


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc alone tells")
def test_an_allocator_tells_what_it_keeps(tmp_path):
    """Blocks that are too small to be maps of their own, every second one given back: trimming frees their pages."""
    glibc, library = allocator.Allocator(), ctypes.CDLL(None)
    allocator.answer(str(tmp_path / "socket"), {"look": glibc.look, "trim": glibc.trim})
    library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    allocator.ask(str(tmp_path / "socket"), "trim")
    blocks = [library.malloc(60_000) for _ in range(1000)]
    for block in blocks:
        ctypes.memset(block, 1, 60_000)
    full = glibc.look()
    for block in blocks[::2]:
        library.free(block)
    told = allocator.ask(str(tmp_path / "socket"), "look")
    assert told["kept"] - full["kept"] >= 20e6 and full["resident"] - told["resident"] <= 10e6
    assert told["resident"] - allocator.ask(str(tmp_path / "socket"), "trim")["resident"] >= 20e6
    for block in blocks[1::2]:
        library.free(block)


def test_servers_are_judged_by_their_texts():
    ways = [peers.Way(name, [], "") for name in ("ours", "slow", "slower")]
    for way, seconds in zip(ways, (1.0, 2.0, 4.0), strict=True):
        texts = ["abcd", "efgh" if way.name != "slower" else "xxxx"]
        way.calls += [{"texts": texts, "seconds": seconds, "firsts": [0.1, 0.2]}] * 3
    found = peers.judged(ways, list)
    assert found["better"] == "slow" and found["ratios"] == {"slow": [2.0, 2.0, 2.0], "slower": [4.0, 4.0, 4.0]}
    assert [line["equal_texts"] for line in found["servers"]] == [2, 2, 1]


def test_nobody_thinks():
    """mlx-lm's server would, and answer another prompt."""
    for way in peers.ways(Pair(Path("t"), Path("d"), None), [1], 8):
        thinks = way.command[:2] == ["mlx_lm", "server"]
        assert (peers.UNTHINKING in way.command) == thinks and "--thinking" not in way.command


def test_what_cannot_be_measured_is_told(capsys):
    assert main(["cost", "--repeats", "0"]) == 2
    assert "--repeats is 0, expected at least 1" in capsys.readouterr().err

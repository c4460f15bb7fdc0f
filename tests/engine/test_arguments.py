"""Python arguments of load, generate, stream and calibrate: what is meant is taken, the rest named in a line."""

import asyncio
import json
import multiprocessing
import re
import threading
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlx_gemma_mtp import SamplingParams, UserError, load
from mlx_gemma_mtp.engine.engine import Engine
from mlx_gemma_mtp.errors import shown
from mlx_gemma_mtp.files import hub


def name(value: object) -> str:
    """A test's name that is the same in every process: without addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", shown(value, 60))


SHORT = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
MESSAGE = {"role": "user", "content": "hello"}
EVENT = threading.Event()


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load(hub.DEMO / "target", hub.DEMO / "drafter", num_draft_tokens=np.int64(2), max_rows=np.int32(4))


@pytest.fixture(scope="module")
def ids(engine) -> list[int]:
    return engine.text.encode("hello")


def named(call, *parts: str) -> None:
    with pytest.raises(UserError) as raised:
        call()
    message = str(raised.value)
    assert "\n" not in message and len(message) < 300
    for part in (*parts, "expected"):
        assert part in message, message


ONE = {
    "ids": lambda ids: ids,
    "a tuple": tuple,
    "numpy": np.array,
    "numpy, 32 bits": lambda ids: np.array(ids, np.int32),
    "numpy, unsigned": lambda ids: np.array(ids, np.uint16),
    "mlx": mx.array,
    "numpy integers": lambda ids: [np.int64(token) for token in ids],
    "a generator": iter,
    "text": lambda ids: "hello",
    "numpy text": lambda ids: np.str_("hello"),
    "messages": lambda ids: [MESSAGE],
    "a tuple of messages": lambda ids: (MESSAGE,),
    "a message": lambda ids: MESSAGE,
    "text parts": lambda ids: {"role": "user", "content": ({"type": "text", "text": "hello"},)},
}
SEVERAL = {
    "a tuple": lambda ids: ("hello", "hello"),
    "a generator": lambda ids: ("hello" for _ in range(2)),
    "rows of numpy": lambda ids: np.array([ids, ids]),
    "rows of mlx": lambda ids: mx.array([ids, ids]),
    "arrays": lambda ids: [np.array(ids), mx.array(ids)],
    "all kinds": lambda ids: ["hello", [MESSAGE], (MESSAGE,), ids, tuple(ids), iter(ids), iter([MESSAGE])],
    "one": lambda ids: ["hello"],
}


@pytest.mark.parametrize("kind", ONE)
def test_one_prompt(engine, ids, kind):
    usual = engine.generate(ids, SHORT).tokens
    assert engine.generate(ONE[kind](ids), SHORT).tokens == usual
    assert engine.text.encode(ONE[kind](ids)) == ids
    assert list(engine.stream(ONE[kind](ids), SHORT))[-1].result.tokens == usual


@pytest.mark.parametrize("kind", SEVERAL)
def test_several_prompts(engine, ids, kind):
    usual = engine.generate(ids, SHORT).tokens
    results = engine.generate(SEVERAL[kind](ids), SHORT)
    assert isinstance(results, list) and [r.tokens for r in results] == [usual] * len(results)


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        5,
        2.5,
        True,
        b"hello",
        bytearray(b"hello"),
        {"hello"},
        object(),
        [None],
        ["hello", None],
        ["hello", 5],
        ["hello", b"x"],
        [MESSAGE, "hello"],
        [MESSAGE, None],
        [["hello"]],
        [[MESSAGE], ["hello"]],
        np.array(5),
        np.array(["hello"], object)[0:0],
        mx.array(5),
        np.zeros((2, 2, 2), np.int32),
        {"role": "user", "content": 5},
        {"role": 5, "content": "hello"},
        {"role": "user", "content": 10**5000},
        {"content": "hello"},
        [10**5000],
        [-(10**400)],
        [{"role": "user", "content": ""}] * 1000,
        "",
        {"role": "user", "content": {"type": "text"}},
        {"role": "user", "content": ["hello"]},
        {"role": "user", "content": [{"type": "text", "text": None}]},
        {"role": "user", "content": [{"type": "text"}]},
    ],
    ids=name,
)
def test_what_is_no_prompt(engine, prompt):
    named(lambda: engine.generate(prompt, SHORT))


@pytest.mark.parametrize(
    "params",
    [
        {"max_tokens": 4},
        "greedy",
        5,
        [{"max_tokens": 4}],
        [5],
        SamplingParams,
        np.array(1),
        mx.array(1),
        10**5000,
        [SHORT, SHORT],
        [],
    ],
    ids=name,
)
def test_what_are_no_settings(engine, params):
    named(
        lambda: engine.generate("hello", params),
        "settings" if isinstance(params, list) and len(params) != 1 else "params",
    )


def test_settings_of_each_prompt_may_come_in_any_sequence(engine):
    for params in ((SHORT, None), [None, SHORT], iter([SHORT, SHORT]), np.array([SHORT, SHORT], object)):
        results = engine.generate([[2, 3], [2, 4]], params, cancel=None)
        assert len(results) == 2
    assert engine.generate([2, 3], [SHORT]).finish_reason == "length"


OPTIONS = [
    {"num_draft_tokens": "many"},
    {"num_draft_tokens": "2"},
    {"num_draft_tokens": 2.0},
    {"num_draft_tokens": True},
    {"num_draft_tokens": np.float32(2)},
    {"num_draft_tokens": -1},
    {"num_draft_tokens": [2]},
    {"system_prompt": 5},
    {"system_prompt": b"brief"},
    {"system_prompt": ["brief"]},
    {"system_prompt": "a\udcff"},
    {"chat_template": "no"},
    {"chat_template": None},
    {"cancel": True},
    {"cancel": "now"},
    {"cancel": lambda: False},
    {"cancel": threading.Event},
    {"cancel": SimpleNamespace(is_set=True)},
    {"num_draft_tokens": 10**5000},
    {"num_draft_tokens": -(10**400)},
    {"timeout": -1},
    {"timeout": 0},
    {"timeout": "5"},
    {"timeout": True},
    {"timeout": float("nan")},
    {"timeout": float("inf")},
    {"timeout": 1e300},
    {"timeout": 10**5000},
    {"timeout": [5]},
    {"timeout": np.float32(-0.5)},
    {"priority": 101},
    {"priority": -101},
    {"priority": "1"},
    {"priority": 1.0},
    {"priority": True},
    {"priority": None},
    {"priority": 10**5000},
    {"progress": "bar"},
    {"progress": 5},
]


@pytest.mark.parametrize("option", OPTIONS, ids=name)
def test_options_of_a_call(engine, option):
    name = next(iter(option)).replace("system_prompt", "system")
    named(lambda: engine.generate("hello", SHORT, **option), name)
    named(lambda: engine.stream("hello", SHORT, **option), name)


def test_options_that_are_meant(engine, ids):
    usual = engine.generate(ids, SHORT).tokens
    for option in (
        {"num_draft_tokens": np.int64(3)},
        {"num_draft_tokens": np.uint8(0)},
        {"num_draft_tokens": None},
        {"num_draft_tokens": 10**9},  # more than any text can take
        {"progress": None, "cancel": None, "system_prompt": None},
        {"cancel": multiprocessing.Event()},
        {"timeout": None, "priority": 0},
        {"timeout": 30, "priority": np.int64(-100)},
        {"timeout": np.float32(30), "priority": 100},
        {"timeout": 1e9},
        {"cancel": asyncio.Event()},
        {"progress": print},
    ):
        assert engine.generate(ids, SHORT, **option).tokens == usual, option


def test_a_system_prompt_beside_ids_is_not_dropped(engine, ids):
    named(lambda: engine.generate(ids, SHORT, system_prompt="be brief"), "token ids")


LOADS = [
    {"model": 5},
    {"model": b"demo"},
    {"model": ["demo"]},
    {"draft_model": None},
    {"draft_model": 5},
    {"draft_model": b"none"},
    {"revision": 5},
    {"learning": 1},
    {"kv_bits": 3},
    {"kv_bits": 16},
    {"kv_bits": 8.0},
    {"kv_bits": True},
    {"kv_bits": "8"},
    {"kv_bits_rings": 1},
    {"row_invariant": 1},
    {"kv_bits_rings": True},
    {"max_waiting": 0},
    {"max_waiting": "8"},
    {"max_waiting": None},
    {"max_waiting": 8.0},
    {"memory_limit": 0},
    {"memory_limit": -1},
    {"memory_limit": "8GB"},
    {"memory_limit": 8e9},
    {"memory_limit": True},
    {"memory_limit": 2**64},
    {"wired_limit": 1},
    {"wired_limit": None},
    {"num_draft_tokens": 2.0},
    {"num_draft_tokens": "two"},
    {"num_draft_tokens": True},
    {"max_rows": 10**5000},
    {"prefill_chunk": 10**400},
    {"draft_bits": 10**5000},
    {"revision": 10**5000},
    {"max_rows": True},
    {"max_rows": 2.0},
    {"max_rows": "8"},
    {"max_rows": None},
    {"max_rows": 0},
    {"prefill_chunk": 256.0},
    {"prefill_chunk": True},
    {"prefill_chunk": -1},
    {"draft_position": 0.0},
    {"draft_position": True},
    {"draft_position": 1},
    {"draft_position": -2},
    {"draft_position": 2**40},
    {"draft_temperature": 0},
    {"draft_temperature": True},
    {"draft_temperature": "1"},
    {"draft_temperature": 1e-40},
    {"draft_temperature": 1e39},
    {"draft_temperature": float("nan")},
    {"accept": None},
    {"accept": ["coupled"]},
    {"accept": b"coupled"},
    {"dtype": "float64"},
    {"dtype": mx.int32},
    {"dtype": np.float32},
    {"dtype": 32},
    {"dtype": ["float32"]},
    {"draft_bits": 8.0},
    {"draft_bits": True},
    {"draft_bits": "8"},
    {"draft_bits": 7},
    {"draft_bits": 4, "draft_model": "none"},
    {"notice": "print"},
    {"progress": 5},
]


@pytest.mark.parametrize("options", LOADS, ids=name)
def test_arguments_of_load(options):
    named(lambda: load(**options), next(iter(options)))


def test_arguments_of_load_that_are_meant(ids):
    loaded = load(
        Path(hub.DEMO / "target"),
        Path(hub.DEMO / "drafter"),
        dtype=mx.float32,
        draft_bits=np.int64(8),
        draft_temperature=np.float32(1),
        notice=None,
        progress=None,
        prefill_chunk=np.int64(64),
        max_waiting=np.int32(9),
        memory_limit=np.int64(2**33),
    )
    assert (loaded.settings.max_waiting, loaded.settings.memory_limit, loaded.settings.wired_limit) == (9, 2**33, False)
    assert loaded.generate(ids, SHORT).finish_reason == "length" and loaded.prefill_chunk == 64


@pytest.mark.parametrize(
    "options", [{"repeats": 0}, {"repeats": True}, {"repeats": 2.0}, {"progress": 5}, {"full": 2}], ids=str
)
def test_arguments_of_calibrate(engine, options):
    named(lambda: engine.calibrate(**options), next(iter(options)))


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-7, np.float32(1e-40)])
def test_a_temperature_that_is_too_low_to_divide_by_is_greedy(engine, ids, temperature):
    sampled = SamplingParams(max_tokens=8, temperature=temperature, top_k=64, seed=3, ignore_eos=True)
    greedy = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    assert engine.generate(ids, sampled).tokens == engine.generate(ids, greedy).tokens


def test_settings_that_come_from_numpy_compute(engine, ids):
    kinds = {"temperature": np.float32(0.5), "top_p": np.float64(0.9), "top_k": np.int64(5), "min_p": np.float16(0)}
    biased = {"logit_bias": {np.int64(5): np.float32(1), np.int32(7): -np.inf}, "seed": np.uint64(2**64 - 1)}
    penalised = {"repetition_penalty": np.float32(1.1), "presence_penalty": np.int64(1)}
    params = SamplingParams(max_tokens=np.int64(8), ignore_eos=True, **kinds, **biased, **penalised)
    result = engine.generate(ids, params)
    assert len(result.tokens) == 8 and json.dumps(result.stats.as_dict())

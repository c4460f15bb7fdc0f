"""Broken headers, configs and index files: one line and exit code 2, or a result that another reader agrees with.

FUZZ_EXAMPLES=5000 runs that many random examples of each test instead of the same few.
"""

import io
import json
import math
import os
import shutil
import struct
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import mlx.core as mx
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_convert import Checkpoint, expected, load, make_drafter, make_e2b, make_moe, make_text

from convert.cli import main
from mlx_gemma_mtp.files.safetensors import ITEM_BYTES
from mlx_gemma_mtp.models.config import TargetConfig

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def fuzz(examples: int):
    return settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


# ---- what breaks -----------------------------------------------------------------------------

odd_numbers = st.sampled_from(
    [-1, 0, 1, 2, 3, 64, True, False, 64.0, 0.5, 1e308, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**30, None]
)
odd_values = odd_numbers | st.sampled_from(
    ["", "64", "bfloat16", "\ud800", "\n", "../x", "/etc/passwd", [], {}, [[]], [{}], {"": 1}, [64, 64], "x" * 300]
)
NESTED = "@nested@"  # written as lists in lists


def dumped(value: object) -> bytes:
    return json.dumps(value).replace(f'"{NESTED}"', "[" * 20_000).encode()


@st.composite
def broken_bytes(draw, data: bytes) -> bytes:
    """One to three bits flipped, or bytes left out, put in or cut off."""
    at = draw(st.integers(0, len(data) - 1))
    kind = draw(st.sampled_from(["flip", "cut", "insert", "remove", "replace"]))
    if kind == "flip":
        changed = bytearray(data)
        for _ in range(draw(st.integers(1, 3))):
            changed[at] ^= 1 << draw(st.integers(0, 7))
            at = draw(st.integers(0, len(data) - 1))
        return bytes(changed)
    more = draw(
        st.binary(min_size=1, max_size=4) | st.sampled_from([b'"', b"{", b"}", b",", b"9", b"-", b"NaN", b"\\u0000"])
    )
    end = {"cut": len(data), "insert": at, "remove": at + 1, "replace": at + len(more)}[kind]
    return data[:at] + (more if kind in ("insert", "replace") else b"") + data[end:]


@st.composite
def broken_header(draw, data: bytes) -> bytes:
    """One entry (or two) changed as no reader expects."""
    header = json.loads(data)
    names = sorted(set(header) - {"__metadata__"})
    one, two = draw(st.sampled_from(names)), draw(st.sampled_from(names))
    entry, other = header[one], header[two]
    shape, offsets = entry["shape"], entry["data_offsets"]
    kind = draw(st.sampled_from(HEADER_KINDS))
    if kind == "dtype":
        entry["dtype"] = draw(st.sampled_from(sorted(ITEM_BYTES)) | odd_values)
    elif kind == "onto":
        start, (begin, end) = other["data_offsets"][0], offsets  # of two sizes: a hole and an overlap
        entry["data_offsets"] = [start, start + end - begin]
    elif kind == "shift":
        shift = draw(st.sampled_from([-128, -2, -1, 1, 2, 128, 2**63]))
        entry["data_offsets"] = [offset + shift for offset in offsets]
    elif kind == "permute":
        entry["shape"] = draw(st.permutations(shape))
    elif kind == "reshape":
        size = math.prod(shape)
        entry["shape"] = draw(st.sampled_from([[], [size], [1, *shape], [*shape, 1], [2, size // 2], [0], [size, 0]]))
    elif kind == "numbers":
        where = entry[draw(st.sampled_from(["shape", "data_offsets"]))]
        where[draw(st.integers(0, len(where) - 1))] = draw(odd_values)
    elif kind == "rename":
        header[draw(st.sampled_from([*names, "", "x", "\ud800", "model.vision_tower.x"]))] = header.pop(one)
    elif kind == "replace":
        header[one] = draw(odd_values | st.just(NESTED))
    elif kind == "key":
        entry[draw(st.sampled_from(["dtype", "shape", "data_offsets", "x"]))] = draw(odd_values | st.just(NESTED))
    elif kind == "metadata":
        header["__metadata__"] = draw(odd_values | st.just(NESTED))
    elif kind == "drop":
        del header[one]
    elif kind == "twice":
        return dumped(header)[:-1] + b"," + dumped({one: other})[1:]
    return dumped(header)


HEADER_KINDS = (
    "dtype", "onto", "shift", "permute", "reshape", "numbers", "rename", "replace", "key", "metadata", "drop", "twice",
)  # fmt: skip


@st.composite
def broken_file(draw, data: bytes) -> bytes:
    """A safetensors file with a changed header, or with a header of changed bytes."""
    length = 8 + struct.unpack("<Q", data[:8])[0]
    kind = draw(st.sampled_from(["entries", "entries", "bytes", "text", "length"]))
    if kind == "bytes":  # the length included, which then may fit no more
        return draw(broken_bytes(data[:length])) + data[length:]
    if kind == "length":
        return draw(st.binary(min_size=8, max_size=8)) + data[8:]
    raw = data[8:length]
    raw = draw(broken_bytes(raw) if kind == "text" else broken_header(raw))
    return struct.pack("<Q", len(raw)) + raw + data[length:]


@st.composite
def broken_json(draw, data: bytes) -> bytes:
    """A JSON object with one value or key changed, wherever it is, or with changed bytes."""
    if draw(st.integers(0, 3)) == 0:
        return draw(broken_bytes(data))
    where = value = json.loads(data)
    while True:
        keys = sorted(where) if isinstance(where, dict) else list(range(len(where)))
        key = draw(st.sampled_from(keys))
        if not isinstance(where[key], dict | list) or not where[key] or draw(st.integers(0, 3)) == 0:
            break
        where = where[key]
    kind = draw(st.sampled_from(["value", "value", "value", "remove", "swap", "twice", "key"]))
    if kind == "value":
        where[key] = draw(odd_values | st.just(NESTED))
    elif kind == "swap":
        other = draw(st.sampled_from(keys))
        where[key], where[other] = where[other], where[key]
    elif kind == "remove" or isinstance(where, list):
        del where[key]
    elif kind == "key":
        where[draw(st.sampled_from(["", "x", "per_layer_config", "quantization", "\ud800"]))] = draw(odd_values)
    else:
        return json.dumps(value).encode()[:-1] + b"," + dumped({key: draw(odd_values)})[1:]
    return dumped(value)


# ---- what must hold ----------------------------------------------------------------------------


def command(*argv: object) -> tuple[int, str]:
    """(exit code, stdout); an error is one line, and nothing is raised."""
    out, error = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(error):
        code = main([str(argument) for argument in argv])
    line = error.getvalue()
    assert (line == "") if code != 2 else (line.startswith("error: ") and line.count("\n") == 1), (code, line)
    return code, out.getvalue()


def same(held: dict, wanted: dict) -> bool:
    return held.keys() == wanted.keys() and all(
        held[name].shape == value.shape and mx.array_equal(held[name], value.astype(held[name].dtype), equal_nan=True)
        for name, value in wanted.items()
    )


def read_by_mlx(folder: Path, config: dict) -> Checkpoint:
    """What MLX's own reader finds in a folder; it is asked only about what was accepted."""
    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= mx.load(str(file))
    return Checkpoint(folder, config, weights)


def survives(source: Path, out: Path, config: dict, target: bool = True) -> None:
    """convert and inspect refuse the source, or convert what MLX finds in it."""
    shutil.rmtree(out, ignore_errors=True)
    inspected, _ = command("inspect", source)
    code, _ = command("--hf-path", source, "--mlx-path", out)
    if code == 2:
        assert [path.name for path in out.parent.iterdir()] == [source.name]
        return
    assert code == inspected == 0
    for file in source.glob("*.safetensors"):
        safetensors.deserialize(file.read_bytes())  # the reference implementation knows no holes and no overlaps
    read = read_by_mlx(source, config)
    held, written = load(out)
    assert same(held, expected(read) if target else read.weights)
    if target:
        assert TargetConfig.from_dict(written)  # as the loader does
    assert command("check", out, "--against", source)[0] == 0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """make, shards -> a folder of its own, once, and where its conversions go."""
    made = {}

    def get(make, shards: int = 1) -> tuple[Checkpoint, Path]:
        if (make, shards) not in made:
            folder = tmp_path_factory.mktemp(make.__name__)
            checkpoint = make(folder / "hf")
            checkpoint.save(shards)
            made[make, shards] = checkpoint, folder / "out"
        return made[make, shards]

    return get


class changed:
    """Within it a file holds other bytes."""

    def __init__(self, path: Path, data: bytes):
        self.path, self.data = path, data

    def __enter__(self) -> None:
        self.before = self.path.read_bytes()
        self.path.write_bytes(self.data)

    def __exit__(self, *exception: object) -> None:
        self.path.write_bytes(self.before)


@pytest.mark.parametrize("make", [make_moe, make_drafter])
def test_headers(place, make):
    checkpoint, out = place(make)
    path = checkpoint.folder / SINGLE

    @fuzz(60)
    @given(broken_file(path.read_bytes()))
    def check(data):
        with changed(path, data):
            survives(checkpoint.folder, out, checkpoint.config, target=make is make_moe)

    check()


@pytest.mark.parametrize("make", [make_text, make_e2b, make_drafter])
def test_configs(place, make):
    checkpoint, out = place(make)
    path = checkpoint.folder / "config.json"

    @fuzz(25)
    @given(broken_json(path.read_bytes()))
    def check(data):
        with changed(path, data):
            survives(checkpoint.folder, out, checkpoint.config, target=make is not make_drafter)

    check()


def test_indexes(place):
    checkpoint, out = place(make_moe, 2)
    path = checkpoint.folder / INDEX

    @fuzz(30)
    @given(broken_json(path.read_bytes()))
    def check(data):
        with changed(path, data):
            survives(checkpoint.folder, out, checkpoint.config)

    check()


@pytest.fixture(scope="module")
def converted(place):
    """A quantised conversion."""
    checkpoint, out = place(make_moe)
    out = out.parent / "converted" / "out"
    assert command("--hf-path", checkpoint.folder, "--mlx-path", out, "-q")[0] == 0
    yield checkpoint, out
    shutil.rmtree(out.parent)


@pytest.mark.parametrize("name", [SINGLE, "config.json", INDEX, "checksums.json"])
def test_check(converted, name):
    """With the checksums whatever is accepted is as it was; without them nothing is raised."""
    checkpoint, out = converted
    path, sums = out / name, (out / "checksums.json").read_bytes()
    before = read_by_mlx(out, {}).weights
    mx.eval(before)

    @fuzz(20)
    @given((broken_file if name == SINGLE else broken_json)(path.read_bytes()), st.booleans())
    def check(data, summed):
        with changed(out / "checksums.json", sums if summed else b"{}"), changed(path, data):
            code, _ = command("check", out)
            if code == 0 and summed:
                assert same(read_by_mlx(out, {}).weights, before)
            command("inspect", out)
            command("check", out, "--against", checkpoint.folder)

    check()

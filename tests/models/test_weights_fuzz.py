"""Mutated model folders: one line of UserError, or the model that was meant; never a traceback, never another model.

What no reader can see is left out: values of the same type and size that were exchanged, and settings of config.json
that are as good as the ones they replace (another rope_theta).
"""

import copy
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import reference
import tiny
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mlx_gemma_mtp import generate
from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.files import hub
from mlx_gemma_mtp.models import gemma4, loading
from mlx_gemma_mtp.models.config import ASSISTANT, DrafterConfig, TargetConfig
from mlx_gemma_mtp.models.drafter import Drafter
from mlx_gemma_mtp.models.raw_config import DEFAULTS

fuzz = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],  # no shrinking: an example is a line, and shrinking takes a minute
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


S, F = "sliding_attention", "full_attention"
TEXT = [3, 5, 8, 13, 21, 34, 55, 60, 2, 7, 11, 40]  # past the window of 8
SMALL = {"hidden_size": 64, "vocab_size": 64, "num_hidden_layers": 2, "layer_types": [S, F], "intermediate_size": 64}
MOE = {"num_experts": 4, "moe_intermediate_size": 32}
# Other values of these make another model that is as good, whatever the weights are.
FREE = {"rms_norm_eps", "final_logit_softcapping", "sliding_window", "rope_parameters", "top_k_experts"}
# Without these it is the model of transformers' defaults.
OPTIONAL = {*DEFAULTS, *ASSISTANT, "rope_type", "partial_rotary_factor"}
TABLE = {"bits": 4, "group_size": 32, "mode": "affine"}


def raw_config(side: str) -> dict[str, Any]:
    """Of a MoE target of two layers, or of its drafter with centroids."""
    if side == "target":
        raw = tiny.target_dict("moe")
        raw["text_config"] |= SMALL | MOE
        return raw
    raw = tiny.drafter_dict("moe", centroids=True)
    raw["text_config"] |= SMALL | {"hidden_size": 32}
    return raw | {"backbone_hidden_size": 64, "num_centroids": 8, "centroid_intermediate_top_k": 2}


TARGET_CONFIG = TargetConfig.from_dict(raw_config("target"))


def write(folder: Path, side: str, quantized: bool) -> None:
    """A folder with random bf16 weights, whose linears of a width that fits are quantised where asked."""
    raw = raw_config(side)
    model = gemma4.build(TARGET_CONFIG) if side == "target" else Drafter(DrafterConfig.from_dict(raw, TARGET_CONFIG))
    mx.random.seed(len(side))
    fill = lambda a: a if a.dtype == mx.int32 else mx.random.normal(a.shape) / a.shape[-1] ** 0.5 + (a.ndim == 1)  # noqa: E731
    model.update(nn.utils.tree_map(fill, model.parameters()))
    if quantized:
        fits = lambda path, m: hasattr(m, "to_quantized") and m.weight.shape[-1] % 32 == 0  # noqa: E731
        nn.quantize(model, **{k: TABLE[k] for k in ("bits", "group_size")}, class_predicate=fits)
        raw["quantization"] = TABLE
    prefix = "language_model.model." if side == "target" else "model."
    tensors = {}
    for path, value in tree_flatten(model.parameters()):
        name = path.replace(".qkv.", ".").replace(".gate_up.", ".")
        own = side == "target" or name.startswith(("embed_tokens", "layers.", "norm"))
        value = value if mx.issubdtype(value.dtype, mx.integer) else value.astype(mx.bfloat16)
        tensors[prefix + name if own else name] = value
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(raw))


class Folder:
    """A model folder that is spoilt and put back: example after example."""

    def __init__(self, root: Path, side: str, quantized: bool):
        self.side, self.path = side, root / f"{side}-{'quantised' if quantized else 'bf16'}"
        write(self.path, side, quantized)
        self.config = json.loads((self.path / "config.json").read_text())
        data = (self.path / "model.safetensors").read_bytes()
        end = 8 + struct.unpack("<Q", data[:8])[0]
        self.head, self.data = data[:end], data[end:]
        self.entries = json.loads(self.head[8:])
        self.names = sorted(set(self.entries) - {"__metadata__"})
        self.meant = self.numbers()

    def put_config(self, raw: Any) -> None:
        (self.path / "config.json").write_text(json.dumps(raw))

    def put_header(self, header: bytes) -> None:
        (self.path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + self.data)

    def restore(self) -> None:
        self.put_config(self.config)
        (self.path / "model.safetensors").write_bytes(self.head + self.data)
        (self.path / "model.safetensors.index.json").unlink(missing_ok=True)

    def numbers(self) -> np.ndarray:
        """What the model in the folder computes."""
        if self.side == "target":
            return reference.forward(loading.load_target(self.path, mx.float32), TEXT)[0]
        drafter = loading.load_drafter(self.path, TARGET_CONFIG, mx.float32)
        return np.concatenate([np.array(a).reshape(-1) for a in drafts(drafter)])

    def verdict(self) -> str | None:
        """The error that the folder as it is now gives, one line; None if the model is the one that was meant."""
        try:
            numbers = self.numbers()
        except UserError as error:
            assert str(error) and len(str(error).splitlines()) == 1, repr(str(error))
            return str(error)
        finally:
            self.restore()
        assert same(numbers, self.meant), "another model was loaded without a word"
        return None


def same(numbers: np.ndarray, meant: np.ndarray) -> bool:
    return bool(np.array_equal(numbers, meant))  # a plain bool: pytest would print both


def drafts(drafter: Drafter) -> list[mx.array]:
    """Two draft steps over the K/V of a fixed random target."""
    target = target_model()
    _, cache, hidden = reference.forward(target, TEXT[:-1])
    span = reference.Span(cache, 0)
    out, token = [], mx.array([TEXT[-1]])
    for _ in range(2):
        y, hidden = drafter(target.embed(token), hidden, span, drafter.ropes.tables(span.positions))
        logits, ids = drafter.scores(y)
        order = mx.argsort(ids, axis=-1)
        out += [hidden, mx.take_along_axis(logits, order, axis=-1), mx.take_along_axis(ids, order, axis=-1)]
    return out


def target_model(made: list = []) -> gemma4.Gemma4:  # noqa: B006
    if not made:
        mx.random.seed(5)
        made.append(gemma4.build(TARGET_CONFIG))
        tiny.finish_loading(made[0])
    return made[0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Folder]:
    root = tmp_path_factory.mktemp("fuzz")
    return [Folder(root, side, quantized) for side in ("target", "drafter") for quantized in (False, True)]


FOLDER = st.integers(0, 3)
ODD = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        7,
        2**31,
        2**63,
        10**30,
        1.5,
        float("nan"),
        float("inf"),
        "",
        "x",
        "a\nb",
        [],
        [[]],
        {},
        {"a": 1},
    ]
)
DTYPES = st.sampled_from(
    ["BOOL", "U8", "I8", "F8_E4M3", "U16", "I16", "F16", "BF16", "U32", "I32", "F32", "U64", "I64", "F64", "Q4", "bf16"]
)
NAMES = st.sampled_from(
    ["", "a\nb", "../x", "/x", "\0", "é", "vision_tower.x", "model.norm.scales", "language_model.model.norm.scales"]
)


# ------------------------------------------------------------------------------------- tensor files


@fuzz
@given(FOLDER, st.integers(0, 10**6), DTYPES)
def test_another_dtype(folders, which, place, dtype):
    """Of one tensor: BF16 read as I16 has the same size and other values. So has BF16 read as F16, but a folder may
    hold both, so nobody can see it.
    """
    folder = folders[which]
    entries = copy.deepcopy(folder.entries)
    entry = entries[folder.names[place % len(folder.names)]]
    if (entry["dtype"], dtype) == ("BF16", "F16"):
        return
    entry["dtype"] = dtype
    folder.put_header(json.dumps(entries).encode())
    folder.verdict()


@fuzz
@given(FOLDER, st.integers(0, 10**6), st.integers(0, 10**6), st.data())
def test_another_entry(folders, which, place, other, data):
    """One field, one name, one entry: replaced, taken from another tensor, doubled or left out."""
    folder = folders[which]
    entries = copy.deepcopy(folder.entries)
    one, two = folder.names[place % len(folder.names)], folder.names[other % len(folder.names)]
    kind = data.draw(
        st.sampled_from(["field", "borrow", "shape", "offset", "rename", "drop", "entry", "meta", "double"])
    )
    header = None
    if kind == "field":
        entries[one][data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = data.draw(ODD)
    elif kind == "borrow":
        field = data.draw(st.sampled_from(["shape", "data_offsets"]))
        entries[one][field] = entries[two][field]
    elif kind == "shape":
        entries[one]["shape"] = data.draw(st.permutations(entries[one]["shape"]) | st.lists(ODD, max_size=3))
    elif kind == "offset":
        entries[one]["data_offsets"] = [
            n + data.draw(st.sampled_from([-64, -2, -1, 0, 1, 2, 64])) for n in entries[one]["data_offsets"]
        ]
    elif kind == "rename":
        entries[data.draw(NAMES | st.just(two))] = entries.pop(one)
    elif kind == "drop":
        del entries[one]
    elif kind == "entry":
        entries[data.draw(NAMES | st.just(one))] = data.draw(ODD)
    elif kind == "meta":
        entries["__metadata__"] = data.draw(ODD | st.dictionaries(st.text(max_size=3), ODD, max_size=2))
    else:
        whole = json.dumps(entries)
        header = f"{whole[:-1]}, {json.dumps(one)}: {json.dumps(entries[two])}}}".encode()
    folder.put_header(header or json.dumps(entries).encode())
    folder.verdict()


@fuzz
@given(FOLDER, st.integers(0, 10**6), st.sampled_from(["set", "insert", "delete", "cut"]), st.integers(0, 255))
def test_another_byte(folders, which, place, kind, byte):
    """In the length, in the header, or a file cut anywhere."""
    folder = folders[which]
    whole, at = folder.head + folder.data, place % len(folder.head)
    if kind == "cut":
        spoilt = whole[: place % len(whole)]
    else:
        spoilt = whole[:at] + bytes([byte] * (kind != "delete")) + whole[at + (kind != "insert") :]
    (folder.path / "model.safetensors").write_bytes(spoilt)
    folder.verdict()


# ------------------------------------------------------------------------------------------ indices


@pytest.fixture(scope="module")
def sharded(folders) -> Path:
    """Two shards of the target, and a file with tensors of the same names that no index may reach."""
    folder = folders[0]
    tensors = mx.load(str(folder.path / "model.safetensors"))
    shards = folder.path.parent / "sharded"
    shards.mkdir()
    for number, names in enumerate((folder.names[::2], folder.names[1::2]), 1):
        mx.save_safetensors(str(shards / f"model-{number}.safetensors"), {name: tensors[name] for name in names})
    spoilt = {name: value * 2 for name, value in tensors.items()}
    mx.save_safetensors(str(shards / "other.safetensors"), spoilt)
    mx.save_safetensors(str(shards.parent / "outside.safetensors"), spoilt)
    shutil.copy(folder.path / "config.json", shards)
    return shards


def weight_map(names: list[str]) -> dict[str, Any]:
    return {name: f"model-{1 + i % 2}.safetensors" for i, name in enumerate(names)}


def verdict_of_index(folder: Folder, shards: Path, index: Any) -> None:
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    try:
        numbers = reference.forward(loading.load_target(shards, mx.float32), TEXT)[0]
    except UserError as error:
        assert len(str(error).splitlines()) == 1, repr(str(error))
    else:
        assert same(numbers, folder.meant), "another model was loaded without a word"


FILES = st.sampled_from(
    ["", ".", "..", "../outside.safetensors", "/etc/passwd", "other.safetensors", "model-1.safetensors",
     "no.safetensors", "model-2.safetensors\0", "config.json", "a\nb", "./model-1.safetensors", "model-1.safetensors/"]
)  # fmt: skip


def test_a_whole_index_loads(folders, sharded):
    verdict_of_index(folders[0], sharded, {"metadata": {}, "weight_map": weight_map(folders[0].names)})


@fuzz
@given(st.integers(0, 10**6), FILES | ODD, st.booleans())
def test_another_place_in_the_index(folders, sharded, place, file, also_absolute):
    names = folders[0].names
    entries = weight_map(names)
    entries[names[place % len(names)]] = str(sharded / "model-1.safetensors") if also_absolute and file == "." else file
    verdict_of_index(folders[0], sharded, {"metadata": {}, "weight_map": entries})


@fuzz
@given(
    ODD | st.dictionaries(st.sampled_from(["metadata", "weight_map"]), ODD | st.dictionaries(NAMES, FILES, max_size=2))
)
def test_another_index(folders, sharded, index):
    verdict_of_index(folders[0], sharded, index)


def test_a_tensor_in_two_shards(folders, sharded):
    """The index says which; it is not the last file that wins."""
    entries = weight_map(folders[0].names)
    entries["vision_tower.x"] = "other.safetensors"
    verdict_of_index(folders[0], sharded, {"metadata": {}, "weight_map": entries})


# ------------------------------------------------------------------------------------------ configs


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Every place in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [p for key, item in inner for p in places(item, (*path, key))]


def replaced(value: Any, path: tuple, change: Callable[[Any, Any], None]) -> Any:
    value = copy.deepcopy(value)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    change(inner, path[-1])
    return value


@fuzz
@given(FOLDER, st.integers(0, 10**6), st.booleans(), ODD)
def test_another_setting(folders, which, place, drop, value):
    folder = folders[which]
    path = places(folder.config)[place % len(places(folder.config))]
    free = path[-1] in OPTIONAL if drop else FREE & set(path)
    change = (lambda inner, key: inner.pop(key)) if drop else (lambda inner, key: inner.__setitem__(key, value))
    folder.put_config(replaced(folder.config, path, change))
    if not free:
        folder.verdict()
        return
    try:
        assert np.isfinite(folder.numbers()).all(), f"{path} = {value!r} loads and computes NaN"
    except UserError as error:
        assert len(str(error).splitlines()) == 1
    finally:
        folder.restore()


@fuzz
@given(FOLDER, ODD | st.binary(max_size=8) | st.sampled_from(["[", '{"a":']), st.sampled_from([1, 100_000]))
def test_another_config(folders, which, value, times):
    """Anything but an object with the right keys; nested deeply, too."""
    folder = folders[which]
    text = value if isinstance(value, bytes) else (value if isinstance(value, str) else json.dumps(value)).encode()
    (folder.path / "config.json").write_bytes(text * times)
    assert folder.verdict()


OVERRIDE = st.fixed_dictionaries(
    {}, optional={"bits": st.sampled_from([2, 3, 4, 8]) | ODD, "group_size": st.sampled_from([16, 32, 64]) | ODD,
                  "mode": st.sampled_from(["affine", "mxfp4", "mxfp8", "nvfp4"]) | ODD, "else": ODD},
)  # fmt: skip


@fuzz
@given(st.sampled_from([1, 3]), st.integers(0, 10**6), st.booleans(), OVERRIDE | ODD | st.just(False))
def test_another_quantisation(folders, which, place, everywhere, table):
    """The table's defaults, and overrides of paths, right or wrong ones."""
    folder = folders[which]
    modules = [name.removesuffix(".weight") for name in folder.names if name.endswith(".weight")]
    path = [*modules, "nowhere", "model.norm", ""][place % (len(modules) + 3)]
    default = TABLE | table if isinstance(table, dict) else table
    whole = default if everywhere else TABLE | {path: table}
    folder.put_config(folder.config | {"quantization": whole})
    folder.verdict()


# ------------------------------------------------------------------------------- the command line


def in_json(file: str, path: tuple, value: Any) -> Callable[[Path], None]:
    """Spoils one place of a JSON file."""

    def spoil(folder: Path) -> None:
        raw = json.loads((folder / file).read_text())
        changed = replaced(raw, path, lambda inner, key: inner.__setitem__(key, value))
        (folder / file).write_text(json.dumps(changed))

    return spoil


def in_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Spoils the weight file."""

    def spoil(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return spoil


def put_defaults(folder: Path, **changes: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "eos_token_id": [1]} | changes))


INDEX = "model.safetensors.index.json"
ROPE = ("text_config", "rope_parameters", "full_attention")
SPOILT = {
    "a dtype": in_bytes(lambda data: data.replace(b'"BF16"', b'"I16" ', 1)),
    "all dtypes but one": in_bytes(lambda data: data.replace(b'"BF16"', b'"I16" ', 10)),
    "a length": in_bytes(lambda data: b"\xff" * 8 + data[8:]),
    "a name": in_bytes(lambda data: data.replace(b"q_norm", b"\\u000a\xc3\xa9", 1)),
    "a cut": in_bytes(lambda data: data[:-1]),
    "an index without a map": in_json(INDEX, ("weight_map",), []),
    "an index outside": in_json(INDEX, ("weight_map", "model.norm.weight"), "../x.safetensors"),
    "an index of numbers": in_json(INDEX, ("weight_map", "model.norm.weight"), 5),
    "a setting": in_json("config.json", ("text_config", "hidden_size"), 10**30),
    "a rotary share": in_json("config.json", (*ROPE, "partial_rotary_factor"), 7),
    "a rotary base": in_json("config.json", (*ROPE, "rope_theta"), 10**400),
    "a bit width": in_json("config.json", ("quantization",), {"bits": 7, "group_size": 64}),
    "nesting": lambda folder: (folder / "config.json").write_text("[" * 100_000),
}
DEFAULTS = {
    "a temperature": lambda folder: put_defaults(folder, temperature="hot"),
    "a top_k": lambda folder: put_defaults(folder, top_k=[64]),
}
CASES = [("drafter", case) for case in SPOILT] + [("target", case) for case in DEFAULTS]


@pytest.mark.parametrize("side, case", CASES)
def test_the_command_line(tmp_path, capsys, side, case):
    """Exit code 2 and one line, whatever was spoilt."""
    shutil.copytree(hub.DEMO / side, tmp_path / side)
    (SPOILT | DEFAULTS)[case](tmp_path / side)
    model = tmp_path / side if side == "target" else hub.DEMO / "target"
    draft_model = hub.DEMO / "drafter" if side == "target" else tmp_path / side
    argv = ["--prompt", "x", "--max-tokens", "1", "--model", model, "--draft-model", draft_model]
    code = generate.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("note:")]
    assert code == 2 and not out and len(lines) == 1 and lines[0].startswith("error: "), err

"""LoRA adapters, fused while converting: weight + scale * (up @ down), in float32, rows at a time.

mlx-lm's folders hold adapters.safetensors, with `lora_a` and `lora_b` of each module, PEFT's adapter_model.safetensors,
with `lora_A.weight` and `lora_B.weight`; both have adapter_config.json. R rows, C columns, E experts of a matrix, r the
adapter's rank. What an adapter holds for parts that a conversion leaves out is left out, too.
"""

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_gemma_mtp.errors import UserError, clipped, shown
from mlx_gemma_mtp.files.foreign import ADAPTER
from mlx_gemma_mtp.files.safetensors import Tensor, read_header, read_object
from mlx_gemma_mtp.models.contents import MEDIA
from mlx_gemma_mtp.models.quantization import plain

from .blocks import DTYPES, read, row_count
from .names import Entry

MLX_FILE, PEFT_FILE = "adapters.safetensors", "adapter_model.safetensors"
FILES = (ADAPTER, MLX_FILE, PEFT_FILE)
ROOT = "base_model.model."
TENSOR = re.compile(
    r"(?P<path>.+?)(?:\.lora_(?P<mlx>[ab])|\.lora_(?P<peft>embedding_[AB]|[AB])(?:\.default)?(?:\.weight)?)"
)
EXPERTS = re.compile(r"(?P<experts>layers\.\d+\.experts)(\.base_layer)?")
PARAMETERS = (("switch_glu.gate_proj", "switch_glu.up_proj"), ("switch_glu.down_proj",))  # gate_up_proj, down_proj
FACTORS = {"a": "a", "b": "b", "A": "a", "B": "b", "embedding_A": "a", "embedding_B": "b"}
# Settings of PEFT that change what an adapter computes, and their values that do not.
INNOCENT = {
    "use_dora": (False, None), "use_qalora": (False, None), "use_bdlora": (False, None), "lora_bias": (False, None),
    "layer_replication": (None, []), "alora_invocation_tokens": (None, []), "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}), "kasa_config": (None,), "arrow_config": (None,),
    "monteclora_config": (None,), "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """How the two factors of a matrix are stored.

    a, b: the shapes of both tensors; -n stands for n times the rank. read: both -> (down [planes, r, C], up [planes, R,
    r]).
    """

    a: tuple[int, ...]
    b: tuple[int, ...]
    read: Callable[[mx.array, mx.array], tuple[mx.array, mx.array]]

    def rank(self, a: Tensor, b: Tensor) -> int | None:
        """Returns the rank of two tensors; None where they have other shapes or types."""
        if len(a.shape) != len(self.a) or len(b.shape) != len(self.b) or {a.dtype, b.dtype} - set(DTYPES.values()):
            return None
        pairs = [*zip(self.a, a.shape, strict=True), *zip(self.b, b.shape, strict=True)]
        ranks = {size // -wanted if size % -wanted == 0 else 0 for wanted, size in pairs if wanted < 0}
        fits = all(wanted == size for wanted, size in pairs if wanted >= 0)
        return ranks.pop() or None if fits and len(ranks) == 1 else None

    def __str__(self) -> str:
        texts = [
            "[" + ", ".join("rank" if n == -1 else f"{-n} x rank" if n < 0 else str(n) for n in shape) + "]"
            for shape in (self.a, self.b)
        ]
        return " and ".join(texts)


@dataclass(frozen=True)
class Pair:
    """The two tensors of one module; kind: 'mlx', 'peft' or 'embedding'; module: its path as the file has it."""

    module: str
    kind: str
    a: Tensor
    b: Tensor
    name: str


@dataclass(frozen=True)
class Delta:
    """What an adapter adds to a written matrix.

    high: the matrix's rows in each plane; first: the row of the adapted parameter that they begin at, for half of one.
    """

    pair: Pair
    layout: Layout
    scale: float
    high: int
    first: int = 0

    def rows(self, start: int, stop: int) -> mx.array:
        """Returns what is added to the rows start:stop of the matrix seen as [all leading axes, columns]."""
        down, up = _factors(self.pair, self.layout.read)
        found = []
        while start < stop:
            plane, row = divmod(start, self.high)
            count = min(stop - start, self.high - row)
            found.append(up[plane, self.first + row : self.first + row + count] @ down[plane])
            start += count
        return self.scale * mx.concatenate(found)


@dataclass(frozen=True)
class Adapter:
    """An adapter folder whose config and header were read.

    pairs: path of a module, without prefixes -> its tensors; scales: (module, rank) -> scale.
    """

    folder: Path
    base: str
    pairs: dict[str, Pair]
    scales: Callable[[str, int], float]

    def deltas(self, entries: list[Entry], unused: set[str]) -> tuple[dict[str, Delta], int]:
        """Returns (written name -> what is added to it, how many modules are left out).

        unused: paths of modules that the model has no use for: K/V of layers that read another layer's. They are left
        out, as are the towers of vision and audio. Raises UserError, naming the tensor, where one finds no matrix,
        or one of another shape.
        """
        matrices = {path_of(entry.name): entry for entry in entries if len(entry.shape) >= 2}
        found: dict[str, Delta] = {}
        left_out = 0
        for path, pair in self.pairs.items():
            if path in unused or path.startswith(MEDIA):
                left_out += 1
            elif path in matrices:
                found |= self._of_matrix(path, pair, matrices[path])
            elif pair.kind == "peft" and (experts := EXPERTS.fullmatch(path)):
                for name, delta in self._of_experts(pair, experts["experts"], entries).items():
                    if name in found:
                        raise self._refused(pair, f"is a second adapter of {name}; expected one")
                    found[name] = delta
            else:
                raise self._refused(pair, f"finds no matrix {path!r} in the model; expected an adapter of it")
        if not found:
            raise UserError(f"{self.folder}: nothing of this adapter is for the text model; leave out --adapter-path")
        return found, left_out

    def _of_matrix(self, path: str, pair: Pair, entry: Entry) -> dict[str, Delta]:
        """What is added to a matrix that is written as it is named."""
        if pair.kind != "mlx" and path == "embed_tokens":
            raise self._refused(pair, "is for looking tokens up, but the table is the output head too; expected none")
        return self._deltas(pair, _layouts(path, pair.kind, entry), [entry])

    def _of_experts(self, pair: Pair, experts: str, entries: list[Entry]) -> dict[str, Delta]:
        """PEFT's adapter of a parameter that holds all experts. Its name does not tell which: the shapes do."""
        parts = {path_of(e.name).removeprefix(f"{experts}."): e for e in entries if f".{experts}." in f".{e.name}"}
        wholes = [[parts[name] for name in names if name in parts] for names in PARAMETERS]
        fits, known = [], []
        for whole in filter(None, wholes):
            layouts = _of_parameter(whole)
            known += layouts
            fits += [(layout, whole) for layout in layouts if layout.rank(pair.a, pair.b)]
        if len(fits) > 1:
            raise self._refused(pair, f"fits more than one parameter of {experts}; expected one of other shapes")
        if not fits:
            return self._deltas(pair, known, [])
        layout, whole = fits[0]
        first, found = 0, {}
        for entry in whole:
            (delta,) = self._deltas(pair, [layout], [entry]).values()
            found[entry.name] = replace(delta, first=first)
            first += entry.shape[-2]
        return found

    def _deltas(self, pair: Pair, layouts: list[Layout], entries: list[Entry]) -> dict[str, Delta]:
        """What a pair, stored in one of the layouts, adds to the entries, which share a source.

        Raises UserError where its shapes are others.
        """
        layout = next((each for each in layouts if each.rank(pair.a, pair.b)), None)
        if layout is None:
            shapes = " and ".join(f"{tensor.dtype} {list(tensor.shape)}" for tensor in (pair.a, pair.b))
            wanted = " or ".join(dict.fromkeys(map(str, layouts)))
            raise self._refused(pair, f"and its counterpart are {shapes}; expected floats of {wanted} by the model")
        scale = self.scales(pair.module, layout.rank(pair.a, pair.b))
        return {entry.name: Delta(pair, layout, scale, entry.shape[-2]) for entry in entries}

    def _refused(self, pair: Pair, says: str) -> UserError:
        return UserError(
            f"{self.folder}: tensor {clipped(pair.name)!r} {says}; give the base that the adapter was made for"
            f"{self.base}"
        )


def path_of(name: str) -> str:
    """Returns a module's path without the prefixes by which the published, the MLX and PEFT's layout differ."""
    return plain(name.removeprefix(ROOT)).removesuffix(".weight")


def find(adapter_path: str) -> Path:
    """Returns the folder of an adapter: as it is, or that of a hub id, downloaded. Raises UserError."""
    folder = Path(adapter_path).expanduser()
    if folder.is_dir():
        return folder
    from mlx_gemma_mtp.files import hub  # as in source.find

    if os.path.lexists(folder) or not hub.is_hub_id(adapter_path):
        raise UserError(
            f"--adapter-path {shown(adapter_path, 300)} is no folder; expected one with {ADAPTER}, or a hub id"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(adapter_path, allow_patterns=list(FILES)))
    except Exception as error:  # as in source.remote
        raise hub.refusal(adapter_path, error) from error


def read_adapter(adapter_path: str) -> Adapter:
    """Returns the adapter in a folder or a hub repository. Raises UserError for what is not fused, by name."""
    folder = find(adapter_path)
    if not os.path.lexists(folder / ADAPTER):
        raise UserError(f"{folder} has no {ADAPTER}; expected a folder of mlx-lm's or PEFT's; download it again")
    config = read_object(folder / ADAPTER)
    peft = "peft_type" in config
    file = folder / (PEFT_FILE if peft else MLX_FILE)
    scales = _peft_scales(folder, config) if peft else _mlx_scale(folder, config)
    if not file.is_file():
        raise UserError(
            f"{folder} has no {file.name}; expected the adapter in safetensors (pickles are never loaded); download it "
            "again, or save it again as safetensors"
        )
    base = config.get("base_model_name_or_path" if peft else "model")
    return Adapter(folder, f", {shown(base, 200)}" if base else "", _pairs(folder, read_header(file)), scales)


def _pairs(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Pair]:
    """Path -> its two tensors. Raises UserError for a tensor that is no factor, or has no counterpart."""
    held: dict[tuple[str, str, str], dict[str, str]] = {}
    for name in tensors:
        found = TENSOR.fullmatch(name)
        if found is None:
            raise UserError(f"{folder}: tensor {clipped(name)!r} is {_other(name)}; expected LoRA's factors alone")
        key = found["mlx"] or found["peft"]
        kind = "mlx" if found["mlx"] else "embedding" if "embedding" in key else "peft"
        held.setdefault((path_of(found["path"]), found["path"], kind), {})[FACTORS[key]] = name
    pairs: dict[str, Pair] = {}
    for (path, module, kind), names in held.items():
        name = next(iter(names.values()))
        if len(names) < 2 or path in pairs:
            says = "has no counterpart" if len(names) < 2 else f"is a second adapter of {path}"
            raise UserError(
                f"{folder}: tensor {clipped(name)!r} {says}; expected two for each matrix; download it again"
            )
        module = module.removeprefix(ROOT)
        pairs[path] = Pair(module, kind, tensors[names["a"]], tensors[names["b"]], name)
    if not pairs:
        raise UserError(f"{folder}: the adapter has no tensors; expected LoRA's factors; download it again")
    return pairs


def _other(name: str) -> str:
    """What a tensor of an adapter is that is no factor."""
    if name.endswith(".m") or "lora_magnitude_vector" in name:
        return "a magnitude of DoRA, which is not fused"
    if "lora_" in name:
        return "of a kind that is not fused"
    return "a trained weight itself (modules_to_save, full fine-tuning), which is not fused"


def _mlx_scale(folder: Path, config: dict[str, Any]) -> Callable[[str, int], float]:
    """mlx-lm's: one scale for all modules."""
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise UserError(f"{folder}: fine_tune_type is {shown(kind)}; expected 'lora', which alone is fused")
    parameters = config.get("lora_parameters")
    scale = _number(folder, "lora_parameters.scale", parameters.get("scale") if isinstance(parameters, dict) else None)
    return lambda module, rank: scale


def _peft_scales(folder: Path, config: dict[str, Any]) -> Callable[[str, int], float]:
    """PEFT's: lora_alpha / r, or / sqrt(r), with patterns for modules that have their own."""
    if config["peft_type"] != "LORA":
        raise UserError(f"{folder}: peft_type is {shown(config['peft_type'])}; expected 'LORA', which alone is fused")
    for key, values in INNOCENT.items():
        value = config.get(key)
        if not any(value is each or (type(value) is type(each) and value == each) for each in values):
            raise UserError(f"{folder}: {key} is {shown(value)} in {ADAPTER}, which is not fused; merge it with PEFT")
    patterns = [config.get(key) or {} for key in ("rank_pattern", "alpha_pattern")]
    if not all(isinstance(pattern, dict) for pattern in patterns):
        raise UserError(f"{folder}: {shown(patterns)} in {ADAPTER}; expected rank_pattern and alpha_pattern as objects")

    def scale(module: str, rank: int) -> float:
        told = _number(folder, "r", _matching(folder, patterns[0], module, config.get("r")))
        if told != rank:
            raise UserError(f"{folder}: r is {told:g} for {module} in {ADAPTER}, but its tensors have rank {rank}")
        alpha = _number(folder, "lora_alpha", _matching(folder, patterns[1], module, config.get("lora_alpha")))
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    return scale


def _matching(folder: Path, pattern: dict[str, Any], module: str, default: object) -> object:
    """The value for a module: that of the first key that is the end of its path, as an expression, or the default."""
    try:
        return next((value for key, value in pattern.items() if re.fullmatch(rf"(.*\.)?({key})", module)), default)
    except re.error as error:
        raise UserError(f"{folder}: {shown(list(pattern))} in {ADAPTER} are no expressions ({error})") from None


def _number(folder: Path, key: str, value: object) -> float:
    if type(value) not in (int, float) or not 0 < abs(value) < 1e6:
        raise UserError(
            f"{folder}: {key} is {shown(value)} in {ADAPTER}; expected a number other than 0; download it again"
        )
    return float(value)


def _layouts(path: str, kind: str, entry: Entry) -> list[Layout]:
    """How a module's factors may be stored, by who wrote them and what the module is."""
    *experts, rows, columns = entry.shape
    if experts and kind == "mlx":  # mlx-lm's, and mlx-vlm's
        count, up, switch = experts[0], (*experts, rows, -1), partial(_switch, experts[0])
        return [Layout((count, -1, columns), up, switch), Layout((-count, columns), up, switch)]
    if kind == "mlx" and path.startswith("embed_tokens"):
        return [Layout((rows, -1), (-1, columns), lambda a, b: (b[None], a[None]))]
    if kind == "mlx":
        return [Layout((columns, -1), (-1, rows), lambda a, b: (a.T[None], b.T[None]))]
    if kind == "embedding":
        return [Layout((-1, rows), (columns, -1), lambda a, b: (b.T[None], a.T[None]))]
    return [
        Layout((-1, columns), (*experts, rows, -1), lambda a, b: (a[None], b[None]))
    ]  # of experts: nobody writes it


def _of_parameter(whole: list[Entry]) -> list[Layout]:
    """PEFT's layouts of a parameter of all experts, which is written as `whole`, one above the other.

    Versions differ in which axis they take for the input.
    """
    experts, _, columns = whole[0].shape
    rows = sum(entry.shape[-2] for entry in whole)
    return [
        Layout((-experts, columns), (rows, -experts), partial(_ranks, experts)),
        Layout((-experts, rows), (columns, -experts), partial(_ranks_turned, experts)),
    ]


def _switch(experts: int, a: mx.array, b: mx.array) -> tuple[mx.array, mx.array]:
    """[E, r, C] or [E * r, C], [E, R, r]."""
    return a.reshape(experts, -1, a.shape[-1]), b


def _ranks(experts: int, a: mx.array, b: mx.array) -> tuple[mx.array, mx.array]:
    """[E * r, C], [R, r * E]: the ranks of an expert lie together in a, and E apart in b."""
    return a.reshape(experts, -1, a.shape[-1]), b.reshape(b.shape[0], -1, experts).transpose(2, 0, 1)


def _ranks_turned(experts: int, a: mx.array, b: mx.array) -> tuple[mx.array, mx.array]:
    """[E * r, R], [C, r * E]."""
    into, out = _ranks(experts, a, b)
    return out.swapaxes(1, 2), into.swapaxes(1, 2)


@lru_cache(maxsize=2)  # halves of a fused matrix follow each other
def _factors(pair: Pair, read_pair: Callable) -> tuple[mx.array, mx.array]:
    """(down, up) of a module in float32."""
    stored = [
        read(tensor, 0, row_count(tensor.shape)).reshape(tensor.shape).astype(mx.float32) for tensor in (pair.a, pair.b)
    ]
    down, up = read_pair(*stored)
    mx.eval(down, up)
    return down, up

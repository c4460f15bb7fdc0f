"""Models of other programs: which format a config, a file's name or its first bytes show, and what to do instead.

Formats are told by kind: by `quant_method` and its relatives in config.json, by files that lie where weights should
be, by adapters without a model. Nothing here reads weights.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import UserError, clipped, shown
from .safetensors import PICKLES, Tensor, read_object

ADAPTER = "adapter_config.json"
ADAPTERS = ("adapters.safetensors", "adapter_model.safetensors", "adapter_model.bin", "adapters.npz")
MODELOPT = "hf_quant_config.json"
TABLES = ("quantization_config", "compression_config")
MOST_FILES = 2000  # of a folder, that are looked at
MLX_METHODS = ("mlx", "affine", "mxfp4", "mxfp8", "nvfp4")  # a quant_method beside MLX's bits and group_size
MLX_PREFIX = "language_model.model."
FLOATS = ("BF16", "F16", "F32", "F64")

# quant_method, with - for _ -> what people call it
METHODS = {
    "aqlm": "AQLM", "auto-round": "AutoRound", "awq": "AWQ", "awq-marlin": "AWQ", "bitnet": "BitNet",
    "bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed-tensors", "deepspeedfp": "DeepSpeed FP",
    "eetq": "EETQ", "exl2": "EXL2 (ExLlama)", "exl3": "EXL3 (ExLlama)", "experts-int8": "INT8",
    "fbgemm-fp8": "FP8 (FBGEMM)", "fouroversix": "Four Over Six", "fp-quant": "FP-Quant", "fp8": "FP8",
    "gemma": "Gemma mobile (packed integers of transformers)", "gguf": "GGUF (llama.cpp)", "gptq": "GPTQ",
    "gptq-marlin": "GPTQ", "gptqmodel": "GPTQ", "higgs": "HIGGS", "hqq": "HQQ", "inc": "AutoRound", "ipex": "IPEX",
    "marlin": "Marlin", "metal": "transformers' Metal", "modelopt": "NVIDIA ModelOpt", "modelopt-fp4":
    "NVIDIA ModelOpt NVFP4", "moe-wna16": "WNA16", "mxfp4": "MXFP4", "mxfp8": "MXFP8", "nvfp4": "NVFP4",
    "ptpc-fp8": "FP8", "quanto": "quanto", "quark": "AMD Quark", "rtn": "RTN", "sinq": "SINQ", "spqr": "SpQR",
    "squeezellm": "SqueezeLLM", "torchao": "torchao", "tpu-int8": "INT8", "vptq": "VPTQ",
}  # fmt: skip
ALIASES = {
    "autoround": "auto-round", "intel/auto-round": "auto-round", "autoawq": "awq", "bnb": "bitsandbytes",
    "optimum-quanto": "quanto", "sparseml": "compressed-tensors", "finegrained-fp8": "fp8", "fine-grained-fp8": "fp8",
}  # fmt: skip
# Keys of a table without a quant_method -> the method that writes them.
KEYS = {
    "config_groups": "compressed-tensors", "load_in_4bit": "bitsandbytes", "load_in_8bit": "bitsandbytes",
    "quant_algo": "modelopt", "weight_block_size": "fp8", "desc_act": "gptq", "w_bit": "awq", "nbits": "hqq",
}  # fmt: skip
# Ends of tensors' names -> the method; of those that several methods have, the plainer one.
TENSORS = {
    ".weight_packed": "compressed-tensors", ".weight_scale_inv": "fp8", ".weight_scale_2": "modelopt",
    ".weight.absmax": "bitsandbytes", ".weight.quant_map": "bitsandbytes", ".SCB": "bitsandbytes", ".g_idx": "gptq",
    ".qweight": "awq", ".q_weight": "exl2", ".trellis": "exl3", ".W_q": "hqq", ".weight._data": "quanto",
    ".weight_scale": "compressed-tensors",
}  # fmt: skip
# Patterns of files where weights should be -> what they are of; the first that fits.
CONTAINERS = {
    "*.gguf": "GGUF (llama.cpp)", "*.ggml": "GGML (llama.cpp)", "*.litertlm": "LiteRT-LM",
    "*.task": "LiteRT (MediaPipe)", "*.tflite": "LiteRT (TensorFlow Lite)", "*.mlpackage": "a Core ML package",
    "*.mlmodelc": "a Core ML package", "*.mlmodel": "a Core ML model", "mlc-chat-config.json": "MLC-LLM",
    "params_shard_*.bin": "MLC-LLM", "ndarray-cache.json": "MLC-LLM", "tensor-cache.json": "MLC-LLM",
    "*.onnx": "ONNX", "*.onnx_data": "ONNX", "openvino_*.xml": "OpenVINO", "*.engine": "TensorRT",
    "*.sbs": "gemma.cpp", "*.nemo": "NeMo", "*.keras": "Keras", "*.h5": "Keras", "*.msgpack": "Flax",
    "manifest.ocdbt": "Orbax (JAX)", "_metadata": "Orbax (JAX)", "*.npz": "NumPy arrays",
    "quanto_qmap.json": "quanto", "qmodel.pt": "HQQ", "sha256-*": "a blob of Ollama", "sha256:*": "a blob of Ollama",
}  # fmt: skip
MAGIC = {
    b"GGUF": "GGUF (llama.cpp)", b"ggjt": "GGML (llama.cpp)", b"tjgg": "GGML (llama.cpp)", b"LITERTLM": "LiteRT-LM",
    b"\x89HDF": "Keras",
}  # fmt: skip
NOT_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt")

ORIGINAL = re.compile(
    r"(?:.*/)?gemma-4-(?P<size>e2b|e4b|12b|26b-a4b|31b)(?P<it>-it)?(?P<qat>-qat)?"
    r"(?:[-_.](?:awq|gptq|gptqmodel|nvfp4|mxfp[48]|fp[48]|int[248]|[2-8]bits?|w[48]a\d+|w4a16|q\d(?:_[0-9ksml]+)*|ct|bnb"
    r"|gguf|unsloth|dynamic|block|static|autoround|auto|round|quantized|unquantized|quanto|hqq|torchao|exl[23]|mlc|onnx"
    r"|web|litert|litertlm|lm|task|mlx|bf16|f16|fp16|ud|g\d+|gs\d+|modelopt|ollama|sym|asym|bpw|\d+bpw|preview))*",
    re.I,
)
SIZES = {size.lower(): size for size in ("E2B", "E4B", "12B", "26B-A4B", "31B")}


@dataclass(frozen=True)
class Plain:
    """A layout of quantised weights that `convert` makes floats of.

    bits, group_sizes: what packed integers may have; block: the rows and columns that share a scale where its shape
    does not tell.
    """

    bits: tuple[int, ...] = ()
    group_sizes: tuple[int, ...] = ()
    block: tuple[int, int] = (128, 128)


@dataclass(frozen=True)
class Foreign:
    """A format that is not read as it is.

    name: what people call it; sign: what shows it, and why it is not plain; plain: its layout, where convert
    dequantises it.
    """

    name: str
    sign: str
    plain: Plain | None = None

    def refusal(self, where: Path | str, converting: bool = False) -> UserError:
        """Returns the error for weights in this format: what they are, and the command that makes a model of them.

        converting: convert itself refuses, so it is not what helps.
        """
        says = f"{where} holds {self.name} weights ({self.sign})"
        if self.plain and not converting:
            command = convert_folder_command(where, "-4bit", "-q")
            return UserError(
                f"{says}; expected MLX's own quantisation; convert dequantises them: {command}; better, if it can be "
                f"had: convert the unquantised original{_named(where)}"
            )
        return UserError(f"{says}; expected bfloat16, float16 or float32; {_from_original(where)}")


def convert_command(source: Path | str, out: Path | str, *flags: str) -> str:
    """Returns the command that converts `source` to a folder `out`, quoted for a shell. flags: further words of it."""
    return shlex.join(["mlx-gemma-mtp", "convert", *_flag("--hf-path", source), *_flag("--mlx-path", out), *flags])


def convert_folder_command(where: Path | str, end: str, *flags: str) -> str:
    """Returns the command that converts a folder, or what it is on the hub, beside where it is run. end: of the name
    that is made; flags: further words of the command.
    """
    return convert_command(_called(where), f"{_stem(where)}{end}", *flags)


def _flag(name: str, value: Path | str) -> list[str]:
    """A flag and its value; in one word where the value would be taken for another flag."""
    return [f"{name}={value}"] if str(value).startswith("-") else [name, str(value)]


def of_config(config: dict[str, Any]) -> Foreign | None:
    """Returns the format that config.json tells of; None for MLX's own, for none, and for another model's config."""
    kind = config.get("model_type")
    if isinstance(kind, str) and not kind.startswith("gemma4"):
        return None  # which is what there is to say about it
    if isinstance(table := config.get("quantization"), dict) and table:
        if is_mlx(table):
            return None
        return _of_table("quantization", table) if "quant_method" in table or "quant_algo" in table else None
    text = config.get("text_config")
    for place in (config, text if isinstance(text, dict) else {}):
        for key in TABLES:
            if place.get(key):
                return _of_table(key, place[key])
    return None


def without_table(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a config without what `of_config` goes by."""
    kept = {key: value for key, value in config.items() if key not in TABLES}
    if isinstance(text := kept.get("text_config"), dict):
        kept["text_config"] = {key: value for key, value in text.items() if key not in TABLES}
    return kept


def of_folder(folder: Path, config: dict[str, Any] | None) -> Foreign | None:
    """Returns the format of the weights in a folder, by its config.json (None: it has none) and its files' names."""
    if config and (found := of_config(config)):
        return found
    if config and not config.get("quantization") and (table := _modelopt(folder)):
        return _of_table(MODELOPT, table)
    return None


def is_mlx(table: object) -> bool:
    """Returns whether a table of config.json is one of MLX's quantisation."""
    if not isinstance(table, dict) or not {"bits", "group_size"} <= table.keys():
        return False
    method = table.get("quant_method")
    return method in MLX_METHODS or (method is None and not KEYS.keys() & table.keys())


def are_mlx_floats(tensors: Mapping[str, Tensor]) -> bool:
    """Returns whether tensors are floats under MLX's names, whatever config.json says: a conversion of a model that
    others quantised may keep its table, and no other program writes these names.
    """
    named = any(name.startswith(MLX_PREFIX) for name in tensors)
    return named and of_tensors(tensors) is None and all(t.dtype in FLOATS for t in tensors.values())


def of_tensors(names: Iterable[str]) -> Foreign | None:
    """Returns the format that tensors' names show, for a config that says nothing."""
    ends = {end: name for name in names for end in TENSORS if name.endswith(end)}
    end = next((end for end in TENSORS if end in ends), None)
    if end is None:
        return None
    return Foreign(METHODS[TENSORS[end]], f"tensor {clipped(ends[end])!r}, of which config.json says nothing")


def check_files(folder: Path) -> None:
    """Raises UserError where other files than weights of safetensors tell what a folder is."""
    if error := of_names(list(_files(folder)), folder):
        raise error


def of_names(names: list[str], where: Path | str) -> UserError | None:
    """Returns the error for files that make no model in safetensors, but an adapter or another program's model.

    names: of the files of a folder or a repository, relative to it; where: its place, or its name on the hub.
    """
    top = {name for name in names if "/" not in name}
    if any(name.endswith(".safetensors") and name not in ADAPTERS for name in top):
        return None
    if ADAPTER in top or top & set(ADAPTERS):
        return _adapter(where, top)
    if {"blobs", "manifests"} <= {name.split("/")[0] for name in names}:
        return _container(where, "Ollama's store of models", "blobs")
    for pattern, name in CONTAINERS.items():
        for each in names:
            if fnmatch(each.rpartition("/")[2].lower(), pattern):
                return _container(where, name, each)
    pickles = [name for name in names if name.endswith(PICKLES) and name.rpartition("/")[2] not in NOT_WEIGHTS]
    return _pickle(where, f"has no weights in safetensors, but {clipped(pickles[0])}") if pickles else None


def file_refusal(path: Path) -> UserError:
    """Returns the error for a file where a model folder was expected: what it is of, and what to do."""
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError:
        head = b""
    magic = next((name for start, name in MAGIC.items() if head.startswith(start)), None)
    magic = magic or ("LiteRT (TensorFlow Lite)" if head[4:8] == b"TFL3" else None)
    name = next((name for pattern, name in CONTAINERS.items() if fnmatch(path.name.lower(), pattern)), None)
    if name or magic:
        names = dict.fromkeys(each for each in (name, magic) if each)
        return UserError(
            f"{path} is a file: {', '.join(names)}; expected a model folder (with config.json) of safetensors; "
            f"{_from_original(path.with_suffix(''))}"
        )
    folder = path.parent
    if path.name.endswith((".safetensors", ".json")) and (folder / "config.json").is_file():
        return UserError(f"{path} is a file; expected a model folder: give its folder, {shlex.quote(str(folder))}")
    if path.name in ADAPTERS or path.name == ADAPTER:
        return _adapter(folder, set(_files(folder)))
    if path.name.endswith(PICKLES):
        return _pickle(path, "is a file")
    return UserError(f"{path} is a file; expected a model folder (with config.json) or a hub id such as org/name")


def of_name(model: str) -> str:
    """Returns what a name that is none of the hub's tells of, as the end of a sentence; '' for nothing."""
    if re.fullmatch(r"[\w./-]+:[\w.-]+", model):
        return "; names with a colon are Ollama's, whose GGUF is not read: name a folder or a repository of safetensors"
    return ""


def _container(where: Path | str, name: str, file: str) -> UserError:
    return UserError(
        f"{where} has no weights in safetensors, but {clipped(file)!r}: {name}; expected a folder of safetensors; "
        f"{_from_original(where)}"
    )


def _pickle(where: Path | str, says: str) -> UserError:
    return UserError(
        f"{where} {says}: pickles are never loaded (that runs the code in them); expected safetensors; download those, "
        "or save the model again with transformers (save_pretrained)"
    )


def _adapter(where: Path | str, names: set[str]) -> UserError:
    """The error for an adapter where a model was expected: the command that fuses it into its base."""
    config: dict[str, Any] = {}
    if isinstance(where, Path) and os.path.lexists(where / ADAPTER):
        config = read_object(where / ADAPTER)
    peft = "peft_type" in config or not names & {"adapters.safetensors", "adapters.npz"}
    kind = _kind_of_adapter(config, peft)
    base = config.get("base_model_name_or_path" if peft else "model")
    base = (original(base) or base) if isinstance(base, str) and base else "BASE"
    says = f"{where} is a {kind} adapter ({'PEFT' if peft else 'mlx-lm'}), no model"
    if kind != "LoRA":
        return UserError(
            f"{says}; expected a model or a LoRA adapter; merge it into {base} with {'PEFT' if peft else 'mlx-lm'}, "
            "save that, and convert it"
        )
    command = convert_command(base, f"{_stem(where)}-4bit", *_flag("--adapter-path", _called(where)), "-q")
    pickled = not any(name.endswith(".safetensors") for name in names & set(ADAPTERS))
    first = "download or save its tensors as safetensors, then " if pickled else ""
    first = first if ADAPTER in names else f"download its {ADAPTER}, then "
    return UserError(f"{says}; expected a model; {first}fuse it into its unquantised base: {command}")


def _kind_of_adapter(config: dict[str, Any], peft: bool) -> str:
    """'LoRA' for what convert fuses; what else an adapter's config tells of."""
    if peft:
        kind = config.get("peft_type") or "LORA"
        kind = "LoRA" if kind == "LORA" else shown(kind)
        return "DoRA" if config.get("use_dora") else kind
    kind = config.get("fine_tune_type", "lora")
    return "LoRA" if kind == "lora" else "DoRA" if kind == "dora" else f"{shown(kind)} fine-tuning's"


def _files(folder: Path) -> Iterator[str]:
    """The names in a folder and in its folders, relative to it; hidden ones are left out."""
    try:
        for path in islice(sorted(folder.iterdir()), MOST_FILES):
            if not path.name.startswith("."):
                yield path.name
                if path.is_dir() and not path.is_symlink():
                    yield from (f"{path.name}/{name}" for name in islice(sorted(os.listdir(path)), MOST_FILES))
    except OSError:
        return


def _modelopt(folder: Path) -> dict[str, Any] | None:
    """The table of hf_quant_config.json, where it names an algorithm."""
    if not (folder / MODELOPT).is_file():
        return None
    table = read_object(folder / MODELOPT).get("quantization")
    return {"quant_method": "modelopt"} | table if isinstance(table, dict) and table.get("quant_algo") else None


def _of_table(key: str, table: object) -> Foreign | None:
    """The format of a table of config.json, or of hf_quant_config.json, called `key`."""
    where = key if key == MODELOPT else f"{key} in config.json"
    if not isinstance(table, dict):
        return Foreign("unknown quantised", f"{where} is {shown(table)}")
    if is_mlx(table):
        return None
    method = table.get("quant_method") or next((KEYS[name] for name in KEYS if name in table), None)
    if method is None and ("bits" in table or "group_size" in table):
        return None  # MLX's own
    if not isinstance(method, str):
        return Foreign("unknown quantised", f"quant_method {shown(method)} in {key}, which is not known here")
    spelled = re.sub(r"[_ ]", "-", method.lower())
    spelled = ALIASES.get(spelled, spelled)
    if spelled == "mlx" or spelled.startswith("mlx-"):
        return None
    if spelled not in METHODS:
        return Foreign("unknown quantised", f"quant_method {shown(method)} in {key}, which is not known here")
    name, sign = METHODS[spelled], f"quant_method {shown(method)}" if "quant_method" in table else where
    if spelled == "compressed-tensors":
        return _compressed(table, sign)
    if spelled in ("fp8", "fbgemm-fp8", "ptpc-fp8"):
        return _fp8(name, table, sign)
    if spelled == "modelopt":
        return _of_modelopt(table, sign)
    if spelled == "bitsandbytes":
        bits = "4-bit" if table.get("load_in_4bit") else "8-bit" if table.get("load_in_8bit") else ""
        name = f"{name} {bits}".strip()
    return Foreign(name, sign)


def _fp8(name: str, table: dict[str, Any], sign: str) -> Foreign:
    """FP8 of transformers and vLLM: e4m3, one scale for a block, a row or a tensor."""
    block = table.get("weight_block_size")
    if block is None:
        return Foreign(name, sign, Plain())
    if not _is_block(block):
        return Foreign(name, f"{sign}, weight_block_size {shown(block)}, expected two sizes")
    return Foreign(f"{name} (blocks of {block[0]} x {block[1]})", sign, Plain(block=tuple(block)))


def _of_modelopt(table: dict[str, Any], sign: str) -> Foreign:
    algo = table.get("quant_algo")
    name = f"NVIDIA ModelOpt {clipped(algo, 40)}" if isinstance(algo, str) else "NVIDIA ModelOpt"
    return Foreign(name, sign, Plain() if algo == "FP8" else None)


def _compressed(table: dict[str, Any], sign: str) -> Foreign:
    """compressed-tensors: plain where every group of modules has integers, packed or not, or FP8."""
    groups = table.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    formats = [group.get("format") or table.get("format") for group in groups if isinstance(group, dict)]
    formats = formats or [table.get("format")]
    told = ", ".join(dict.fromkeys(clipped(str(each), 40) for each in formats))
    name = f"compressed-tensors ({told})"
    reason = next((why for group, form in zip(groups, formats, strict=False) if (why := _not_plain(group, form))), None)
    for key in ("sparsity_config", "transform_config"):
        dense = isinstance(extra := table.get(key), dict) and extra.get("format") == "dense"
        reason = reason or (key if extra and not dense else None)
    if table.get("quantization_status", "compressed") != "compressed":
        reason = reason or f"quantization_status {shown(table['quantization_status'])}"
    if reason or not groups:
        return Foreign(name, f"{sign}; convert does not dequantise {reason or 'a table without config_groups'}")
    weights = [group["weights"] for group in groups if group.get("weights")]
    bits = tuple(dict.fromkeys(each["num_bits"] for each in weights))
    sizes = tuple(each["group_size"] for each in weights if type(each.get("group_size")) is int)
    blocks = [tuple(each["block_structure"]) for each in weights if each.get("block_structure")]
    return Foreign(name, sign, Plain(bits, sizes, *blocks[:1]))


def _not_plain(group: object, form: object) -> str | None:
    """Why a group of modules is not dequantised; None where it is."""
    if not isinstance(group, dict):
        return f"a group {shown(group)}"
    weights = group.get("weights")
    if weights is None:
        return None
    if not isinstance(weights, dict):
        return f"weights {shown(weights)}"
    bits, kind, block = weights.get("num_bits"), weights.get("type", "int"), weights.get("block_structure")
    known = {
        "pack-quantized": kind == "int" and bits in (2, 4, 8),
        "int-quantized": kind == "int" and bits == 8,
        "float-quantized": kind == "float" and bits == 8,
        "naive-quantized": bits == 8,
    }
    if not isinstance(form, str) or not known.get(form):
        return f"format {shown(form)} with {shown(bits)}-bit {shown(kind)}"
    return None if block is None or _is_block(block) else f"block_structure {shown(block)}"


def _is_block(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value)


def original(name: str) -> str | None:
    """Returns Google's repository with the unquantised weights of a model, by its name.

    None for a name that tells of no published model, or of more than its format: a fine-tune has its own original.
    """
    target = re.sub("-assistant(?![a-z])", "", name.rstrip("/"), flags=re.I)
    found = ORIGINAL.fullmatch(target)
    if found is None:
        return None
    ends = ("-it" * bool(found["it"]), "-qat-q4_0-unquantized" * bool(found["qat"]))
    return f"google/gemma-4-{SIZES[found['size'].lower()]}{''.join(ends)}{'-assistant' * (target != name.rstrip('/'))}"


def _from_original(where: Path | str) -> str:
    """The advice for what cannot be converted itself."""
    found = original(_called(where))
    if found is None:
        return f"convert the unquantised original of it: {convert_command('ORIGINAL', 'OUT', '-q')}"
    return f"convert the unquantised original: {convert_command(found, f'{_stem(found)}-4bit', '-q')}"


def _named(where: Path | str) -> str:
    found = original(_called(where))
    return f", {found}" if found else " of it"


def _called(where: Path | str) -> str:
    """What a command calls a model: its folder, or org/name for one in the hub's cache."""
    path = Path(where)
    if path.parent.name == "snapshots":  # models--org--name/snapshots/commit
        return path.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
    return str(where)


def _stem(where: Path | str) -> str:
    """The last part of a model's name, for the folder that is made of it."""
    return Path(_called(where)).name or "model"

"""`inspect SOURCE [--json]`: what a checkpoint is and what it takes to run it, from config.json and headers alone."""

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from mlx_gemma_mtp.cache.spec import BITS, KVSpec, row_bytes, with_bits
from mlx_gemma_mtp.cli.command import Parser
from mlx_gemma_mtp.models.quantization import plain

from . import names, source
from .blocks import stored_as
from .checkpoint import Checkpoint
from .names import Entry, is_integer

CONTEXTS = (4096, 32768, 131072)
BLOCK = 256  # slots of a ring beyond its window, about: 511 while a prompt is prefilled, 15 while its text is made
KV_ITEM = 2  # bytes: keys and values in bfloat16
CONVERTED = re.compile(r"-(mlx|bf16|[2-8]bit|mxfp4|mxfp8|nvfp4)$")


def inspect_command(argv: list[str]) -> int:
    """Runs `inspect`; returns the exit code 0."""
    parser = Parser(prog="mlx-gemma-mtp-convert inspect", description=__doc__)
    parser.add_argument("source", metavar="SOURCE", help="local folder or hub id, as published or converted")
    parser.add_argument("--json", action="store_true", help="for machines")
    args = parser.parse_args(argv)
    report = inspect(args.source)
    print(json.dumps(report, indent=1) if args.json else "\n".join(_lines(report)))
    return 0


def inspect(where: str) -> dict:
    """Returns the report as plain data.

    Bytes are those of the tensors that are used; vision and audio are `left_out`. Raises UserError.
    """
    model = _open(where)
    drafter, modules = model.drafter, _modules(model)
    weights, media = sum(module["bytes"] for module in modules), model.contents.media
    return {
        "source": where,
        "model_type": model.raw["model_type"],
        "role": "drafter" if drafter else "target",
        "layout": "common" if drafter else "mlx" if _is_mlx(model) else "hugging face",
        "architecture": _architecture(model),
        "parameters": sum(math.prod(entry.shape) for entry in model.entries if _counted(entry)),
        "bytes": weights,
        "modules": modules,
        "left_out": {"tensors": len(media), "bytes": sum(model.tensors[name].nbytes for name in media)},
        "drafter": None if drafter else _drafter_name(where),
        "memory": {"weights": weights, "kv": {} if drafter else _kv(model.config.kv), "kv_bits": _in_bits(model)},
    }


def _open(where: str) -> Checkpoint:
    """A local folder, or a repository on the hub of which only config.json and the headers are fetched."""
    if not source.is_hub_id(where):
        return Checkpoint.open(source.find(where))
    return Checkpoint.read(where, *source.remote(where))


def _is_mlx(model: Checkpoint) -> bool:
    """Whether the text model is laid out as MLX's readers write it, under whichever prefix."""
    return model.converted or bool(model.contents.formats) or any(".switch_glu." in name for name in model.tensors)


def _modules(model: Checkpoint) -> list[dict]:
    """Tensors, parameters and bytes by kind of module and format, largest first."""
    modules: dict[tuple[str, str], dict] = {}
    for entry in model.entries:
        name = plain(entry.name)
        form = model.contents.formats.get(name.removesuffix(".weight"))
        stored = str(form) if form else stored_as(model.tensors[model.contents.places[name].name])
        group = names.group(entry)
        module = modules.setdefault(
            (group, stored), {"kind": group, "format": stored, "tensors": 0, "parameters": 0, "bytes": 0}
        )
        module["tensors"] += 1
        module["parameters"] += math.prod(entry.shape) if _counted(entry) else 0
        module["bytes"] += _stored_bytes(model, name)
    return sorted(modules.values(), key=lambda module: -module["bytes"])


def _stored_bytes(model: Checkpoint, name: str) -> int:
    """Bytes of a weight with its scales and biases; of half of a fused expert tensor, half."""
    path = name.removesuffix("weight")
    places = [model.contents.places.get(each) for each in (name, f"{path}scales", f"{path}biases")]
    return sum(
        model.tensors[place.name].nbytes
        // (1 if place.rows is None else model.tensors[place.name].shape[-2])
        * (1 if place.rows is None else place.rows[1] - place.rows[0])
        for place in places
        if place
    )


def _counted(entry: Entry) -> bool:
    """Layer scalars and token ids are stored, but no parameters."""
    return not entry.name.endswith(".layer_scalar") and not is_integer(entry.name)


def _architecture(model: Checkpoint) -> dict:
    text, moe = model.text, None if model.drafter else model.config.moe
    return {
        "hidden_size": text["hidden_size"],
        "layers": text["num_hidden_layers"],
        "full_attention_layers": text["layer_types"].count("full_attention"),
        "layers_sharing_kv": text["num_kv_shared_layers"],
        "vocab_size": text["vocab_size"],
        "sliding_window": text["sliding_window"],
        "experts": moe.num_experts if moe else 0,
        "experts_per_token": moe.top_k if moe else 0,
        "per_layer_inputs": text["hidden_size_per_layer_input"],
        "backbone_hidden_size": model.raw.get("backbone_hidden_size"),
    }


def _drafter_name(where: str) -> str:
    """The drafter's name beside a target: that of the original, without what conversions append."""
    from mlx_gemma_mtp.files import hub  # as in source.find

    local = not source.is_hub_id(where)
    beside = hub.assistant(os.path.abspath(Path(where).expanduser()) if local else where)
    return beside if os.path.isdir(beside) else f"{CONVERTED.sub('', beside.removesuffix('-assistant'))}-assistant"


def _kv(specs: Sequence[KVSpec]) -> dict[str, int]:
    """Context length -> bytes of the cache of one sequence."""
    return {str(tokens): row_bytes(specs, tokens, BLOCK, KV_ITEM) for tokens in CONTEXTS}


def _in_bits(model: Checkpoint) -> dict[str, dict[str, int]]:
    """Bits -> what `_kv` says where full layers keep their K/V in so many; nothing where heads cannot have them."""
    if model.drafter or any(spec.group is None for spec in model.config.kv if spec.window is None):
        return {}
    return {str(bits): _kv(with_bits(model.config.kv, bits)) for bits in BITS}


def _lines(report: dict) -> Iterator[str]:
    """The report for people."""
    shape = report["architecture"]
    yield f"{report['source']}: {report['role']}, {report['model_type']}, {report['layout']} layout"
    yield (
        f"{shape['layers']} layers ({shape['full_attention_layers']} with full attention, {shape['layers_sharing_kv']}"
        f" sharing K/V), hidden size {shape['hidden_size']}, vocabulary {shape['vocab_size']}"
    )
    if shape["experts"]:
        yield f"{shape['experts']} experts, {shape['experts_per_token']} for each token"
    yield f"{report['parameters']:,} parameters, {_gb(report['bytes'])}"
    for module in report["modules"]:
        yield (
            f"  {module['kind']}: {module['format']}, {module['tensors']} tensors,"
            f" {module['parameters']:,} parameters, {_gb(module['bytes'])}"
        )
    if report["left_out"]["tensors"]:
        left_out = report["left_out"]
        yield f"  vision and audio: {left_out['tensors']} tensors, {_gb(left_out['bytes'])}, not used"
    if report["role"] == "drafter":
        yield f"to run: {_gb(report['bytes'])} of weights beside the target; K/V is the target's"
        return
    yield f"drafter: {report['drafter']}"
    for tokens, size in report["memory"]["kv"].items():
        total = report["memory"]["weights"] + size
        few = "".join(f", {_gb(each[tokens])} in {bits} bits" for bits, each in report["memory"]["kv_bits"].items())
        kv = f"K/V {_gb(size)}{few}"
        yield f"to run {int(tokens) // 1024}k tokens: {_gb(total)} ({kv}; without drafter and activations)"


def _gb(size: int) -> str:
    return f"{size / 1e9:.3f} GB"

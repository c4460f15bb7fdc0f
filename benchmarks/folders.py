"""One Hugging Face source, one float32 MLX folder made from it, and their hashes: equal weights for every system."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from convert.run import convert
from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.files.folder import INDEX, weight_files
from mlx_gemma_mtp.files.hub import Pair

EXPERTS = ".experts.switch_glu."
PREFIX = "language_model."  # of an MLX target's tensors, before the names of a Gemma4ForCausalLM


def hashes(pair: Pair) -> dict[str, str]:
    """SHA-256 of each folder's tensors."""
    folders = {"target": pair.target, "drafter": pair.drafter}
    return {name: _sha256(folder) for name, folder in folders.items() if folder}


def _sha256(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in weight_files(folder):
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def hugging_face(pair: Pair, out: Path) -> Pair:
    """Writes unquantised MLX folders of ours in Hugging Face layout again, bit for bit.

    The bundled pair is shipped in MLX's layout alone. A target becomes a Gemma4ForCausalLM; a drafter has the same
    names.
    """
    return _each(_hugging_face, pair, out)


def _hugging_face(source: Path, out: Path) -> Path:
    out.mkdir(parents=True)
    config, weights = _read(source)
    if "quantization" in config:
        raise UserError(f"{source} is quantised and has no Hugging Face layout; name its source with --hf-path")
    if config["model_type"] == "gemma4":
        config = config["text_config"] | {"architectures": ["Gemma4ForCausalLM"]}
        weights = _joined({name.removeprefix(PREFIX): value for name, value in weights.items()})
    _write(source, out, config, weights, "pt")
    return out


def _joined(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """The experts' halves as transformers names them: gate rows first."""
    rest = {name: value for name, value in weights.items() if EXPERTS not in name}
    for name in [name for name in weights if name.endswith(f"{EXPERTS}gate_proj.weight")]:
        base = name.removesuffix(f"{EXPERTS}gate_proj.weight")
        gate, up, down = (weights[f"{base}{EXPERTS}{part}_proj.weight"] for part in ("gate", "up", "down"))
        rest |= {f"{base}.experts.gate_up_proj": mx.concatenate([gate, up], 1), f"{base}.experts.down_proj": down}
    return rest


def converted(source: Pair, out: Path) -> Pair:
    """The float32 MLX folders that `python -m convert` makes from a Hugging Face pair."""
    return _each(_converted, source, out)


def _converted(source: Path, out: Path) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    convert(str(source), out, None, "float32")
    return out


def float32(source: Pair, out: Path) -> Pair:
    """Copies of MLX folders with their floating-point tensors in float32: MLX's CPU has no bfloat16 expert product, and
    adds up products with quantised weights in the type of their scales.
    """
    return _each(_float32, source, out)


def _each(made: Callable[[Path, Path], Path], pair: Pair, out: Path) -> Pair:
    """What `made` makes of both folders, below `out`."""
    drafter = made(pair.drafter, out / "drafter") if pair.drafter else None
    return Pair(made(pair.target, out / "target"), drafter, pair.reason)


def _float32(source: Path, out: Path) -> Path:
    out.mkdir(parents=True)
    config, weights = _read(source)
    for name, value in weights.items():
        if mx.issubdtype(value.dtype, mx.floating):
            weights[name] = value.astype(mx.float32)
    for section in (config, config.get("text_config", {})):
        if "dtype" in section:
            section["dtype"] = "float32"
    _write(source, out, config, weights, "mlx")
    return out


def _read(folder: Path) -> tuple[dict, dict[str, mx.array]]:
    weights: dict[str, mx.array] = {}
    for path in weight_files(folder):
        weights |= mx.load(str(path))
    return json.loads((folder / "config.json").read_text()), weights


def _write(source: Path, out: Path, config: dict, weights: dict[str, mx.array], made_for: str) -> None:
    """The weights in one file, the config, and the tokenizer's and other small files of the source."""
    for path in source.iterdir():
        wanted = path.suffix in (".json", ".jinja") and not path.name.startswith(".")
        if wanted and path.name not in ("checksums.json", INDEX):
            shutil.copy(path, out)
    mx.save_safetensors(str(out / "model.safetensors"), weights, metadata={"format": made_for})
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

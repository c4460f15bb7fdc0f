"""Small Gemma 4 checkpoints in Google's own Hugging Face layout: five targets, five drafters.

Each config.json is the published one with the sizes shrunk; tensor names, what is stored beside the text model, the
files of a folder and the shards are the published ones too, spelled out here independently of convert/names.py.

The weights make a pair that agrees often, without training: the layers add little (`DEPTH`) to the embedding of the
newest token, so the next token follows mostly from that one, and the drafter's tensors say the same in half the width.
With a depth of 0.2 the text still varies and about a quarter of the drafts is kept; near 0 all are.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np

CONFIGS = Path(__file__).parent / "data" / "configs"
TOKENIZER = Path(__file__).parents[1] / "mlx_gemma_mtp" / "demo" / "target"
KINDS = ("E2B", "E4B", "12B", "26B-A4B", "31B")
FORMATS = {  # name -> flags of the converter
    "bf16": (),
    "2 bit": ("-q", "--q-bits", "2"),
    "3 bit": ("-q", "--q-bits", "3"),
    "4 bit": ("-q",),
    "5 bit": ("-q", "--q-bits", "5"),
    "6 bit": ("-q", "--q-bits", "6"),
    "8 bit": ("-q", "--q-bits", "8"),
    "mxfp4": ("-q", "--q-mode", "mxfp4"),
    "mxfp8": ("-q", "--q-mode", "mxfp8"),
    "nvfp4": ("-q", "--q-mode", "nvfp4"),
    "qat-q4_0": ("-q", "--quant-predicate", "qat-q4_0"),
    "ple-safe": ("-q", "--quant-predicate", "ple-safe"),
    "uniform": ("-q", "--quant-predicate", "uniform"),
}

S, F = "sliding_attention", "full_attention"
V, H, RANK = 4096, 128, 64  # vocabulary; hidden sizes of target and drafter, the latter the rank of the embedding
CENTROIDS, CENTROID_TOP_K = 64, 8
DEPTH = 0.2
TEXT = {
    "hidden_size": H, "intermediate_size": 192, "head_dim": 32, "global_head_dim": 64, "num_attention_heads": 4,
    "sliding_window": 16, "vocab_size": V, "vocab_size_per_layer_input": V, "max_position_embeddings": 1024,
}  # fmt: skip
SMALL = {
    "E2B": {"layer_types": [S, S, F] * 2, "num_kv_shared_layers": 3, "hidden_size_per_layer_input": 64},
    "E4B": {"layer_types": [S, S, S, F] * 2, "num_kv_shared_layers": 4, "num_key_value_heads": 2,
            "hidden_size_per_layer_input": 64},
    "12B": {"layer_types": [S, S, F] * 2, "num_key_value_heads": 2, "num_global_key_value_heads": 1},
    "26B-A4B": {"layer_types": [S, S, F] * 2, "num_key_value_heads": 4, "num_global_key_value_heads": 2,
                "intermediate_size": 64, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 128},
    "31B": {"layer_types": [S, F] * 3, "num_key_value_heads": 2, "num_global_key_value_heads": 1},
}  # fmt: skip
VISION = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 32, "global_head_dim": 32, "position_embedding_size": 8,
}  # fmt: skip
AUDIO = {
    "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "subsampling_conv_channels": [128, 4],
    "output_proj_dims": 64,
}  # fmt: skip
UNIFIED_VISION = {"mm_embed_dim": H, "mm_posemb_size": 8, "model_patch_size": 8, "output_proj_dims": H}
UNIFIED_AUDIO = {"audio_embed_dim": 64, "hidden_size": 64, "output_proj_dims": 64}
ORDERING = "masked_embedding.token_ordering"
SHARDS = {"26B-A4B": 2, "31B": 2}


@dataclass(frozen=True)
class Checkpoint:
    """What one published folder holds: config.json, generation_config.json, and the tensors by name."""

    kind: str
    config: dict
    generation: dict
    tensors: dict[str, mx.array]
    drafter: bool

    def save(self, folder: Path) -> Path:
        """Writes the folder as published: a single file without an index, or two shards with one."""
        folder.mkdir(parents=True)
        _write(folder / "config.json", self.config)
        _write(folder / "generation_config.json", self.generation)
        _save_tokenizer(folder, self.drafter)
        (folder / "README.md").write_text("license: apache-2.0\n")
        shards = 1 if self.drafter else SHARDS.get(self.kind, 1)
        if shards == 1:
            mx.save_safetensors(str(folder / "model.safetensors"), self.tensors, {"format": "pt"})
            return folder
        names = sorted(self.tensors)
        cut = 9 * len(names) // 10
        files = {f"model-{i:05}-of-00002.safetensors": part for i, part in enumerate((names[:cut], names[cut:]), 1)}
        for file, part in files.items():
            mx.save_safetensors(str(folder / file), {name: self.tensors[name] for name in part}, {"format": "pt"})
        size = sum(tensor.nbytes for tensor in self.tensors.values())
        weight_map = {name: file for file, part in files.items() for name in part}
        _write(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})
        return folder


def pair(folder: Path, kind: str, depth: float = DEPTH) -> Path:
    """Writes the target of a kind to `folder`/gemma-4-KIND-it, and its drafter beside it; returns the former."""
    drafter(kind, depth).save(folder / f"gemma-4-{kind}-it-assistant")
    return target(kind, depth).save(folder / f"gemma-4-{kind}-it")


def target(kind: str, depth: float = DEPTH) -> Checkpoint:
    """The published target of a kind, shrunk."""
    config = _with_small_ids(published(f"gemma-4-{kind}-it"))
    layers = SMALL[kind]["layer_types"]
    config["text_config"] |= TEXT | SMALL[kind] | {"num_hidden_layers": len(layers)}
    unified = kind == "12B"
    config["vision_config"] |= UNIFIED_VISION if unified else VISION
    if config["audio_config"]:
        config["audio_config"] |= UNIFIED_AUDIO if unified else AUDIO
    generation = {
        "bos_token_id": 2, "do_sample": True, "eos_token_id": [1, 106, 50], "pad_token_id": 0, "temperature": 1.0,
        "top_k": 64, "top_p": 0.95, "transformers_version": config["transformers_version"],
    }  # fmt: skip
    if unified:
        generation["suppress_tokens"] = [_small_id(258883), _small_id(258882)]
    shapes = text_shapes(config["text_config"])
    tensors = {
        f"model.language_model.{name}": value for name, value in _random(shapes, f"{kind} target", depth).items()
    }
    tensors |= _random({f"model.{name}": shape for name, shape in media_shapes(config).items()}, f"{kind} media", depth)
    table = _table(kind)
    tensors["model.language_model.embed_tokens.weight"] = _bf16(table.tokens @ table.basis.T)
    tensors["model.language_model.norm.weight"] = _bf16(table.norm)
    return Checkpoint(kind, config, generation, tensors, drafter=False)


def drafter(kind: str, depth: float = DEPTH) -> Checkpoint:
    """The published drafter of a kind, shrunk."""
    config = _with_small_ids(published(f"gemma-4-{kind}-it-assistant"))
    heads = {key: value for key, value in SMALL[kind].items() if "key_value_heads" in key}
    small = {"hidden_size": RANK, "intermediate_size": 128, "vocab_size_per_layer_input": 0}
    config["text_config"] |= TEXT | heads | small
    config |= {
        "backbone_hidden_size": H, "num_centroids": CENTROIDS, "centroid_intermediate_top_k": CENTROID_TOP_K,
    }  # fmt: skip
    generation = {
        "bos_token_id": 2, "do_sample": True, "eos_token_id": [1, 106, 50], "is_assistant": True,
        "num_assistant_tokens": 6, "num_assistant_tokens_schedule": "constant", "pad_token_id": 0,
        "temperature": 1.0, "top_k": 64, "top_p": 0.95, "transformers_version": config["transformers_version"],
    }  # fmt: skip
    if kind == "12B":
        generation = {key: value for key, value in generation.items() if "assistant" not in key}
        generation |= {"eos_token_id": 1, "suppress_tokens": [_small_id(258883), _small_id(258882)]}
    shapes = drafter_shapes(config)
    ordering = shapes.pop(ORDERING, None)
    tensors = _random(shapes, f"{kind} drafter", depth)
    table = _table(kind)
    embedding, carried = table.basis.T * table.norm, 0.05 * np.array(tensors["pre_projection.weight"][:, H:].tolist())
    tensors["pre_projection.weight"] = _bf16(np.concatenate([embedding, carried], axis=1))
    tensors["model.embed_tokens.weight"] = _bf16(table.tokens)
    tensors["model.norm.weight"] = mx.ones(RANK, mx.bfloat16)
    if ordering:
        tensors["masked_embedding.centroids.weight"] = _bf16(table.centroids)
        tensors[ORDERING] = mx.array(table.ordering, mx.int64)
    return Checkpoint(kind, config, generation, tensors, drafter=True)


def published(name: str) -> dict:
    """The published config.json."""
    return json.loads((CONFIGS / f"{name}.json").read_text())


def _with_small_ids(config: dict) -> dict:
    """Token ids above the small vocabulary are moved below its end."""
    ids = {k: _small_id(v) for k, v in config.items() if k.endswith(("token_id", "token_index")) and isinstance(v, int)}
    return config | ids


def _small_id(token: int) -> int:
    """258880..258884 -> 4090..4094, 255999 and 256000 -> 4088 and 4089."""
    return token if token < V else token - 254790 if token > 258000 else token - 251911


# ---- names and shapes ----------------------------------------------------------------------------------------------


def text_shapes(text: dict) -> dict[str, tuple[int, ...]]:
    """Text tensors without their prefix, of a target or a drafter."""
    hidden, width, layers = text["hidden_size"], text["hidden_size_per_layer_input"], text["num_hidden_layers"]
    shapes = {"embed_tokens.weight": (text["vocab_size"], hidden), "norm.weight": (hidden,)}
    if width:
        shapes |= {
            "embed_tokens_per_layer.weight": (text["vocab_size_per_layer_input"], layers * width),
            "per_layer_model_projection.weight": (layers * width, hidden),
            "per_layer_projection_norm.weight": (width,),
        }
    for i in range(layers):
        layer = _attention(text, i) | _feed_forward(text, i)
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def drafter_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """All tensors of a drafter."""
    text, backbone = config["text_config"], config["backbone_hidden_size"]
    shapes = {f"model.{name}": shape for name, shape in text_shapes(text).items()}
    shapes["pre_projection.weight"] = (text["hidden_size"], 2 * backbone)
    shapes["post_projection.weight"] = (backbone, text["hidden_size"])
    if config["use_ordered_embeddings"]:
        shapes["masked_embedding.centroids.weight"] = (config["num_centroids"], text["hidden_size"])
        shapes[ORDERING] = (text["vocab_size"],)
    return shapes


def _attention(text: dict, i: int) -> dict:
    """Real E2B and E4B files hold k_proj, v_proj and k_norm also where a layer shares K/V; drafters hold none."""
    hidden, heads, full = text["hidden_size"], text["num_attention_heads"], text["layer_types"][i] == F
    v_is_k = full and text["attention_k_eq_v"]
    kv = text["num_global_key_value_heads"] if v_is_k else text["num_key_value_heads"]
    dim = text["global_head_dim"] if full else text["head_dim"]
    shapes = {
        "self_attn.q_proj.weight": (heads * dim, hidden), "self_attn.o_proj.weight": (hidden, heads * dim),
        "self_attn.q_norm.weight": (dim,),
    }  # fmt: skip
    if text["num_kv_shared_layers"] == text["num_hidden_layers"]:
        return shapes
    shapes |= {"self_attn.k_proj.weight": (kv * dim, hidden), "self_attn.k_norm.weight": (dim,)}
    return shapes if v_is_k else shapes | {"self_attn.v_proj.weight": (kv * dim, hidden)}


def _feed_forward(text: dict, i: int) -> dict:
    hidden, experts, width = text["hidden_size"], text["num_experts"], text["hidden_size_per_layer_input"]
    shared = i >= text["num_hidden_layers"] - text["num_kv_shared_layers"]
    inner = text["intermediate_size"] * (2 if shared and text["use_double_wide_mlp"] else 1)
    norms = ["input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"]
    shapes = {
        "mlp.gate_proj.weight": (inner, hidden), "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner), "layer_scalar": (1,),
    }  # fmt: skip
    if text["enable_moe_block"]:
        size = text["moe_intermediate_size"]
        shapes |= {
            "experts.gate_up_proj": (experts, 2 * size, hidden), "experts.down_proj": (experts, hidden, size),
            "router.proj.weight": (experts, hidden), "router.scale": (hidden,), "router.per_expert_scale": (experts,),
        }  # fmt: skip
        norms += ["pre_feedforward_layernorm_2", "post_feedforward_layernorm_1", "post_feedforward_layernorm_2"]
    if width:
        shapes |= {"per_layer_input_gate.weight": (width, hidden), "per_layer_projection.weight": (hidden, width)}
        norms.append("post_per_layer_input_norm")
    return shapes | {f"{name}.weight": (hidden,) for name in norms}


def media_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Vision and, where a model hears, audio, without the prefix `model.`."""
    return _unified_shapes(config) if config["model_type"] == "gemma4_unified" else _tower_shapes(config)


def _tower_shapes(config: dict) -> dict:
    """Names and shapes as transformers' meta model lists them."""
    vision, audio, hidden = config["vision_config"], config["audio_config"], config["text_config"]["hidden_size"]
    size, inner, dim = vision["hidden_size"], vision["intermediate_size"], vision["head_dim"]
    clipped = vision["use_clipped_linears"]
    shapes = {
        "vision_tower.patch_embedder.position_embedding_table": (2, vision["position_embedding_size"], size),
        "vision_tower.patch_embedder.input_proj.weight": (size, 3 * vision["patch_size"] ** 2),
        "embed_vision.embedding_projection.weight": (hidden, size),
    }
    if vision["standardize"]:
        shapes |= {"vision_tower.std_bias": (size,), "vision_tower.std_scale": (size,)}
    layer: dict[str, tuple[int, ...]] = {"self_attn.q_norm.weight": (dim,), "self_attn.k_norm.weight": (dim,)}
    for part in "qkvo":
        layer |= _linear(f"self_attn.{part}_proj", size, size, clipped)
    layer |= _linear("mlp.gate_proj", inner, size, clipped) | _linear("mlp.up_proj", inner, size, clipped)
    layer |= _linear("mlp.down_proj", size, inner, clipped)
    for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
        layer[f"{norm}_layernorm.weight"] = (size,)
    for i in range(vision["num_hidden_layers"]):
        shapes |= {f"vision_tower.encoder.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes | (_audio_shapes(audio, hidden) if audio else {})


def _audio_shapes(audio: dict, hidden: int) -> dict:
    size, (first, second), out = audio["hidden_size"], audio["subsampling_conv_channels"], audio["output_proj_dims"]
    layer = {
        "self_attn.per_dim_scale": (size // audio["num_attention_heads"],),
        "self_attn.relative_k_proj.weight": (size, size), "lconv1d.pre_layer_norm.weight": (size,),
        "lconv1d.depthwise_conv1d.weight": (size, 1, audio["conv_kernel_size"]), "lconv1d.conv_norm.weight": (size,),
        "norm_pre_attn.weight": (size,), "norm_post_attn.weight": (size,), "norm_out.weight": (size,),
    }  # fmt: skip
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.post", "lconv1d.linear_end"):
        layer |= _linear(name, size, size, clipped=True)
    layer |= _linear("lconv1d.linear_start", 2 * size, size, clipped=True)
    for name in ("feed_forward1", "feed_forward2"):
        layer |= {f"{name}.{norm}_layer_norm.weight": (size,) for norm in ("pre", "post")}
        layer |= _linear(f"{name}.ffw_layer_1", 4 * size, size, clipped=True)
        layer |= _linear(f"{name}.ffw_layer_2", size, 4 * size, clipped=True)
    tower = "audio_tower.subsample_conv_projection"
    shapes = {
        f"{tower}.layer0.conv.weight": (first, 1, 3, 3), f"{tower}.layer0.norm.weight": (first,),
        f"{tower}.layer1.conv.weight": (second, first, 3, 3), f"{tower}.layer1.norm.weight": (second,),
        f"{tower}.input_proj_linear.weight": (size, 32 * second), "audio_tower.output_proj.weight": (out, size),
        "audio_tower.output_proj.bias": (out,), "embed_audio.embedding_projection.weight": (hidden, out),
    }  # fmt: skip
    for i in range(audio["num_hidden_layers"]):
        shapes |= {f"audio_tower.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def _unified_shapes(config: dict) -> dict:
    """The 12B has no encoders; names as in the published file's header, which are not those of transformers' model."""
    vision, hidden = config["vision_config"], config["text_config"]["hidden_size"]
    patch, size = 3 * vision["model_patch_size"] ** 2, vision["mm_embed_dim"]
    norms = {"patch_ln1": patch, "patch_ln2": size, "pos_norm": size}
    shapes = {
        "vision_embedder.patch_dense.weight": (size, patch), "vision_embedder.patch_dense.bias": (size,),
        "vision_embedder.pos_embedding": (vision["mm_posemb_size"], 2, size),
        "embed_vision.embedding_projection.weight": (hidden, vision["output_proj_dims"]),
        "embed_audio.embedding_projection.weight": (hidden, config["audio_config"]["output_proj_dims"]),
    }  # fmt: skip
    return shapes | {f"vision_embedder.{norm}.{part}": (n,) for norm, n in norms.items() for part in ("weight", "bias")}


def _linear(name: str, rows: int, columns: int, clipped: bool) -> dict[str, tuple[int, ...]]:
    """A clippable linear: its bounds are 0-d tensors."""
    bounds = ("input_min", "input_max", "output_min", "output_max") if clipped else ()
    return {f"{name}.linear.weight": (rows, columns)} | {f"{name}.{bound}": () for bound in bounds}


# ---- values --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """What target and drafter agree on. logits = tokens @ basis.T @ (norm * x), x the normed embedding [.., H].

    tokens: [V, RANK], in clusters around `centroids` [CENTROIDS, RANK]; ordering: [V] token ids, cluster by cluster;
    basis: [H, RANK] with orthonormal columns; norm: [H], of either sign, so that no token is likeliest after itself.
    """

    tokens: np.ndarray
    centroids: np.ndarray
    ordering: np.ndarray
    basis: np.ndarray
    norm: np.ndarray


@cache
def _table(kind: str) -> Table:
    random = _generator(f"{kind} table")
    centroids, ordering = random.standard_normal((CENTROIDS, RANK)), random.permutation(V)
    tokens = random.standard_normal((V, RANK))
    tokens[ordering] = 0.7 * tokens[ordering] + 0.7 * np.repeat(centroids, V // CENTROIDS, axis=0)
    basis, _ = np.linalg.qr(random.standard_normal((H, RANK)))
    return Table(1.2 * tokens / RANK**0.5, centroids / RANK**0.5, ordering, basis, random.standard_normal(H))


def _random(shapes: dict[str, tuple[int, ...]], seed: str, depth: float) -> dict[str, mx.array]:
    """bf16 tensors: what a layer adds is scaled by depth (the norms after attention, feed-forward, per-layer input)."""
    random, tensors = _generator(seed), {}
    for name, shape in shapes.items():
        value = random.standard_normal(shape)
        if len(shape) == 0:
            value = 3 + value  # a clip bound
        elif shape == (1,):
            value = 1 + 0.1 * value  # layer_scalar
        elif len(shape) > 1:
            value = value * (1.2 / shape[-1] ** 0.5)
        last = name.rsplit(".", 2)[-2]
        if last in ("post_attention_layernorm", "post_feedforward_layernorm", "post_per_layer_input_norm"):
            value = depth * value
        tensors[name] = _bf16(value)
    return tensors


def _generator(seed: str) -> np.random.Generator:
    return np.random.default_rng(list(seed.encode()))


def _bf16(value: np.ndarray) -> mx.array:
    return mx.array(np.asarray(value, np.float32)).astype(mx.bfloat16)


# ---- the other files -----------------------------------------------------------------------------------------------


def _save_tokenizer(folder: Path, drafter: bool) -> None:
    """The bundled tokenizer (4,096 tokens); targets also have a template in its own file and a processor."""
    shutil.copyfile(TOKENIZER / "tokenizer.json", folder / "tokenizer.json")
    shutil.copyfile(TOKENIZER / "tokenizer_config.json", folder / "tokenizer_config.json")
    if not drafter:
        shutil.copyfile(TOKENIZER / "chat_template.jinja", folder / "chat_template.jinja")
        _write(folder / "processor_config.json", {"processor_class": "Gemma4Processor", "image_seq_length": 280})


def _write(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

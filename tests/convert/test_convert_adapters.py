"""LoRA adapters are fused while converting: mlx-lm's and PEFT's, every tensor into its matrix, or refused by name.

mlx-lm is the judge: its model with the adapter beside the weights, and its own fuse.
"""

import json
import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import load_model
from packed import packed
from test_convert import Checkpoint, load, make_drafter, make_e2b, make_moe, make_text, make_unified, run

from convert import blocks
from convert.cli import main

IDS = mx.array([[2, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37]])
RANK, SCALE = 4, 3.0
MLX = {"fine_tune_type": "lora", "num_layers": 99, "lora_parameters": {"rank": RANK, "scale": SCALE, "dropout": 0.0}}
PEFT = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "base_model_name_or_path": "google/gemma-4-31B-it"}
PEFT_DEFAULTS = {
    "use_dora": False, "use_rslora": False, "modules_to_save": None, "init_lora_weights": True, "bias": "none",
    "fan_in_fan_out": False, "rank_pattern": {}, "alpha_pattern": {}, "target_modules": ["q_proj"], "lora_dropout": 0.1,
    "layer_replication": None, "megatron_config": None, "use_qalora": False, "trainable_token_indices": None,
}  # fmt: skip
MAKES = {"e2b": make_e2b, "unified": make_unified, "moe": make_moe, "text": make_text}


def write(folder: Path, config: dict, file: str, tensors: dict) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / file), tensors)
    return folder


def write_peft(folder: Path, tensors: dict, **more) -> Path:
    return write(folder, PEFT | PEFT_DEFAULTS | more, "adapter_model.safetensors", tensors)


def made(checkpoint: Checkpoint) -> Checkpoint:
    checkpoint.weights = {n: v.astype(mx.float32) if v.ndim else v for n, v in checkpoint.weights.items()}
    checkpoint.save()
    return checkpoint


def converted(checkpoint: Checkpoint, out: Path, *flags: str) -> Path:
    assert run(checkpoint, out, "--dtype", "float32", *flags) == 0
    return out


def logits(model) -> np.ndarray:
    return np.array(model(IDS))


def random_adapter(model) -> dict[str, mx.array]:
    """All adapter tensors of a model of mlx-lm, with values that change its logits."""
    mx.random.seed(3)
    held = {n: v for n, v in tree_flatten(model.parameters()) if n.rpartition(".")[2] in ("lora_a", "lora_b")}
    return {name: mx.random.normal(value.shape) * 0.05 for name, value in held.items()}


@pytest.mark.parametrize("kind", MAKES)
def test_mlx_lm_is_the_judge(tmp_path, monkeypatch, kind):
    """All linears of all layers, embeddings and experts too: logits as beside the weights, and as mlx-lm's own fuse."""
    checkpoint = made(MAKES[kind](tmp_path / "hf"))
    base = converted(checkpoint, tmp_path / "base")
    model, _ = load_model(base)
    before = logits(model)
    linear_to_lora_layers(model, 99, MLX["lora_parameters"])
    adapter = random_adapter(model)
    write(tmp_path / "adapter", MLX, "adapters.safetensors", adapter)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 3000)  # rows from the middle of matrices and of experts
    out = converted(checkpoint, tmp_path / "out", "--adapter-path", str(tmp_path / "adapter"))
    ours, _ = load_model(out)
    apart = load_adapters(load_model(base)[0], str(tmp_path / "adapter"))
    np.testing.assert_allclose(logits(ours), logits(apart), atol=2e-4)
    assert np.abs(logits(ours) - before).max() > 0.05
    fused = [(name, module.fuse()) for name, module in apart.named_modules() if "lora_a" in module]
    assert len(fused) == len(adapter) // 2 > 5
    apart.update_modules(tree_unflatten(fused))
    theirs = dict(tree_flatten(apart.parameters()))
    assert theirs.keys() == dict(tree_flatten(ours.parameters())).keys()
    for name, value in tree_flatten(ours.parameters()):
        np.testing.assert_allclose(np.array(value), np.array(theirs[name]), atol=2e-6, err_msg=name)


def test_an_embedding_of_mlx_lm(tmp_path):
    """The adapter of a table counts for the output head, too, in mlx-lm as here."""
    checkpoint = made(make_e2b(tmp_path / "hf"))
    base = converted(checkpoint, tmp_path / "base")
    model, _ = load_model(base)
    keys = {"language_model.model.embed_tokens", "language_model.model.embed_tokens_per_layer"}
    parameters = MLX["lora_parameters"] | {"keys": sorted(keys)}
    linear_to_lora_layers(model, 0, parameters)
    adapter = random_adapter(model)
    assert len(adapter) == 4
    write(tmp_path / "adapter", MLX | {"num_layers": 0, "lora_parameters": parameters}, "adapters.safetensors", adapter)
    out = converted(checkpoint, tmp_path / "out", "--adapter-path", str(tmp_path / "adapter"))
    apart = load_adapters(load_model(base)[0], str(tmp_path / "adapter"))
    np.testing.assert_allclose(logits(load_model(out)[0]), logits(apart), atol=2e-4)


def factors(rows: int, columns: int, rank: int = RANK, seed: int = 0) -> tuple[mx.array, mx.array]:
    """PEFT's A [rank, columns] and B [rows, rank]."""
    mx.random.seed(seed)
    return mx.random.normal((rank, columns)) * 0.05, mx.random.normal((rows, rank)) * 0.05


def peft_tensors(checkpoint: Checkpoint, spelled: str, rank=RANK) -> tuple[dict, dict]:
    """(tensors, path -> scale-free product) of an adapter for the attention and MLPs of all layers."""
    tensors, products = {}, {}
    for i, (name, value) in enumerate(checkpoint.weights.items()):
        base, found, path = name.rpartition("layers.")
        if found and value.ndim == 2 and base.startswith("model.") and "tower" not in base and "router" not in name:
            if checkpoint.config["model_type"] == "gemma4" and "language_model" not in base:
                continue
            path = f"layers.{path.removesuffix('.weight')}"
            a, b = factors(*value.shape, rank=rank(path) if callable(rank) else rank, seed=i)
            tensors |= {f"{spelled}{path}.lora_A.weight": a, f"{spelled}{path}.lora_B.weight": b}
            products[path] = b @ a
    return tensors, products


SPELLINGS = (
    "base_model.model.model.language_model.", "base_model.model.language_model.model.", "base_model.model.model.",
    "model.language_model.", "language_model.model.", "model.", "language_model.",
)  # fmt: skip


def check_sum(checkpoint: Checkpoint, out: Path, products: dict, scale) -> int:
    """The written matrices are base + scale * product, the rest is the base; returns how many were changed."""
    (written, _), (base, _) = load(out), load(converted(checkpoint, out.with_name("plain")))
    changed = 0
    for name, value in base.items():
        path = name.removeprefix("language_model.model.").removesuffix(".weight")
        product = products.get(path)
        want = np.array(value) if product is None else np.array(value) + scale(path) * np.array(product)
        np.testing.assert_allclose(np.array(written[name]), want, atol=1e-6, err_msg=name)
        changed += product is not None
    return changed


@pytest.mark.parametrize("spelled", SPELLINGS)
def test_peft_in_all_spellings(tmp_path, spelled):
    checkpoint = made(make_unified(tmp_path / "hf"))
    tensors, products = peft_tensors(checkpoint, spelled)
    adapter = write_peft(tmp_path / "adapter", tensors)
    out = converted(checkpoint, tmp_path / "out", "--adapter-path", str(adapter))
    assert check_sum(checkpoint, out, products, lambda path: 6 / RANK) == len(products) > 8


@pytest.mark.parametrize("spelled", SPELLINGS[:2])
def test_peft_on_a_text_model(tmp_path, spelled):
    checkpoint = made(make_text(tmp_path / "hf"))
    tensors, products = peft_tensors(checkpoint, spelled)
    adapter = write_peft(tmp_path / "adapter", tensors)
    out = converted(checkpoint, tmp_path / "out", "--adapter-path", str(adapter))
    assert check_sum(checkpoint, out, products, lambda path: 6 / RANK) == len(products) > 8


def test_peft_beside_the_weights(tmp_path):
    """Logits in float32: mlx-lm's model with x A^T B^T beside each matrix, and the fused one."""
    checkpoint = made(make_unified(tmp_path / "hf"))
    tensors, _ = peft_tensors(checkpoint, SPELLINGS[0])
    adapter = write_peft(tmp_path / "adapter", tensors, use_rslora=True)
    out = converted(checkpoint, tmp_path / "out", "--adapter-path", str(adapter))
    model, _ = load_model(converted(checkpoint, tmp_path / "base"))
    modules = dict(model.named_modules())
    beside = []
    for name in {name.split(".lora_")[0] for name in tensors}:
        path = name.replace(SPELLINGS[0], "language_model.model.")
        module = LoRALinear.from_base(modules[path], r=RANK, scale=6 / math.sqrt(RANK))
        module.lora_a, module.lora_b = tensors[f"{name}.lora_A.weight"].T, tensors[f"{name}.lora_B.weight"].T
        beside.append((path, module))
    before = logits(model)
    model.update_modules(tree_unflatten(beside))
    apart = logits(model)
    np.testing.assert_allclose(logits(load_model(out)[0]), apart, atol=2e-4)
    assert np.abs(apart - before).max() > 0.05


def test_patterns_of_ranks_and_alphas(tmp_path):
    """A key is the end of a module's path, or an expression for it; the first that fits counts."""
    checkpoint = made(make_unified(tmp_path / "hf"))
    rank = lambda path: 8 if path.endswith("q_proj") else 2 if path.endswith("layers.1.mlp.up_proj") else RANK  # noqa: E731
    tensors, products = peft_tensors(checkpoint, SPELLINGS[0], rank)
    more = {
        "rank_pattern": {"q_proj": 8, r"layers\.1\.mlp\.up_proj": 2},
        "alpha_pattern": {r".*\.layers\.0\.self_attn\..*": 20, "proj": 1},
    }
    adapter = write_peft(tmp_path / "adapter", tensors, **more)
    out = converted(checkpoint, tmp_path / "out", "--adapter-path", str(adapter))
    alpha = lambda path: 20 if path.startswith("layers.0.self_attn.") else 6  # noqa: E731
    assert check_sum(checkpoint, out, products, lambda path: alpha(path) / rank(path)) == len(products)


def experts_adapter(checkpoint: Checkpoint, turned: bool) -> tuple[dict, dict]:
    """PEFT's `target_parameters`, both of a layer's: one wraps the other. Products as PEFT's description has them:
    A [rank * experts, in], B [out, rank * experts], delta[e] = B[:, :, e] A[e].
    """
    tensors, products = {}, {}
    for layer in (0, 1):
        for nest, part in (("", "gate_up_proj"), (".base_layer", "down_proj")):
            path = f"layers.{layer}.experts"
            experts, rows, columns = checkpoint.weights[f"model.language_model.{path}.{part}"].shape
            rows, columns = (columns, rows) if turned else (rows, columns)
            a, b = factors(rows, columns, RANK * experts, seed=layer)
            name = f"base_model.model.model.language_model.{path}{nest}"
            tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
            stacked = np.array(a).reshape(experts, RANK, columns), np.array(b).reshape(rows, RANK, experts)
            product = np.einsum("ore,eri->eio" if turned else "ore,eri->eoi", stacked[1], stacked[0])
            halves = np.split(product, 2, axis=1) if part == "gate_up_proj" else [product]
            names = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
            products |= {f"{path}.switch_glu.{n}": half for n, half in zip(names, halves, strict=True)}
    return tensors, products


def make_lean_moe(folder: Path) -> Checkpoint:
    """Experts whose two parameters have unlike shapes, as real ones: 2 x 48 rows of 64, 64 rows of 48."""
    checkpoint = make_moe(folder)
    checkpoint.config["text_config"] = checkpoint.config["text_config"] | {"moe_intermediate_size": 48}
    for name, value in checkpoint.weights.items():
        if "experts." in name:
            cut = value[:, :96] if name.endswith("gate_up_proj") else value[..., :48]
            checkpoint.weights[name] = mx.contiguous(cut)
    return checkpoint


@pytest.mark.parametrize("turned", [False, True], ids=["out first", "in first"])
def test_peft_on_all_experts_of_a_layer(tmp_path, monkeypatch, turned):
    checkpoint = made(make_lean_moe(tmp_path / "hf"))
    tensors, products = experts_adapter(checkpoint, turned)
    adapter = write_peft(tmp_path / "adapter", tensors, target_parameters=["experts.gate_up_proj"])
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 3000)
    out = converted(checkpoint, tmp_path / "out", "--adapter-path", str(adapter))
    assert check_sum(checkpoint, out, products, lambda path: 6 / RANK) == 6


def test_parts_without_use_are_left_out_and_counted(tmp_path, capsys):
    """Towers, and K/V of layers that read another layer's: the published files hold them, nobody reads them."""
    checkpoint = made(make_e2b(tmp_path / "hf"))
    tensors, products = peft_tensors(checkpoint, SPELLINGS[0])
    shared = {path for path in products if path.split(".")[1] in "23" and path.endswith(("k_proj", "v_proj"))}
    assert len(shared) == 4
    a, b = factors(3, 5)
    for tower in ("vision_tower.encoder.layers.0.self_attn.q_proj.linear", "embed_vision.embedding_projection"):
        tensors |= {
            f"base_model.model.model.{tower}.lora_A.weight": a, f"base_model.model.model.{tower}.lora_B.weight": b
        }  # fmt: skip
    adapter = write_peft(tmp_path / "adapter", tensors)
    out = converted(checkpoint, tmp_path / "out", "--adapter-path", str(adapter))
    count = len(products) - len(shared)
    assert f"fused into {count} matrices (6 adapters of unused parts left out)" in capsys.readouterr().out
    products = {path: value for path, value in products.items() if path not in shared}
    assert check_sum(checkpoint, out, products, lambda path: 6 / RANK) == count


def test_bf16_is_rounded_once_and_q_quantises_the_sum(tmp_path):
    checkpoint = make_unified(tmp_path / "hf")
    checkpoint.save()
    tensors, products = peft_tensors(checkpoint, SPELLINGS[0])
    tensors = {name: value.astype(mx.bfloat16) for name, value in tensors.items()}
    adapter = write_peft(tmp_path / "adapter", tensors)
    assert run(checkpoint, tmp_path / "out", "--adapter-path", str(adapter)) == 0
    assert run(checkpoint, tmp_path / "out4", "-q", "--adapter-path", str(adapter)) == 0
    (plain, _), (quantised, _) = load(tmp_path / "out"), load(tmp_path / "out4")
    for path in products:
        a, b = (tensors[f"{SPELLINGS[0]}{path}.lora_{end}.weight"].astype(mx.float32) for end in "AB")
        base = checkpoint.weights[f"model.language_model.{path}.weight"].astype(mx.float32)
        name = f"language_model.model.{path}."
        want = (base + 6 / RANK * (b @ a)).astype(mx.bfloat16)
        assert np.mean(np.array(plain[f"{name}weight"] != want)) < 1e-3  # the sum's order may move a tie
        for part, value in zip(("weight", "scales", "biases"), mx.quantize(plain[f"{name}weight"], 64, 4), strict=True):
            assert mx.array_equal(quantised[f"{name}{part}"], value)


def test_onto_dequantised_weights(tmp_path):
    """An adapter that was trained beside a compressed-tensors base."""
    checkpoint = make_unified(tmp_path / "hf")
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    parts, values = packed(np.array(checkpoint.weights.pop(name).astype(mx.float32), np.float64), 4, 32, True)
    checkpoint.weights |= {name.removesuffix("weight") + end: tensor for end, tensor in parts.items()}
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    checkpoint.config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"a": {"weights": weights}},
    }  # fmt: skip
    checkpoint.save()
    a, b = factors(128, 64)
    path = "base_model.model.model.language_model.layers.0.mlp.up_proj"
    adapter = write_peft(tmp_path / "adapter", {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b})
    written, _ = load(converted(checkpoint, tmp_path / "out", "--adapter-path", str(adapter)))
    found = np.array(written["language_model.model.layers.0.mlp.up_proj.weight"])
    np.testing.assert_allclose(found, values + 1.5 * np.array(b @ a), atol=1e-6)


def test_the_drafter_of_a_pair_stays_as_it_is(tmp_path):
    checkpoint, drafter = make_unified(tmp_path / "hf"), make_drafter(tmp_path / "hf-assistant")
    drafter.config["text_config"] = drafter.config["text_config"] | {
        "attention_k_eq_v": True, "num_global_key_value_heads": 1
    }  # fmt: skip
    drafter.config["backbone_hidden_size"] = 64
    for name, shape in (("pre_projection", (64, 128)), ("post_projection", (64, 64))):
        drafter.weights[f"{name}.weight"] = mx.ones(shape, mx.bfloat16)
    checkpoint.save()
    drafter.save()
    tensors, _ = peft_tensors(checkpoint, SPELLINGS[0])
    adapter = write_peft(tmp_path / "adapter", tensors)
    assert run(checkpoint, tmp_path / "out", "--pair", "--adapter-path", str(adapter)) == 0
    written, _ = load(tmp_path / "out-assistant")
    assert all(mx.array_equal(written[name], value) for name, value in drafter.weights.items())


# ---- refusals ------------------------------------------------------------------------------------------------------


def add(name: str, shape: tuple[int, ...] = (4, 4)):
    return lambda config, tensors: tensors.update({name: mx.zeros(shape)})


def setting(**more):
    return lambda config, tensors: config.update(more)


def cut(config, tensors):
    name = next(iter(tensors))
    tensors[name] = tensors[name][:, :-1]


def lonely(config, tensors):
    tensors.pop(next(name for name in tensors if "lora_B" in name))


def spelled_twice(config, tensors):
    name = next(iter(tensors))
    path = name.split(".lora_")[0]
    for end in ("lora_A.weight", "lora_B.weight"):
        tensors[f"{path.replace('base_model.model.', '')}.{end}"] = tensors[f"{path}.{end}"]


Q = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
HEAD = {f"base_model.model.lm_head.lora_{end}.weight": mx.zeros((4, 4)) for end in "AB"}
TABLE = {
    "base_model.model.model.language_model.embed_tokens.lora_embedding_A": mx.zeros((4, 96)),
    "base_model.model.model.language_model.embed_tokens.lora_embedding_B": mx.zeros((64, 4)),
}  # fmt: skip
FAULTS = {
    "DoRA": (setting(use_dora=True), "use_dora is True"),
    "a magnitude": (add(f"{Q}.lora_magnitude_vector"), "a magnitude of DoRA"),
    "modules_to_save": (setting(modules_to_save=["lm_head"]), "modules_to_save is ['lm_head']"),
    "a saved module": (add("base_model.model.model.language_model.norm.weight", (64,)), "a trained weight itself"),
    "a bias": (add(f"{Q}.lora_B.bias"), "of a kind that is not fused"),
    "another kind": (setting(peft_type="IA3"), "peft_type is 'IA3'"),
    "PiSSA": (setting(init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
    "aLoRA": (setting(alora_invocation_tokens=[1, 2]), "alora_invocation_tokens is [1, 2]"),
    "replicated layers": (setting(layer_replication=[[0, 2], [1, 2]]), "layer_replication"),
    "another base": (cut, "expected floats of [rank, 64] and [128, rank] by the model"),
    "no counterpart": (lonely, "has no counterpart"),
    "two spellings": (spelled_twice, "is a second adapter of layers.0."),
    "the head": (lambda c, t: t.update(HEAD), "finds no matrix 'lm_head'"),
    "the table": (lambda c, t: t.update(TABLE), "the table is the output head too"),
    "a layer more": (
        lambda c, t: t.update({n.replace("layers.0.", "layers.7."): v for n, v in t.items()}),
        "finds no matrix 'layers.7.",
    ),
    "no v_proj where V is K": (
        lambda c, t: t.update(
            {f"{Q.replace('0.self_attn.q', '1.self_attn.v')}.lora_{end}.weight": mx.zeros((4, 4)) for end in "AB"}
        ),
        "finds no matrix 'layers.1.self_attn.v_proj'",
    ),
    "another rank": (setting(r=16), "r is 16 for model.language_model.layers.0."),
    "no alpha": (setting(lora_alpha=None), "lora_alpha is None"),
    "a text as alpha": (setting(lora_alpha="6"), "lora_alpha is '6'"),
    "a broken pattern": (setting(rank_pattern={"(": 3}), "are no expressions"),
    "a pattern that is a list": (setting(alpha_pattern=["q_proj"]), "alpha_pattern as objects"),
    "integers": (lambda c, t: t.update({f"{Q}.lora_A.weight": mx.zeros((4, 64), mx.int32)}), "I32 [4, 64]"),
    "nothing": (lambda c, t: t.clear(), "the adapter has no tensors"),
}  # fmt: skip


def refusal(checkpoint: Checkpoint, adapter: Path, capsys) -> str:
    """The one line with which an adapter is refused; nothing is written."""
    out = adapter.parent / "out"
    assert run(checkpoint, out, "--adapter-path", str(adapter)) == 2 and not out.exists()
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said


@pytest.mark.parametrize("case", FAULTS)
def test_refused_by_name(tmp_path, capsys, case):
    fault, says = FAULTS[case]
    checkpoint = make_unified(tmp_path / "hf")
    checkpoint.save()
    tensors, _ = peft_tensors(checkpoint, SPELLINGS[0])
    config = PEFT | PEFT_DEFAULTS
    fault(config, tensors)
    adapter = write(tmp_path / "adapter", config, "adapter_model.safetensors", tensors)
    said = refusal(checkpoint, adapter, capsys)
    assert says in said and str(adapter) in said, said


MLX_FAULTS = {
    "DoRA": (setting(fine_tune_type="dora"), "fine_tune_type is 'dora'"),
    "full fine-tuning": (setting(fine_tune_type="full"), "fine_tune_type is 'full'"),
    "no scale": (setting(lora_parameters={"rank": 4, "alpha": 8}), "lora_parameters.scale is None"),
    "a magnitude": (add("language_model.model.layers.0.self_attn.q_proj.m", (256,)), "a magnitude of DoRA"),
    "two experts less": (
        lambda c, t: t.update(
            {f"language_model.model.layers.0.experts.switch_glu.up_proj.lora_{e}": v for e, v in
             {"a": mx.zeros((8, 64)), "b": mx.zeros((2, 64, 4))}.items()}
        ),
        "expected floats of [4, rank, 64] and [4, 64, rank]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MLX_FAULTS)
def test_refused_by_name_of_mlx_lm(tmp_path, capsys, case):
    fault, says = MLX_FAULTS[case]
    checkpoint = make_moe(tmp_path / "hf")
    checkpoint.save()
    path = "language_model.model.layers.0.self_attn.q_proj"
    config, tensors = dict(MLX), {f"{path}.lora_a": mx.zeros((64, 4)), f"{path}.lora_b": mx.zeros((4, 128))}
    fault(config, tensors)
    adapter = write(tmp_path / "adapter", config, "adapters.safetensors", tensors)
    said = refusal(checkpoint, adapter, capsys)
    assert says in said, said


def test_experts_that_fit_twice(tmp_path, capsys):
    """Shapes alone tell which parameter an adapter of experts is for."""
    checkpoint = make_moe(tmp_path / "hf")  # down: 64 rows of 64
    checkpoint.save()
    a, b = factors(64, 64, 4 * RANK)
    path = "base_model.model.model.language_model.layers.0.experts"
    adapter = write_peft(tmp_path / "adapter", {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b})
    assert run(checkpoint, tmp_path / "out", "--adapter-path", str(adapter)) == 2
    assert "fits more than one parameter of layers.0.experts" in capsys.readouterr().err
    a, b = factors(64, 63, 4 * RANK)
    write_peft(adapter, {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b})
    assert run(checkpoint, tmp_path / "out", "--adapter-path", str(adapter)) == 2
    said = capsys.readouterr().err
    assert f"{path}.lora_A.weight" in said and "[4 x rank, 64] and [128, 4 x rank]" in said and said.count("\n") == 1


def test_folders_that_are_no_adapters(tmp_path, capsys, monkeypatch):
    checkpoint = make_unified(tmp_path / "hf")
    checkpoint.save()
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "adapter_config.json").write_text(json.dumps(PEFT))
    (tmp_path / "pickled" / "adapter_model.bin").write_bytes(b"x")
    for adapter, says in (
        ("nowhere", "is no folder"), ("empty", "has no adapter_config.json"),
        ("pickled", "has no adapter_model.safetensors"), ("hf/config.json", "is no folder"),
    ):  # fmt: skip
        assert run(checkpoint, tmp_path / "out", "--adapter-path", str(tmp_path / adapter)) == 2
        said = capsys.readouterr().err
        assert says in said and said.count("\n") == 1 and not (tmp_path / "out").exists(), said


def test_an_adapter_on_the_hub(tmp_path, capsys, monkeypatch):
    checkpoint = make_unified(tmp_path / "hf")
    checkpoint.save()
    tensors, products = peft_tensors(checkpoint, SPELLINGS[0])
    adapter = write_peft(tmp_path / "adapter", tensors)
    asked = []

    def download(name, allow_patterns):
        asked.append(name)
        return str(adapter)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert run(checkpoint, tmp_path / "out", "--adapter-path", "me/lora") == 0 and asked == ["me/lora"]
    assert f"fused into {len(products)} matrices" in capsys.readouterr().out
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("x"))
    )
    assert run(checkpoint, tmp_path / "new", "--adapter-path", "me/lora") == 2
    assert "'me/lora' is no folder, nor in the hub's cache" in capsys.readouterr().err


def test_check_tells_the_difference(tmp_path, capsys):
    """Against the base, what was fused is a difference, named."""
    checkpoint = make_unified(tmp_path / "hf")
    checkpoint.save()
    tensors, _ = peft_tensors(checkpoint, SPELLINGS[0])
    adapter = write_peft(tmp_path / "adapter", tensors)
    assert run(checkpoint, tmp_path / "out", "--adapter-path", str(adapter)) == 0
    assert main(["check", str(tmp_path / "out")]) == 0
    assert main(["check", str(tmp_path / "out"), "--against", str(checkpoint.folder)]) == 1
    assert "layers.0.self_attn.q_proj.weight' differs from the source" in capsys.readouterr().out


def test_ranks_of_all_experts_one_above_the_other(tmp_path):
    """As mlx-vlm, and mlx-lm at other times, store `lora_a` of experts: [E * r, C] for [E, r, C]."""
    checkpoint = made(make_moe(tmp_path / "hf"))
    mx.random.seed(5)
    path = "language_model.model.layers.1.experts.switch_glu.up_proj.lora_"
    tensors = {f"{path}a": mx.random.normal((4, RANK, 64)), f"{path}b": mx.random.normal((4, 64, RANK))}
    write(tmp_path / "adapter", MLX, "adapters.safetensors", tensors)
    write(tmp_path / "flat", MLX, "adapters.safetensors", tensors | {f"{path}a": tensors[f"{path}a"].reshape(-1, 64)})
    first, second = (
        load(converted(checkpoint, tmp_path / f"out-{name}", "--adapter-path", str(tmp_path / name)))[0]
        for name in ("adapter", "flat")
    )
    assert all(mx.array_equal(first[name], second[name]) for name in first)


def test_nan_of_an_adapter_is_not_blamed_on_the_weights(tmp_path, capsys):
    checkpoint = made(make_text(tmp_path / "hf"))
    tensors, _ = peft_tensors(checkpoint, SPELLINGS[0])
    name = next(iter(tensors))
    adapter = write_peft(tmp_path / "adapter", tensors | {name: tensors[name] * math.nan})
    assert run(checkpoint, tmp_path / "out", "--adapter-path", str(adapter)) == 2
    error = capsys.readouterr().err
    assert "adapter_model.safetensors" in error and "download the adapter again" in error, error

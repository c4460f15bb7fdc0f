"""Other programs' formats: load, convert and inspect name them in one line, with a command that helps.

Each folder is made as its program makes it, in small: the tables of config.json, the files, the tensors' names.
"""

import json
import re
import shlex
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from test_convert import make_drafter, make_moe, run

from convert import blocks
from convert.cli import _parser, main
from mlx_gemma_mtp import generate, load
from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.files import foreign, hub
from mlx_gemma_mtp.models import loading

GROUP = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}


def compressed(form: str, weights: dict, **more) -> dict:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups} | more


# what config.json has under quantization_config -> how the message calls it
REFUSED = {
    "NVFP4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "NVIDIA ModelOpt NVFP4"),
    "AWQ": ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, "AWQ"),
    "old AWQ": ({"w_bit": 4, "q_group_size": 128, "version": "GEMM"}, "AWQ"),
    "GPTQ": ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}, "GPTQ"),
    "GPTQ without its name": ({"bits": 4, "group_size": 128, "desc_act": False}, "GPTQ"),
    "AutoRound": ({"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_gptq"}, "AutoRound"),
    "Intel's": ({"quant_method": "intel/auto-round", "bits": 4}, "AutoRound"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes 4-bit"),
    "old bitsandbytes": ({"load_in_8bit": True}, "bitsandbytes 8-bit"),
    "HQQ": ({"quant_method": "hqq", "quant_config": {}}, "HQQ"),
    "torchao": ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, "torchao"),
    "EXL3": ({"quant_method": "exl3", "bits": 4.0}, "EXL3"),
    "quanto": ({"quant_method": "quanto", "weights": "int8"}, "quanto"),
    "GGUF": ({"quant_method": "gguf"}, "GGUF"),
    "NVFP4 of compressed-tensors": (
        compressed("nvfp4-pack-quantized", GROUP | {"type": "float", "group_size": 16}),
        "compressed-tensors (nvfp4-pack-quantized)",
    ),
    "sparse": (compressed("marlin-24", GROUP), "compressed-tensors (marlin-24)"),
    "rotated": (
        compressed("pack-quantized", GROUP, transform_config={"config_groups": {"R1": {}}}),
        "transform_config",
    ),
    "3 bits": (compressed("pack-quantized", GROUP | {"num_bits": 3}), "3-bit"),
    "a group of another format": (
        compressed("mixed-precision", GROUP)
        | {"config_groups": {"a": {"format": "pack-quantized", "weights": GROUP}, "b": {"format": "x", "weights": {}}}},
        "format 'x'",
    ),
    "without groups": ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "config_groups"),
    "odd blocks": ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size [128]"),
    "nobody's": ({"quant_method": "frobnicate"}, "quant_method 'frobnicate'"),
    "a number": ({"quant_method": 7, "bits": 4}, "quant_method 7"),
    "a list": ([1], "is [1]"),
    "another table": ({"scheme": "?"}, "which is not known here"),
}
PLAIN = {
    "FP8 in blocks": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "FP8 (blocks of 128 x 128)"),
    "FP8": ({"quant_method": "fp8", "activation_scheme": "static"}, "FP8"),
    "FBGEMM": ({"quant_method": "fbgemm_fp8"}, "FP8 (FBGEMM)"),
    "ModelOpt FP8": ({"quant_method": "modelopt", "quant_algo": "FP8"}, "NVIDIA ModelOpt FP8"),
    "W4A16": (compressed("pack-quantized", GROUP), "compressed-tensors (pack-quantized)"),
    "FP8 of compressed-tensors": (
        compressed("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
        "compressed-tensors (float-quantized)",
    ),
}
FILES = {
    "GGUF": (["gemma-4-31B-it-Q4_K_M.gguf", "config.json"], "GGUF (llama.cpp)"),
    "GGUF in capitals": (["MODEL.GGUF"], "GGUF (llama.cpp)"),
    "LiteRT-LM": (["gemma-4-E2B-it.litertlm"], "LiteRT-LM"),
    "MediaPipe": (["gemma.task"], "LiteRT (MediaPipe)"),
    "TensorFlow Lite": (["gemma.tflite"], "LiteRT (TensorFlow Lite)"),
    "MLC": (["mlc-chat-config.json", "params_shard_0.bin"], "MLC-LLM"),
    "ONNX": (["config.json", "onnx/model_q4.onnx"], "ONNX"),
    "Core ML": (["gemma.mlpackage/Manifest.json"], "a Core ML package"),
    "OpenVINO": (["openvino_model.xml", "openvino_model.bin"], "OpenVINO"),
    "Orbax": (["manifest.ocdbt", "d/abc"], "Orbax (JAX)"),
    "Ollama's blobs": (["sha256-0a1b2c"], "a blob of Ollama"),
    "Ollama's store": (["blobs/sha256-0a", "manifests/registry"], "Ollama's store of models"),
    "HQQ": (["config.json", "qmodel.pt"], "HQQ"),
    "a pickle": (["config.json", "pytorch_model.bin"], "pickles are never loaded"),
    "consolidated": (["consolidated.00.pth", "params.json"], "pickles are never loaded"),
}


@pytest.fixture
def unread(monkeypatch):
    """Reading weights fails."""
    monkeypatch.setattr(loading, "_lazy_tensors", lambda folder: pytest.fail("weights are read"))
    monkeypatch.setattr(blocks, "read", lambda *args: pytest.fail("weights are read"))
    monkeypatch.setattr(mx, "load", lambda *args, **kwargs: pytest.fail("weights are read"))


def refusals(folder: Path, out: Path, capsys) -> list[str]:
    """What load (from Python and from the command line), convert and inspect say about a folder."""
    with pytest.raises(UserError) as error:
        load(folder, "none")
    said = [str(error.value)]
    for command, argv in (
        (generate.main, ["--model", str(folder), "--draft-model", "none", "--prompt", "x"]),
        (main, ["--hf-path", str(folder), "--mlx-path", str(out)]),
        (main, ["inspect", str(folder)]),
    ):
        assert command(argv) == 2
        out_text, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if not line.startswith("note:")]
        assert out_text == "" and len(lines) == 1, (argv, err)
        said.append(lines[0])
    assert not out.exists()
    assert all("\n" not in each for each in said)
    return said


def commands(message: str) -> list[list[str]]:
    """The words of the command that a message ends with."""
    return [shlex.split(each) for each in re.findall(r"mlx-gemma-mtp convert.*?(?=; |$)", message)]


def with_table(folder: Path, table: object) -> Path:
    checkpoint = make_moe(folder)
    checkpoint.config["quantization_config"] = table
    checkpoint.save()
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_quantised_by_others(tmp_path, capsys, unread, case):
    table, name = REFUSED[case]
    folder = with_table(tmp_path / "gemma-4-31B-it-x", table)
    for said in refusals(folder, tmp_path / "out", capsys):
        assert name in said and str(folder) in said and "unquantised original" in said, said
        (words,) = commands(said)
        assert _parser().parse_args(words[2:]).hf_path == "ORIGINAL"


@pytest.mark.parametrize("case", PLAIN)
def test_load_says_that_convert_dequantises(tmp_path, capsys, unread, case):
    table, name = PLAIN[case]
    folder = with_table(tmp_path / "gemma-4-31B-it", table)
    with pytest.raises(UserError) as error:
        load(folder, "none")
    said = str(error.value)
    assert name in said and "convert dequantises them" in said and "unquantised original, google/gemma-4-31B-it" in said
    (words,) = commands(said)
    args = _parser().parse_args(words[2:])
    assert args.hf_path == str(folder) and args.quantize


@pytest.mark.parametrize("case", FILES)
def test_files_of_others(tmp_path, capsys, unread, case):
    names, name = FILES[case]
    folder = tmp_path / "gemma-4-E2B-it"
    config = make_moe(tmp_path / "other").config
    for each in names:
        (folder / each).parent.mkdir(parents=True, exist_ok=True)
        (folder / each).write_text(json.dumps(config) if each == "config.json" else "x")
    for said in refusals(folder, tmp_path / "out", capsys):
        assert name in said and str(folder) in said, said
        if "pickles" not in name:
            (words,) = commands(said)
            assert words == shlex.split(foreign.convert_command("google/gemma-4-E2B-it", "gemma-4-E2B-it-4bit", "-q"))


@pytest.mark.parametrize(
    ("file", "head", "name"),
    [
        ("gemma-4-31B-it-Q4_0.gguf", b"GGUF\3\0\0\0", "GGUF"),
        ("sha256-5f3a", b"GGUF\3\0\0\0", "a blob of Ollama, GGUF"),
        ("weights", b"GGUF\3\0\0\0", "GGUF"),
        ("gemma.litertlm", b"LITERTLM", "LiteRT-LM"),
        ("model", b"\x1c\0\0\0TFL3", "LiteRT"),
        ("gemma.task", b"PK", "LiteRT"),
        ("pytorch_model.bin", b"PK", "pickles are never loaded"),
    ],
)
def test_a_file_where_a_folder_is_expected(tmp_path, capsys, unread, file, head, name):
    (tmp_path / file).write_bytes(head + bytes(40))
    for said in refusals(tmp_path / file, tmp_path / "out", capsys):
        assert f"{tmp_path / file} is a file" in said and name in said, said


def test_a_weight_file_of_a_model_folder(tmp_path, capsys, unread):
    checkpoint = make_moe(tmp_path / "m")
    checkpoint.save()
    for said in refusals(tmp_path / "m" / "model.safetensors", tmp_path / "out", capsys):
        assert said.endswith(f"give its folder, {tmp_path / 'm'}"), said


ADAPTERS = {
    "PEFT": ({"peft_type": "LORA", "base_model_name_or_path": "google/gemma-4-31B-it"}, "adapter_model.safetensors"),
    "PEFT on a quantised base": (
        {"peft_type": "LORA", "base_model_name_or_path": "unsloth/gemma-4-31B-it-unsloth-bnb-4bit"},
        "adapter_model.safetensors",
    ),
    "mlx-lm": ({"fine_tune_type": "lora", "model": "mlx-community/gemma-4-31b-it-4bit"}, "adapters.safetensors"),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_is_no_model(tmp_path, capsys, unread, case):
    config, file = ADAPTERS[case]
    folder = tmp_path / "my adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / file).write_bytes(b"")
    for said in refusals(folder, tmp_path / "out", capsys):
        assert f"a LoRA adapter ({case.split()[0]})" in said
        (words,) = commands(said)
        args = _parser().parse_args(words[2:])
        assert (args.hf_path, args.adapter_path) == ("google/gemma-4-31B-it", str(folder))


def test_a_file_of_an_adapter_and_one_that_is_a_pickle(tmp_path, capsys, unread):
    config, file = ADAPTERS["mlx-lm"]
    for name in ("adapter_config.json", file):
        (tmp_path / name).write_text(json.dumps(config))
    for name in ("adapter_config.json", file):
        for said in refusals(tmp_path / name, tmp_path / "out", capsys):
            assert "LoRA adapter (mlx-lm)" in said and "; fuse it" in said
    (tmp_path / file).unlink()
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTERS["PEFT"][0]))
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    for said in refusals(tmp_path, tmp_path / "out", capsys):
        assert "LoRA adapter (PEFT)" in said and "its tensors as safetensors, then fuse it" in said


def test_other_adapters_and_those_without_a_config(tmp_path, capsys, unread):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapters.safetensors").write_bytes(b"")
    for said in refusals(folder, tmp_path / "out", capsys):
        assert "LoRA adapter (mlx-lm)" in said and "--hf-path BASE" in said
    (folder / "adapters.safetensors").unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING", "base_model_name_or_path": "b/c"}')
    for said in refusals(folder, tmp_path / "out", capsys):
        assert "'PROMPT_TUNING' adapter (PEFT)" in said and "merge it into b/c with PEFT" in said


def test_a_model_beside_foreign_files_is_a_model(tmp_path):
    """What lies beside weights in safetensors does not matter: an adapter, a GGUF, MLX's own tables."""
    checkpoint = make_moe(tmp_path / "m")
    checkpoint.save()
    for name in ("adapters.safetensors", "x.gguf", "training_args.bin"):
        (tmp_path / "m" / name).write_bytes(b"x")
    (tmp_path / "m" / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": null}}')
    assert run(checkpoint, tmp_path / "out", "-q") == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["bits"] == 4 and foreign.of_config(config) is None
    for table in ({"group_size": 64, "bits": 4, "quant_method": "mlx"}, {"group_size": 64, "bits": 4, "mode": "mxfp4"}):
        assert foreign.of_config({"model_type": "gemma4", "quantization_config": table}) is None
        assert foreign.of_config({"model_type": "gemma4", "quantization": table}) is None


def test_tables_in_other_places(tmp_path, capsys, unread):
    """hf_quant_config.json, text_config, `compression_config`, and no table at all."""
    checkpoint = make_moe(tmp_path / "a")
    checkpoint.save()
    (tmp_path / "a" / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    for said in refusals(tmp_path / "a", tmp_path / "out", capsys):
        assert "NVIDIA ModelOpt NVFP4" in said
    for key, name in (("text_config", "HQQ"), ("compression_config", "compressed-tensors")):
        shutil.rmtree(tmp_path / "a")
        checkpoint = make_moe(tmp_path / "a")
        if key == "text_config":
            checkpoint.config[key] = checkpoint.config[key] | {"quantization_config": {"quant_method": "hqq"}}
        else:
            checkpoint.config[key] = {"quant_method": "compressed-tensors", "format": "dense"}
        checkpoint.save()
        for said in refusals(tmp_path / "a", tmp_path / "out", capsys):
            assert name in said


@pytest.mark.parametrize(
    ("end", "name"),
    [
        (".qweight", "AWQ"),
        (".weight_packed", "compressed-tensors"),
        (".weight_scale_2", "ModelOpt"),
        (".trellis", "EXL3"),
    ],
)
def test_tensors_that_the_config_does_not_tell_of(tmp_path, capsys, unread, end, name):
    checkpoint = make_moe(tmp_path / "m")
    path = "model.language_model.layers.0.self_attn.q_proj"
    checkpoint.weights[path + end] = checkpoint.weights.pop(f"{path}.weight")
    checkpoint.save()
    with pytest.raises(UserError) as error:
        loading.load_target(tmp_path / "m")
    said = [str(error.value)]
    for argv in (["--hf-path", f"{tmp_path}/m", "--mlx-path", f"{tmp_path}/out"], ["inspect", f"{tmp_path}/m"]):
        assert main(argv) == 2
        said.append(capsys.readouterr().err.rstrip("\n"))
    for each in said:
        assert name in each and path in each and "unquantised original" in each and "\n" not in each


def test_a_drafter(tmp_path, capsys, unread):
    """Refused as the target is, whichever side of a pair it is."""
    checkpoint = make_drafter(tmp_path / "gemma-4-12B-it-assistant")
    checkpoint.config["quantization_config"] = {"quant_method": "awq"}
    checkpoint.save()
    with pytest.raises(UserError, match=r"AWQ weights .* --hf-path google/gemma-4-12B-it-assistant "):
        load(None, checkpoint.folder)


def test_another_model_is_told_by_its_type(tmp_path, capsys):
    checkpoint = make_moe(tmp_path / "m")
    checkpoint.config |= {"model_type": "llama", "quantization_config": {"quant_method": "awq"}}
    checkpoint.save()
    for said in refusals(tmp_path / "m", tmp_path / "out", capsys):
        assert "model_type 'llama'" in said and "AWQ" not in said


@pytest.mark.parametrize(
    ("name", "original"),
    [
        ("nvidia/Gemma-4-31B-IT-NVFP4", "google/gemma-4-31B-it"),
        ("unsloth/gemma-4-12B-it-unsloth-bnb-4bit", "google/gemma-4-12B-it"),
        ("mlx-community/gemma-4-26b-a4b-it-4bit", "google/gemma-4-26B-A4B-it"),
        ("gemma-4-E2B-it-Q4_K_M", "google/gemma-4-E2B-it"),
        ("google/gemma-4-E4B-qat-q4_0-gguf", "google/gemma-4-E4B-qat-q4_0-unquantized"),
        ("google/gemma-4-12B-it-qat-w4a16-ct", "google/gemma-4-12B-it-qat-q4_0-unquantized"),
        ("x/gemma-4-31B-it-assistant-FP8", "google/gemma-4-31B-it-assistant"),
        ("x/gemma-4-31B-it-abliterated-AWQ", None),
        ("x/gemma-4-31B-itchy", None),
        ("x/gemma-3-27b-it-AWQ", None),
        ("model", None),
    ],
)
def test_the_original_of_a_name(name, original):
    assert foreign.original(name) == original


def test_hub_repositories_of_others(tmp_path, monkeypatch, capsys, unread):
    """Only what the hub lists tells: nothing of it is downloaded."""
    empty = tmp_path / "models--google--gemma-4-12B-it-qat-q4_0-gguf" / "snapshots" / "abc"
    empty.mkdir(parents=True)

    def no_weights(*args, **kwargs):
        raise ValueError("is not a safetensors repo")

    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **kwargs: str(empty))
    monkeypatch.setattr(hub, "list_repo_files", lambda *args, **kwargs: ["README.md", "gemma-4-12B-it-Q4_0.gguf"])
    monkeypatch.setattr("huggingface_hub.hf_hub_download", no_weights)
    name = "google/gemma-4-12B-it-qat-q4_0-gguf"
    for argv in (["--hf-path", name, "--mlx-path", str(tmp_path / "out")], ["inspect", name]):
        assert main(argv) == 2
        said = capsys.readouterr().err
        assert "GGUF (llama.cpp)" in said and "--hf-path google/gemma-4-12B-it-qat-q4_0-unquantized" in said, said
    with pytest.raises(UserError, match=f"{name} has no weights in safetensors, but .*GGUF"):
        load(name, "none")


@pytest.mark.parametrize(("table", "converts"), [(REFUSED["AWQ"][0], False), (PLAIN["W4A16"][0], True)])
def test_a_hub_repository_is_refused_before_its_download(tmp_path, monkeypatch, capsys, table, converts):
    """By config.json, which is downloaded first; convert goes on where it dequantises."""
    snapshot, asked = with_table(tmp_path / "snapshot", table), []

    def download(name, allow_patterns, **more):
        asked.append("*.safetensors" in allow_patterns)
        return str(snapshot)

    monkeypatch.setattr(hub, "snapshot_download", download)
    name = "org/gemma-4-31B-it-x"
    with pytest.raises(UserError, match=rf"^{name} holds .* weights"):
        load(name, "none")
    assert asked == [False]
    assert main(["--hf-path", name, "--mlx-path", str(tmp_path / "out")]) == (0 if converts else 2)
    said = capsys.readouterr().err
    assert asked == [False, False] + [True] * converts and ("AWQ weights" in said) != converts, said


def test_names_of_ollama(tmp_path, capsys, unread, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"'gemma4:31b'.* Ollama"):
        load("gemma4:31b", "none")


ODD = 'it\'s a "model" $HOME; x'


def test_commands_are_quoted_for_a_shell(tmp_path, capsys, unread):
    """A folder's name with spaces and quotes comes back whole out of every suggested command."""
    folder = with_table(tmp_path / ODD, PLAIN["FP8"][0])
    with pytest.raises(UserError) as error:
        load(folder, "none")
    (words,) = [shlex.split(each) for each in re.findall(r"mlx-gemma-mtp convert.*?(?=; better)", str(error.value))]
    args = _parser().parse_args(words[2:])
    assert (args.hf_path, args.mlx_path) == (str(folder), f"{ODD}-4bit")
    adapter = tmp_path / f"{ODD} adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": ODD}))
    with pytest.raises(UserError) as error:
        load(adapter, "none")
    words = shlex.split(str(error.value).partition("base: ")[2])
    args = _parser().parse_args(words[2:])
    assert (args.hf_path, args.adapter_path) == (ODD, str(adapter))


def test_a_name_that_looks_like_a_flag():
    words = shlex.split(foreign.convert_command("-x", "--y", "-q"))
    args = _parser().parse_args(words[2:])
    assert (args.hf_path, args.mlx_path) == ("-x", "--y")


@pytest.mark.parametrize(
    "config, says",
    [
        (ADAPTERS["PEFT"][0] | {"use_dora": True}, "is a DoRA adapter (PEFT)"),
        (ADAPTERS["mlx-lm"][0] | {"fine_tune_type": "dora"}, "is a DoRA adapter (mlx-lm)"),
        (ADAPTERS["mlx-lm"][0] | {"fine_tune_type": "full"}, "is a 'full' fine-tuning's adapter (mlx-lm)"),
    ],
    ids=["DoRA of PEFT", "DoRA of mlx-lm", "full"],
)
def test_what_convert_does_not_fuse_is_not_sent_there(tmp_path, capsys, unread, config, says):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    name = "adapter_model.safetensors" if "peft_type" in config else "adapters.safetensors"
    (folder / name).write_bytes(b"")
    for said in refusals(folder, tmp_path / "out", capsys):
        assert says in said and "merge it into google/gemma-4-31B-it with" in said and "--adapter-path" not in said

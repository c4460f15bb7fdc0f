"""The command line: what it prints where, and one line with exit code 2 for bad input."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from held_out import PROMPTS

from mlx_gemma_mtp import __version__, generate
from mlx_gemma_mtp.files import hub

KEYS = {
    "prompt_tokens", "prompt_tps", "generation_tokens", "generation_tps", "batch_generation_tps", "ttft_s", "rounds",
    "drafted", "accepted", "tokens_per_round", "acceptance_by_position", "host_syncs", "peak_memory_gb", "mtp",
    "mtp_reason", "blas", "accept",
}  # fmt: skip

RECORD = {"prompt", "text", "reasoning", "tool_calls", "tokens", "end_token", "finish_reason", "stats"}
TOOLS = json.dumps(
    [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}]
)
CALLED = [
    {"role": "user", "content": "What time is it?"},
    {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "now", "arguments": "{}"}}]},
    {"role": "tool", "content": "12:00"},
]


def run(capsys, *argv: str) -> tuple[int, str, str]:
    """main's exit code, and what it printed."""
    code = generate.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


def command(*argv: str, env: dict | None = None, **options) -> subprocess.Popen:
    environment = os.environ | {"MLX_GEMMA_MTP_BLAS": "off", "PYTHONPATH": str(Path(__file__).parents[2])} | (env or {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL} | options
    return subprocess.Popen([sys.executable, "-m", "mlx_gemma_mtp.generate", *argv], env=environment, **pipes)


def test_one_prompt_streams_its_text(capsys):
    argv = ("--prompt", PROMPTS[0], "--max-tokens", 24, "--stats", "--num-draft-tokens", 3)
    code, out, err = run(capsys, *argv)
    assert code == 0 and out.startswith("```python\n") and out.endswith("\n")
    assert "small bundled model" in err and "MTP on" in err and "tokens a round" in err and "BLAS" in err
    assert "Traceback" not in err


def test_the_bundled_model_shows_what_mtp_is_worth(capsys):
    argv = ("--prompt", PROMPTS[0], "--max-tokens", 16, "--num-draft-tokens", 3)
    _, _, err = run(capsys, *argv)
    found = re.search(r"MTP: (\S+) tokens a pass of the target; .*\((\S+)x\) over 16 tokens, the same text", err)
    assert found and 1 < float(found[1]) <= 4 and float(found[2]) > 0
    assert "a pass of the target" not in run(capsys, *argv, "--json")[2]
    assert "a pass of the target" not in run(capsys, "--prompt", "x", "--num-draft-tokens", 0, "--max-tokens", 4)[2]


def test_samples_of_a_prompt_have_the_seeds_that_follow(capsys):
    argv = ("--prompt", PROMPTS[1], "--prompt", PROMPTS[2], "--temp", 1, "--max-tokens", 6, "--num-draft-tokens", 2)
    code, out, _ = run(capsys, *argv, "--seed", 5, "--samples", 2)
    heads = [line for line in out.splitlines() if line.startswith("===")]
    assert code == 0 and [head[:6] for head in heads] == ["=== 1:", "=== 2:", "=== 3:", "=== 4:"]
    assert heads[0][6:] == heads[1][6:] != heads[2][6:]
    _, out, _ = run(capsys, *argv, "--seed", 5, "--samples", 2, "--json")
    records = [json.loads(line) for line in out.splitlines()]
    assert [each["prompt"] for each in records] == [PROMPTS[1]] * 2 + [PROMPTS[2]] * 2
    _, out, _ = run(capsys, *argv, "--seed", 6, "--json")
    assert [json.loads(line)["tokens"] for line in out.splitlines()] == [each["tokens"] for each in records[1::2]]


def test_a_text_that_repeats_itself_is_ended(capsys):
    argv = ("--prompt", PROMPTS[0], "--temp", 0, "--ignore-eos", "--max-tokens", 300, "--logit-bias", "290=1000")
    code, out, err = run(capsys, *argv, "--stop-repetition", 8, "--stats")
    assert code == 0 and out == "22222222\n" and "end: repetition" in err
    for flag, value in (("--stop-repetition", 3), ("--samples", 0)):
        code, out, err = run(capsys, "--prompt", "x", flag, value)
        assert (code, out) == (2, "") and err.count("\n") == 1 and str(value) in err and "expected" in err


def test_rejection_says_that_the_text_follows_the_drafts(capsys):
    argv = ["--prompt", PROMPTS[0], "--temp", "1", "--seed", "2", "--max-tokens", "24", "--num-draft-tokens", "3"]
    code, out, err = run(capsys, *argv, "--accept", "rejection", "--stats")
    assert code == 0 and "accepted (rejection);" in err and "another text of the same distribution" in err
    assert out != run(capsys, *argv)[1]


def test_several_prompts_come_whole_and_in_order(capsys, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text(f"{PROMPTS[1]}\n\n{PROMPTS[2]}\n")
    code, out, _ = run(capsys, "--prompt", PROMPTS[0], "--prompt-file", file, "--max-tokens", 8)
    headers = [line for line in out.splitlines() if line.startswith("=== ")]
    assert code == 0 and [h[:7] for h in headers] == ["=== 1: ", "=== 2: ", "=== 3: "]


def test_a_timeout_prints_what_there_is(capsys):
    argv = ("--prompt", PROMPTS[0], "--max-tokens", 8000, "--ignore-eos", "--timeout", 1)
    code, out, err = run(capsys, *argv)
    assert code == 0 and out.strip() and "MTP:" not in err
    assert err.splitlines()[-1] == "note: prompt 1 was ended by --timeout 1"
    code, out, err = run(capsys, *argv, "--json")
    assert code == 0 and json.loads(out)["finish_reason"] == "timeout"


def test_limits_reach_the_load(monkeypatch):
    asked = {}
    monkeypatch.setattr("mlx_gemma_mtp.engine.load.load", lambda *_, **options: asked.update(options))
    flags = ["--prompt", "x", "--memory-limit", "7.5", "--wired-limit", "--kv-bits", "4", "--kv-bits-rings"]
    args = generate.parser().parse_args(flags)
    generate.load_engine(args, 3000)
    assert asked["memory_limit"] == 7_500_000_000 and asked["wired_limit"] is True
    assert asked["kv_bits"] == 4 and asked["kv_bits_rings"] is True
    assert asked["max_waiting"] == 3000 and asked["max_rows"] == 8  # a command's own prompts are not too many


def test_json_is_one_object_a_prompt(capsys):
    argv = ["--prompt", PROMPTS[3], "--prompt", PROMPTS[4], "--max-tokens", "12", "--json"]
    code, out, _ = run(capsys, *argv)
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [r["prompt"] for r in records] == PROMPTS[3:5]
    for record in records:
        assert set(record) == RECORD and set(record["stats"]) >= KEYS
        assert record["text"] and record["stats"]["generation_tokens"] == len(record["tokens"]) <= 12
    _, plain, _ = run(capsys, *argv, "--num-draft-tokens", "0")
    assert [json.loads(line)["tokens"] for line in plain.splitlines()] == [r["tokens"] for r in records]


def test_messages_tools_and_thoughts(capsys, tmp_path):
    """A tool's result, behind which the template opens a thought; as a file and as text, with a prompt beside it."""
    file = tmp_path / "messages.json"
    file.write_text(json.dumps(CALLED))
    tools = tmp_path / "tools.json"
    tools.write_text(TOOLS)
    settings = ("--thinking", "--thinking-budget", 4, "--max-tokens", 12, "--temp", 0, "--ignore-eos")
    argv = ("--messages", file, "--tools", tools, *settings)
    code, out, _ = run(capsys, *argv, "--json")
    record = json.loads(out)
    assert code == 0 and record["prompt"] == CALLED and record["reasoning"] and record["tokens"][4] == 8
    code, out, _ = run(capsys, *argv)
    assert code == 0 and out == record["text"] + "\n" and record["reasoning"] not in out
    both = ("--messages", json.dumps(CALLED), "--prompt", "def f(", "--tools", TOOLS, *settings)
    code, out, _ = run(capsys, *both)
    assert code == 0 and "=== 1: def f(\n" in out and "=== 2: 12:00\n" + record["text"] in out


def test_the_choice_of_tools(capsys):
    """`none` lets no call begin, whatever the bias; control strings count where that is allowed."""
    argv = ("--prompt", "x<turn|>", "--max-tokens", 4, "--temp", 0, "--json", "--logit-bias", "12=1e6")
    _, free, _ = run(capsys, *argv)
    _, none, _ = run(capsys, *argv, "--tools", TOOLS, "--tool-choice", "none")
    assert json.loads(free)["tokens"] == [12] * 4 and 12 not in json.loads(none)["tokens"]
    _, special, _ = run(capsys, *argv, "--allow-special")
    assert json.loads(special)["stats"]["prompt_tokens"] < json.loads(free)["stats"]["prompt_tokens"]


def test_a_forced_call_has_a_line(capsys):
    pytest.importorskip("llguidance")
    argv = ("--prompt", "What time is it?", "--tools", TOOLS, "--tool-choice", "now", "--temp", 0)
    code, out, _ = run(capsys, *argv)
    assert code == 0 and set(out.splitlines()) == {"call now {}"}
    record = json.loads(run(capsys, *argv, "--json")[1])
    assert record["finish_reason"] == "tool_calls" and record["text"] == "" and record["end_token"] is not None
    assert record["tool_calls"][0]["function"] == {"name": "now", "arguments": "{}"}


def test_json_carries_logprobs(capsys):
    argv = ["--prompt", PROMPTS[0], "--temp", "0", "--max-tokens", "5", "--ignore-eos", "--json", "--logprobs", "2"]
    record = json.loads(run(capsys, *argv, "--logit-bias", "300=-inf", "--repetition-penalty", "1.1")[1])
    assert [each["token"] for each in record["logprobs"]] == record["tokens"]
    assert all(len(each["top"]) == 2 and each["logprob"] <= each["top"][0][1] <= 0 for each in record["logprobs"])


def test_standard_input_is_a_prompt(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("été 😀".encode())))
    code, out, _ = run(capsys, "--prompt", "-", "--max-tokens", 2, "--json")
    assert code == 0 and json.loads(out)["prompt"] == "été 😀"


def test_no_drafter_says_why(capsys):
    _, out, _ = run(capsys, "--prompt", "x", "--draft-model", "none", "--max-tokens", 3, "--json")
    stats = json.loads(out)["stats"]
    assert stats["mtp"] is False and "none" in stats["mtp_reason"] and stats["rounds"] == 2


def test_a_seed_repeats_a_text(capsys):
    argv = ["--prompt", PROMPTS[0], "--temp", "1", "--top-k", "50", "--top-p", "0.9", "--max-tokens", "16", "--json"]
    cases = [("7", "4"), ("7", "0"), ("8", "4")]
    outputs = [run(capsys, *argv, "--seed", seed, "--num-draft-tokens", k)[1] for seed, k in cases]
    texts = [json.loads(out)["text"] for out in outputs]
    assert texts[0] == texts[1] != texts[2]


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        generate.main(["--version"])
    assert stop.value.code == 0 and __version__ in capsys.readouterr().out


def broken_model(folder: Path, **changes) -> Path:
    """The bundled target with another config."""
    shutil.copytree(hub.DEMO / "target", folder)
    config = json.loads((folder / "config.json").read_text())
    text = changes.pop("text", {})
    config["text_config"] |= text
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "there is no prompt"),
        (["--prompt", ""], "is empty"),
        (["--prompt", " \n"], "is empty"),
        (["--prompt", "x", "--max-tokens", "0"], "max_tokens is 0"),
        (["--prompt", "x", "--max-tokens", "-5"], "max_tokens is -5"),
        (["--prompt", "x", "--max-tokens", "many"], "invalid int value: 'many'"),
        (["--prompt", "x", "--temp", "-1"], "temperature is -1"),
        (["--prompt", "x", "--top-p", "0"], "top_p is 0"),
        (["--prompt", "x", "--top-k", "0"], "top_k is 0, expected 1 or more, or -1 (off)"),
        (["--prompt", "x", "--seed", "-1"], "seed is -1"),
        (["--prompt", "x", "--seed", str(2**64)], f"seed is {2**64}"),
        (["--prompt", "x", "--min-p", "2"], "min_p is 2.0"),
        (["--prompt", "x", "--repetition-penalty", "0"], "repetition_penalty is 0.0"),
        (["--prompt", "x", "--logit-bias", "the=3"], "--logit-bias is 'the=3', expected ID=BIAS"),
        (["--prompt", "x", "--logit-bias", "4096=3"], "logit_bias has token id 4096"),
        (["--prompt", "x", "--logprobs", "99"], "logprobs is 99"),
        (["--prompt", "x", "--draft-temperature", "0"], "draft_temperature is 0.0"),
        (["--prompt", "x", "--accept", "typical"], "argument --accept: invalid choice: 'typical'"),
        (["--prompt", "x", "--num-draft-tokens", "-1"], "num-draft-tokens is -1"),
        (["--prompt", "x", "--model", "nothing-here"], "no model 'nothing-here'"),
        (["--prompt", "x", "--model", __file__], "is a file"),
        (["--prompt", "x", "--draft-model", "nothing-here"], "no model 'nothing-here'"),
        (["--prompt", "x", "--image", "cat.png"], "'cat.png': image and audio"),
        (["--prompt", "x", "--audio", "cat.wav"], "'cat.wav': image and audio"),
        (["--prompt-file", "nothing-here.txt"], "nothing-here.txt"),
        (["--prompt", "x", "--system-prompt", "y", "--ignore-chat-template"], "system prompt"),
        (["--prompt", "word " * 9000], "expected fewer than the context of 8192"),
        (["--messages", "[]"], "--messages has [], expected a JSON list of chat messages"),
        (["--messages", "{}"], "--messages has {}, expected a JSON list of chat messages"),
        (["--messages", "[1]"], "--messages has [1], expected a JSON list of chat messages"),
        (["--messages", '[{"role": "user"}]'], "a user message has no content"),
        (["--messages", '[{"role": "tool", "content": "x"}]', "--model", "nothing-here"], "a tool message comes first"),
        (["--messages", json.dumps(CALLED), "--ignore-chat-template"], "--messages are given with --ignore-chat"),
        (["--messages", "[{]"], "--messages is no JSON"),
        (["--messages", ""], "--messages '': there is no such file"),
        (["--prompt", "x", "--tools", "nothing-here.json"], "--tools nothing-here.json: there is no such file"),
        (["--prompt", "x", "--tools", "[{]"], "--tools is no JSON"),
        (["--prompt", "x", "--tools", TOOLS, "--tool-choice", "date"], "tool_choice names 'date', expected 'auto'"),
        (["--prompt", "x", "--tool-choice", "required"], "tool_choice is 'required' without tools"),
        (
            ["--prompt", "x", "--tools", TOOLS, "--ignore-chat-template"],
            "--tools are given with --ignore-chat",
        ),
        (["--prompt", "x", "--tools", TOOLS, "--tool-choice", "{'type'}"], "--tool-choice is no JSON"),
        (["--prompt", "x", "--tools", TOOLS, "--tool-choice", "{}"], "tool_choice is {}, expected 'auto'"),
        (
            ["--prompt", "x", "--tools", TOOLS, "--tool-choice", "now", "--ignore-eos", "--model", "nothing-here"],
            "ignore_eos is set and tool_choice forces a call",
        ),
        (["--prompt", "x", "--timeout", "-1"], "--timeout is -1.0, expected seconds above 0"),
        (["--prompt", "x", "--timeout", "nan"], "--timeout is nan, expected seconds above 0"),
        (["--prompt", "x", "--timeout", "soon"], "argument --timeout: invalid float value: 'soon'"),
        (["--prompt", "x", "--memory-limit", "0"], "--memory-limit is 0.0, expected GB above 0"),
        (["--prompt", "x", "--memory-limit", "8e9"], "--memory-limit is 8000000000.0, expected GB above 0"),
        (["--prompt", "x", "--memory-limit", "inf"], "--memory-limit is inf, expected GB above 0"),
        (["--prompt", "x", "--memory-limit", "0.01"], "memory_limit is 10 MB; raise it"),
        (["--prompt", "x", "--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_bad_input_is_one_line(capsys, argv, message):
    code, out, err = run(capsys, *argv)
    lines = [line for line in err.splitlines() if not line.startswith(("This is the small", "note:"))]
    assert code == 2 and out == "" and len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


def test_messages_on_standard_input(capsys, monkeypatch):
    """As a log is piped; the choice of a tool may be OpenAI's object."""
    argv = ("--tools", TOOLS, "--tool-choice", '{"type": "function", "function": {"name": "date"}}', "--messages", "-")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(json.dumps(CALLED).encode())))
    code, _, err = run(capsys, *argv)
    assert code == 2 and "tool_choice names 'date'" in err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(json.dumps(CALLED).encode())))
    code, out, _ = run(capsys, *argv[:2], "--messages", "-", "--max-tokens", 4, "--temp", 0, "--json")
    assert code == 0 and json.loads(out)["prompt"] == CALLED
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"{")))
    code, _, err = run(capsys, "--messages", "-")
    assert code == 2 and "--messages - is no JSON" in err


def test_bad_bytes_on_standard_input(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"abc\xff")))
    code, _, err = run(capsys, "--prompt", "-")
    assert code == 2 and "standard input is not UTF-8 (byte 0xff at 3)" in err


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "llama"}, "model_type 'llama' is not a Gemma 4 target"),
        ({"model_type": "gemma4_assistant"}, "is a drafter"),
        ({"text": {"hidden_size": 100}}, "expected"),
        ({"text": {"sliding_window": None}}, "sliding_window is None"),
    ],
)
def test_broken_models_are_one_line(capsys, tmp_path, changes, message):
    folder = broken_model(tmp_path / "model", **changes)
    code, _, err = run(capsys, "--prompt", "x", "--model", folder)
    last = err.splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and message in last and "Traceback" not in err


def test_a_folder_without_config(capsys, tmp_path):
    code, _, err = run(capsys, "--prompt", "x", "--model", tmp_path)
    assert code == 2 and "it has no config.json" in err.splitlines()[-1]


def test_the_drafter_of_another_target(capsys, tmp_path):
    folder = tmp_path / "drafter"
    shutil.copytree(hub.DEMO / "drafter", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"backbone_hidden_size": 2816}))
    code, _, err = run(capsys, "--prompt", "x", "--draft-model", folder)
    assert code == 2 and "hidden size is 2816, the target's is 192" in err.splitlines()[-1]


def test_ctrl_c_keeps_what_was_made():
    process = command("--prompt", PROMPTS[0], "--max-tokens", "1500", "--ignore-eos", "--stats")
    first = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 130 and first.startswith(b"```python")
    assert b"end: cancelled" in err and b"Traceback" not in err
    (first + rest).decode("utf-8")


def test_a_closed_pipe_is_no_traceback():
    process = command("--prompt", PROMPTS[0], "--max-tokens", "600", "--ignore-eos")
    process.stdout.read(10)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=60) == 1 and b"Traceback" not in err


def test_text_is_utf8_in_any_locale():
    ascii_alone = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    process = command("--prompt", "-", "--max-tokens", "2", "--json", stdin=subprocess.PIPE, env=ascii_alone)
    out, err = process.communicate("é 😀".encode(), timeout=60)
    assert process.returncode == 0, err
    assert json.loads(out.decode("utf-8"))["prompt"] == "é 😀"


def test_a_blas_that_is_none_is_named():
    process = subprocess.run(
        [sys.executable, "-m", "mlx_gemma_mtp.generate", "--prompt", "x"],
        env=os.environ | {"MLX_GEMMA_MTP_BLAS": "/nothing/libx.so", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    if sys.platform.startswith("linux"):
        assert process.returncode == 2 and "MLX_GEMMA_MTP_BLAS=/nothing/libx.so is no usable BLAS" in process.stderr


def test_importing_the_package_imports_no_mlx():
    """So that a command line can load a BLAS first, and `import mlx_gemma_mtp` is instant."""
    code = (
        "import sys, mlx_gemma_mtp, mlx_gemma_mtp.generate\n"
        "assert not [m for m in sys.modules if m.startswith(('mlx.', 'torch'))]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])

"""What the pages and examples/ show runs against a server, as it stands."""

from __future__ import annotations

import json
import os
import plistlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from serving import ASKED, WEATHER, Scripted, events, ids_of, post, serving

from mlx_gemma_mtp import serve
from mlx_gemma_mtp.files.files import CACHE

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
ADDRESS = "http://localhost:8080"
CURLS = [
    (page.name, command)
    for page in (ROOT / "README.md", ROOT / "docs" / "server.md")
    for command in re.findall(r"^```sh\n(.*?)^```", page.read_text(), flags=re.S | re.M)
]


def test_the_pages_have_examples():
    assert len(CURLS) >= 5 and {name for name, _ in CURLS} == {"README.md", "server.md"}


@pytest.mark.parametrize("page, command", CURLS, ids=lambda each: " ".join(each.split())[:60])
def test_commands_of_the_pages_run(url, page, command):
    if "tool_choice" in command or "response_format" in command:
        pytest.importorskip("llguidance")
    assert ADDRESS in command
    done = subprocess.run(["bash", "-ec", command.replace(ADDRESS, url)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert '"error"' not in done.stdout
    if '"stream": true' in command:
        events = [line for line in done.stdout.splitlines() if line.startswith("data: ")]
        assert events[-1] == "data: [DONE]" and '"usage"' in events[-2]
    elif "/metrics" not in command:
        found = json.loads(done.stdout)
        assert found.get("choices") or found.get("content"), done.stdout


def run(name: str, url: str) -> str:
    command = [sys.executable, ROOT / "examples" / name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"BASE_URL": url})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_openai_client(url):
    pytest.importorskip("llguidance")
    said = run("openai_client.py", url)
    assert "of them from drafts" in said and "good=" in said


def test_the_anthropic_client(url):
    assert "tokens of the prompt" in run("anthropic_client.py", url)


class Caller(Scripted):
    """A model that calls a tool first, and then says what the tool said."""

    def rounds_of(self, number: int, prompt: list[int]) -> Any:
        answered = self.text.template.control["<|tool_response>"] in prompt
        call = '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>}<tool_call|><turn|>'
        return [ids_of(self, "It is warm.<turn|>" if answered else call)]


def test_the_agent_calls_its_tools(engine):
    with serving(Caller(engine, lambda number: [])) as url:
        assert run("agent.py", url).count("It is warm.") == 4


# ---- files for other programs


@pytest.fixture(scope="module")
def named(engine):
    """A server whose model has the name that the bundled pair has without --name."""
    with serving(engine, aliases=(serve.BUNDLED,)) as url:
        yield url


def test_continue_s_file(named):
    """Keys of its reference (docs.continue.dev/reference), and a request as it sends them."""
    config = yaml.safe_load((EXAMPLES / "continue.yaml").read_text())
    [model] = config.pop("models")
    assert config.keys() == {"name", "version", "schema"} and config["schema"] == "v1"
    assert model.keys() >= {"name", "provider", "model"} and model["provider"] == "openai"
    assert model["apiBase"] == f"{ADDRESS}/v1" and set(model["roles"]) <= {"chat", "edit", "apply", "autocomplete"}
    assert model["capabilities"] == ["tool_use"]
    more = {"name", "provider", "model", "apiBase", "apiKey", "roles", "capabilities", "defaultCompletionOptions"}
    options = model["defaultCompletionOptions"]
    assert model.keys() <= more and options.keys() <= {"contextLength", "maxTokens"}
    assert 0 < options["maxTokens"] < options["contextLength"]
    body = {
        "model": model["model"],
        "messages": ASKED,
        "max_tokens": 8,
        "prediction": {"type": "content", "content": ""},
    }
    body |= {"tools": [WEATHER], "stream_options": {"include_usage": True}, "stop": ["```"]}
    assert events(named, "/v1/chat/completions", body)[-2]["usage"]["completion_tokens"] > 0


def test_aider_s_file(named):
    """Options of its reference (aider.chat/docs/config/options.html), without a key."""
    config = yaml.safe_load((EXAMPLES / "aider.conf.yml").read_text())
    assert config.keys() == {"model", "openai-api-base", "show-model-warnings"}
    provider, _, model = config["model"].partition("/")
    assert provider == "openai" and config["openai-api-base"] == f"{ADDRESS}/v1"
    body = {"model": model, "messages": ASKED, "max_tokens": 8, "temperature": 0, "stream": False}
    assert post(named, "/v1/chat/completions", body).json()["model"] == serve.BUNDLED


def test_launchd_s_file():
    """What it starts is understood, nobody's key is in it, and it is not killed while requests end."""
    path = EXAMPLES / "local.mlx-gemma-mtp.plist"
    job = plistlib.loads(path.read_bytes())
    assert job["Label"] == path.stem and job["RunAtLoad"] and job["KeepAlive"] == {"SuccessfulExit": False}
    python, flag, module, *arguments = job["ProgramArguments"]
    assert Path(python).is_absolute() and (flag, module) == ("-m", "mlx_gemma_mtp.serve")
    args = serve.parser().parse_args(arguments)
    assert args.api_key == [] and args.host == "127.0.0.1" and job["ExitTimeOut"] > args.drain
    assert job["EnvironmentVariables"].keys() == {CACHE}
    for each in (python, args.model, job["StandardErrorPath"], *job["EnvironmentVariables"].values()):
        assert each.startswith("/Users/YOU/")

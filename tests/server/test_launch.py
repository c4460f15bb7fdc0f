"""Clients that are set up for the server: what is written, where, what is printed, and what runs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

pytest.importorskip("fastapi")
from mlx_gemma_mtp import UserError, serve
from mlx_gemma_mtp.files.files import CACHE
from mlx_gemma_mtp.server.launch import CLIENTS, KEY, MARK, NO_KEY, Site, shown_setup, written

URL, MODEL, CONTEXT = "http://127.0.0.1:8080", "a model's/name", 32768


@pytest.fixture
def site(tmp_path):
    return Site(URL, MODEL, CONTEXT, tmp_path / "its own")


def shell(lines: str, show: str) -> str:
    """What a shell says after these lines, without their last, which starts the client."""
    before = "\n".join(lines.splitlines()[:-1])
    done = subprocess.run(["bash", "-euc", f"{before}\n{show}"], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize("client", CLIENTS)
def test_the_lines_are_a_shell_s(client, site, monkeypatch):
    """They set what the client gets from --exec, the key included, and the key is in none of them."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", "of somebody's")
    monkeypatch.setenv(KEY, "secret")
    setup = CLIENTS[client](site)
    for keyed in (False, True):
        told = dict(line.split("=", 1) for line in shell(shown_setup(setup, keyed), "env").splitlines() if "=" in line)
        expected = setup.variables("secret" if keyed else None)
        assert {name: told[name] for name in expected} == expected and not set(setup.unset) & told.keys()
        assert "secret" not in shown_setup(setup, keyed)
    assert shown_setup(setup, False).splitlines()[-1].split()[0] == setup.program


def files(client: str, site: Site) -> tuple[dict[str, str], dict[str, str]]:
    setup = CLIENTS[client](site)
    written(setup, site.folder)
    assert {path.name for path in site.folder.iterdir()} == {*setup.files, MARK}
    return {path.name: path.read_text() for path in site.folder.iterdir()}, setup.variables(None)


def test_codex_s_file(site):
    texts, environment = files("codex", site)
    config = tomllib.loads(texts["config.toml"])
    provider = config["model_providers"][config["model_provider"]]
    assert config["model"] == MODEL and config["model_context_window"] == CONTEXT
    assert provider["base_url"] == f"{URL}/v1" and provider["wire_api"] == "responses"
    assert environment == {"CODEX_HOME": str(site.folder), provider["env_key"]: NO_KEY}


def test_opencode_s_file(site):
    texts, environment = files("opencode", site)
    config = json.loads(texts["opencode.json"])
    name, _, model = config["model"].partition("/")
    provider = config["provider"][name]
    assert model == MODEL and provider["models"][MODEL]["limit"] == {"context": CONTEXT, "output": 8192}
    assert provider["options"] == {"baseURL": f"{URL}/v1", "apiKey": f"{{env:{KEY}}}"}
    assert environment["OPENCODE_CONFIG"] == str(site.folder / "opencode.json")


def test_aider_s_files(site):
    texts, environment = files("aider", site)
    config = yaml.safe_load(texts["aider.conf.yml"])
    assert config["model"] == config["weak-model"] == f"openai/{MODEL}" and config["openai-api-base"] == f"{URL}/v1"
    assert json.loads(Path(config["model-metadata-file"]).read_text())[config["model"]]["max_input_tokens"] == CONTEXT
    assert environment == {"OPENAI_API_KEY": NO_KEY}


def test_continue_s_file(site):
    texts, _ = files("continue", site)
    [model] = yaml.safe_load(texts["config.yaml"])["models"]
    assert (model["model"], model["apiBase"], model["provider"]) == (MODEL, f"{URL}/v1", "openai")
    assert model["defaultCompletionOptions"] == {"contextLength": CONTEXT, "maxTokens": 8192}


def test_claude_code_asks_for_no_other_model(site):
    setup = CLIENTS["claude"](site)
    named = {value for name, value in setup.environment.items() if name.endswith("_MODEL")}
    assert named == {MODEL} and setup.environment["ANTHROPIC_BASE_URL"] == URL and not setup.files


def test_nothing_of_the_user_s_is_written_over(site):
    setup = CLIENTS["codex"](site)
    written(setup, site.folder)
    (site.folder / "history").write_text("codex's own")
    written(setup, site.folder)  # its own folder, once more
    theirs = site.folder.parent / "theirs"
    theirs.mkdir()
    (theirs / "config.toml").write_text("mine")
    with pytest.raises(UserError, match="not written here"):
        written(setup, theirs)
    with pytest.raises(UserError, match="no folder"):
        written(setup, theirs / "config.toml")
    assert (theirs / "config.toml").read_text() == "mine" and (site.folder / "history").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--exec"], "--exec is given without --launch"),
        (["--launch-folder", "x"], "--launch-folder is given without --launch"),
        (["--launch", "claude", "--", "-p"], "without --exec"),
        (["--launch", "emacs"], "invalid choice"),
        (["--launch", "codex", "--exec"], "run npm install -g @openai/codex"),
    ],
)
def test_what_cannot_be_launched(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE, str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert serve.main(["--port", "0", *flags]) == 2
    assert message in capsys.readouterr().err


CLIENT = """#!{python}
import json, os, sys, tomllib, urllib.request
from pathlib import Path
config = tomllib.loads((Path(os.environ["CODEX_HOME"]) / "config.toml").read_text())
provider = config["model_providers"][config["model_provider"]]
body = {{"model": config["model"], "input": "def f(x):", "max_output_tokens": 4}}
headers = {{"content-type": "application/json", "authorization": "Bearer " + os.environ[provider["env_key"]]}}
request = urllib.request.Request(provider["base_url"] + "/responses", json.dumps(body).encode(), headers)
answer = json.load(urllib.request.urlopen(request))
print(json.dumps([provider["base_url"], answer["usage"]["output_tokens"], sys.argv[1:]]))
sys.exit(7)
"""


def test_a_client_runs_on_a_server_of_its_own(tmp_path):
    """It finds the server, has the key, gets its arguments; its exit code is the command's, and the server ends."""
    program = tmp_path / "codex"
    program.write_text(CLIENT.format(python=sys.executable))
    program.chmod(0o755)
    environment = os.environ | {CACHE: str(tmp_path), KEY: "k", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [
        sys.executable,
        "-m",
        "mlx_gemma_mtp.serve",
        "--port",
        "0",
        "--num-draft-tokens",
        "3",
        "--launch",
        "codex",
    ]
    done = subprocess.run(
        [*command, "--exec", "--", "-p", "x y"],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )
    assert done.returncode == 7, done.stderr + (tmp_path / "launch/codex.log").read_text()
    url, tokens, arguments = json.loads(done.stdout)
    assert tokens == 4 and arguments == ["-p", "x y"]
    port = int(url.removesuffix("/v1").rpartition(":")[2])
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=5)

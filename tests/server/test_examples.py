"""What the pages and examples/ show runs against a server, as it stands."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from serving import Scripted, ids_of, serving

ROOT = Path(__file__).resolve().parents[2]
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

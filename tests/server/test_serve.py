"""The command: its process, its ends, and what it says of wrong flags."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from mlx_gemma_mtp import serve
from mlx_gemma_mtp.serve import BUNDLED, KEY, main

PATIENCE = 300
BODY = {"messages": [{"role": "user", "content": "def f(x):"}], "max_tokens": 4000, "ignore_eos": True}


@contextmanager
def process(*flags: str, **environment: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """Starts the command on a free port. Yields its process and its address."""
    command = [sys.executable, "-m", "mlx_gemma_mtp.serve", "--port", "0", "--num-draft-tokens", "3", *flags]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | environment
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    child.said = []
    try:
        url = None
        for line in child.stderr:
            child.said.append(line)
            if found := re.search(r" on (http://\S+)/v1 ", line):
                url = found[1]
                break
        assert url is not None, child.said
        threading.Thread(target=lambda: child.said.extend(child.stderr), daemon=True).start()
        wait_until_ready(url)
        yield child, url
    finally:
        child.kill()
        child.wait()
        child.stderr.close()


def wait_until_ready(url: str) -> None:
    end = time.monotonic() + PATIENCE
    while httpx.get(f"{url}/ready", timeout=PATIENCE).status_code != 200:
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_signal_lets_texts_end_and_a_second_one_does_not():
    """One process for both: a stream of moderate length ends whole after SIGTERM; nothing new begins."""
    with process("--alias", "claude-*", **{KEY: "k"}) as (child, url):
        with httpx.Client(headers={"authorization": "Bearer k"}, timeout=PATIENCE) as client:
            assert httpx.get(f"{url}/v1/models").status_code == 401
            assert client.get(f"{url}/v1/models").json()["data"][0]["id"] == BUNDLED
            about = client.get(f"{url}/health").json()
            assert about["settings"]["alias"] == {"value": ["claude-*"], "origin": "flag"}
            assert about["settings"]["drain"]["origin"] == "default" and "k" not in about["settings"]
            body = BODY | {"stream": True, "max_tokens": 60, "model": "claude-x"}
            with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
                lines = response.iter_lines()
                next(lines)
                child.send_signal(signal.SIGTERM)
                rest = "\n".join(lines)
        assert rest.rstrip().endswith("data: [DONE]") and '"finish_reason":"length"' in rest
        assert child.wait(PATIENCE) == 0
        assert any("stopping" in line for line in child.said)


def test_what_does_not_end_in_time_is_told_so():
    with process("--drain", "0.5") as (child, url):
        body = BODY | {"stream": True, "max_tokens": 8000}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=PATIENCE) as response:
            lines = response.iter_lines()
            next(lines)
            child.send_signal(signal.SIGTERM)
            events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert events[-1] == "[DONE]" and json.loads(events[-2])["error"]["code"] == "stopping"
        assert child.wait(PATIENCE) == 0


def test_a_second_signal_ends_it_at_once():
    with process() as (child, url):
        body = BODY | {"stream": True, "max_tokens": 8000}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=PATIENCE) as response:
            next(response.iter_lines())
            child.send_signal(signal.SIGTERM)
            while not any("stopping" in line for line in child.said):
                pass
            child.send_signal(signal.SIGTERM)
            assert child.wait(PATIENCE) == 0


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--host", "0.0.0.0"], "--api-key"),
        (["--port", "99999"], "--port"),
        (["--max-body", "0"], "--max-body"),
        (["--timeout", "-1"], "--timeout"),
        (["--max-waiting", "-1"], "--max-waiting"),
        (["--max-prompt-tokens", "0"], "--max-prompt-tokens"),
        (["--num-draft-tokens", "many"], "--num-draft-tokens"),
        (["--drain", "-2"], "--drain"),
        (["--idle-unload", "0"], "--idle-unload"),
        (["--idle-unload", "nan"], "--idle-unload"),
        (["--idle-unload", "60", "--no-parent"], "--no-parent"),
        (["--allowed-origin", "*"], "--allowed-origin"),
        (["--memory-limit", "0"], "--memory-limit"),
        (["--prefix-memory", "-1"], "--prefix-memory"),
        (["--prefix-cache-limit", "0"], "--prefix-cache-limit"),
    ],
)
def test_wrong_flags_are_told_before_anything_is_loaded(flags, said, capsys, monkeypatch):
    monkeypatch.delenv(KEY, raising=False)
    monkeypatch.setattr(serve, "load_engine", None)
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1


def test_a_missing_package_is_named(capsys, monkeypatch):
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    assert main([]) == 2
    assert "mlx-gemma-mtp[serve]" in capsys.readouterr().err

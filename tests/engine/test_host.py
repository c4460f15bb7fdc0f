"""What an import and a load do to their host: nothing; and a load that fails leaves nothing running."""

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from mlx_gemma_mtp import UserError, load
from mlx_gemma_mtp.files import hub
from mlx_gemma_mtp.models import loading


def child(code: str) -> str:
    """The last line that a fresh process prints."""
    here = Path(__file__).parent
    runner = here.parents[1] / "mlx_gemma_mtp" / "engine" / "runner.py"
    begin = "" if runner.exists() else "import exits\n"  # which has a stand-in for it
    paths = [str(here), str(here.parent), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-c", begin + textwrap.dedent(code)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip().splitlines()[-1]


def test_a_load_leaves_its_host_as_it_was():
    """Limits, environment, signals, logging, hooks, random states, default device and stream, threads."""
    changed = child("""
        import logging, os, random, resource, signal, sys, threading
        import mlx.core as mx, numpy as np
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        wanted = 20000 if hard == resource.RLIM_INFINITY else min(hard, 20000)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

        def state():
            return {
                "limit": resource.getrlimit(resource.RLIMIT_NOFILE),
                "environment": dict(os.environ),
                "signals": {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)},
                "logging": (logging.root.level, list(logging.root.handlers)),
                "hooks": (sys.excepthook, threading.excepthook, sys.unraisablehook, sys.stdout, sys.stderr),
                "random": random.getstate(),
                "numpy": np.random.get_state()[1].tolist(),
                "mlx": mx.random.state[0].tolist(),
                "device": (str(mx.default_device()), str(mx.default_stream(mx.default_device()))),
                "threads": {thread.name for thread in threading.enumerate()} - {"mlx_gemma_mtp"},  # it is parked
                "folder": os.getcwd(),
            }

        before = state()
        from mlx_gemma_mtp import SamplingParams, load
        load().generate("x", SamplingParams(max_tokens=3))
        after = state()
        print([name for name in before if before[name] != after[name]])
    """)
    assert changed == "[]"


def test_a_load_whose_tokenizer_fails_joins_what_it_started():
    """The import of a library fails while the models warm up: an exception, not the end of the process."""
    said = child("""
        import sys
        from mlx_gemma_mtp import load
        sys.modules["mlx_lm"] = None  # its import fails
        try:
            load()
        except ImportError as error:
            import threading
            print([thread.name for thread in threading.enumerate()], type(error).__name__)
    """)
    assert said == "['MainThread', 'mlx_gemma_mtp'] ModuleNotFoundError"


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 33384568\n",
        b"<!doctype html><html></html>",
        b"",
        b'{"version": "1.0", "truncated": ',
        b"[1, 2]",
        b"\xff\xfe{}",
        b"{}",
        b'{"version": "1.0", "model": {"type": "BPE"}}',
        b'{"model": NaN}',
    ],
    ids=lambda content: str(content[:12]),
)
def test_a_tokenizer_that_is_none_is_named(tmp_path, monkeypatch, content):
    """In a line; where the first bytes tell, before any weights are read."""
    folder, read = tmp_path / "target", []
    folder.mkdir()
    for file in (hub.DEMO / "target").iterdir():
        if file.name != "tokenizer.json":
            (folder / file.name).symlink_to(file)
    (folder / "tokenizer.json").write_bytes(content)
    prepare = loading.prepare
    monkeypatch.setattr(loading, "prepare", lambda *args: read.append(1) or prepare(*args))
    with pytest.raises(UserError, match="tokenizer") as raised:
        load(folder, "none")
    assert "\n" not in str(raised.value) and not read
    assert threading.active_count() == 1 or not any(t.name.endswith("(warm_up)") for t in threading.enumerate())

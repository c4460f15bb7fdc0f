"""How a process ends whose engine was not closed: at once, with its own exit code, and without a word."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

HERE = Path(__file__).parent
BEGIN = """
import asyncio, atexit, gc, os, signal, sys, threading, time
from exits import Small, interrupted_soon
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests in the background ignores it
"""
# Each: what runs, and the exit code that is due. `engine` is a Small.
CASES = {
    "never closed": ("engine.generate(3)", 0),
    "nothing asked": ("", 0),
    "closed": ("engine.generate(3); engine.close(); engine.close()", 0),
    "amid a stream": ("stream = engine.stream(); next(stream)", 0),
    "amid a stream in a function": ("def f():\n    for chunk in engine.stream(): return\nf()", 0),
    "forgotten amid a stream": ("stream = engine.stream(); next(stream); del engine, stream; gc.collect()", 0),
    "sys.exit amid a stream": ("stream = engine.stream(); next(stream); sys.exit(7)", 7),
    "os._exit amid a stream": ("stream = engine.stream(); next(stream); os._exit(7)", 7),
    "Ctrl-C in generate": (
        """
        interrupted_soon()
        try:
            engine.generate()
        except KeyboardInterrupt:
            sys.exit(130)
        """,
        130,
    ),
    "Ctrl-C in a stream": (
        """
        interrupted_soon()
        try:
            for chunk in engine.stream(): pass
        except KeyboardInterrupt:
            sys.exit(130)
        """,
        130,
    ),
    "Ctrl-C in a call": (
        """
        interrupted_soon()
        try:
            engine.worker.call(lambda tell: [(tell(), time.sleep(0.01)) for _ in range(10**9)], lambda: None)
        except KeyboardInterrupt:
            sys.exit(130)
        """,
        130,
    ),
    "Ctrl-C that nobody handles": (
        "sys.excepthook = lambda *_: None; interrupted_soon(); engine.generate()",
        -2,
    ),
    "Ctrl-C in an async for": (
        """
        async def main():
            interrupted_soon()
            async for chunk in engine.astream(): pass
        try:
            asyncio.run(main())
        except KeyboardInterrupt:
            sys.exit(130)
        """,
        130,
    ),
    "sys.exit in a thread": (
        """
        def read():
            for chunk in engine.stream(): sys.exit(3)
        thread = threading.Thread(target=read)
        thread.start(); thread.join()
        engine.generate(3)
        """,
        0,
    ),
    "daemon threads that read": (
        """
        def read():
            while True: engine.generate(3)
        def look():
            for chunk in engine.stream(): pass
        for target in (read, look, read, look):
            threading.Thread(target=target, daemon=True).start()
        engine.generate(20)
        """,
        0,
    ),
    "daemon threads that wait for a call": (
        """
        def call(): engine.worker.call(lambda tell: [(tell(), time.sleep(0.01)) for _ in range(10**9)], lambda: None)
        threading.Thread(target=call, daemon=True).start()
        threading.Thread(target=lambda: engine.worker.call(len, ()), daemon=True).start()
        time.sleep(0.05)
        """,
        0,
    ),
    "daemon threads that make engines": (
        """
        def make():
            while True: Small().close()
        for _ in range(3): threading.Thread(target=make, daemon=True).start()
        time.sleep(0.05)
        """,
        0,
    ),
    "a thread that goes on": (
        """
        def read():
            time.sleep(0.05)
            sys.stdout.write(str(len(engine.generate(50).tokens)))
        threading.Thread(target=read).start()
        """,
        0,
    ),
    "an event loop that ends amid streams": (
        """
        async def read():
            async for chunk in engine.astream(): pass
        async def main():
            tasks = [asyncio.create_task(read()) for _ in range(5)]
            await asyncio.sleep(0.05)
        asyncio.run(main())
        """,
        0,
    ),
    "an event loop that is left open": (
        """
        async def read():
            async for chunk in engine.astream(): loop.stop()
        loop = asyncio.new_event_loop()
        task = loop.create_task(read())
        loop.run_forever()
        loop.set_exception_handler(lambda *_: None)  # "Task was destroyed but it is pending!" is asyncio's own
        """,
        0,
    ),
    "engines one after the other": (
        """
        for _ in range(5):
            engine.generate(3)
            del engine
            engine = Small()
        while threading.active_count() > 3: time.sleep(0.001)
        """,
        0,
    ),
    "a child of a fork that ends": (
        """
        stream = engine.stream(); next(stream)
        if not (child := os.fork()): sys.exit(5)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        next(stream); sys.exit(code)
        """,
        5,
    ),
    "a handler of the exit that calls": (
        """
        def late():
            try: engine.generate(3)
            except ValueError as error: sys.stdout.write(str(error))
        engine.generate(3)
        atexit.unregister(threads._end); atexit.register(late); atexit.register(threads._end)
        """,
        0,
    ),
    "an error amid a stream": (
        "sys.excepthook = lambda *_: None; stream = engine.stream(); next(stream); 1 / 0",
        1,
    ),
    "SIGTERM amid a stream": (
        "stream = engine.stream(); next(stream); os.kill(os.getpid(), signal.SIGTERM); time.sleep(30)",
        -15,
    ),
}
SAID = {"a thread that goes on": "50", "a handler of the exit that calls": "the engine is closed; load it again"}


def ended(code: str, wait: float = 60) -> tuple[int, str, str]:
    """Runs a child; returns its exit code, and what it wrote on standard output and error."""
    paths = [str(HERE), str(HERE.parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-X", "faulthandler", "-W", "ignore::DeprecationWarning", "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, timeout=wait, env=environment)
    return run.returncode, run.stdout, run.stderr


def case(name: str) -> str:
    code = textwrap.dedent(CASES[name][0])
    return f"{BEGIN}from mlx_gemma_mtp.engine import threads\nengine = Small()\n{code}\n"


@pytest.mark.parametrize("name", CASES)
def test_a_process_ends(name):
    assert ended(case(name)) == (CASES[name][1], SAID.get(name, ""), "")


LOADED = """
from mlx_gemma_mtp import SamplingParams, load
LONG = SamplingParams(max_tokens=4000, temperature=0.0, ignore_eos=True)
"""
REAL = {
    "Ctrl-C amid a load": ("interrupted_soon({}); load(); time.sleep(30)", 130),
    "a load after Ctrl-C amid a load": (
        """
        try:
            interrupted_soon({}); load(); time.sleep(30)
        except KeyboardInterrupt:
            load(num_draft_tokens=2).generate("x", SamplingParams(max_tokens=3))
        """,
        0,
    ),
    "Ctrl-C in generate": ("engine = load(num_draft_tokens=2); interrupted_soon({}); engine.generate('x', LONG)", 130),
    "Ctrl-C in calibrate": ("engine = load(); interrupted_soon({}); engine.calibrate(9)", 130),
    "amid a stream": ("stream = load(num_draft_tokens=2).stream('x', LONG); next(stream); time.sleep({})", 0),
    "a child of a fork that ends": (
        """
        engine = load(num_draft_tokens=2)
        stream = engine.stream("x", LONG); next(stream)
        if not (child := os.fork()): sys.exit(5)
        time.sleep({}); sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """,
        5,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.05, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("name", REAL)
def test_a_process_with_a_model_ends(name, seconds):
    code, due = REAL[name]
    code = textwrap.indent(textwrap.dedent(code.format(seconds)).strip(), "    ")
    guarded = f"try:\n{code}\nexcept KeyboardInterrupt:\n    sys.exit(130)\n"
    assert ended(f"{BEGIN}{LOADED}{guarded}", 300) == (due, "", "")


def test_a_load_works_after_ctrl_c_amid_an_import():
    """An import that is torn would leave jinja2 without its nodes, for as long as the process lives."""
    torn = """
    class Interrupting:
        def find_spec(self, name, path=None, target=None):
            if name == "jinja2.compiler":
                sys.meta_path.remove(self)
                os.kill(os.getpid(), signal.SIGINT)
                for _ in range(9): time.sleep(0.001)  # where the interpreter takes signals
    sys.meta_path.insert(0, Interrupting())
    try: load()
    except KeyboardInterrupt: sys.stdout.write("interrupted, ")
    engine = load(num_draft_tokens=2)
    sys.stdout.write(f"{len(engine.generate('x', SamplingParams(max_tokens=3)).tokens)} tokens")
    """
    assert ended(f"{BEGIN}{LOADED}{textwrap.dedent(torn)}") == (0, "interrupted, 3 tokens", "")

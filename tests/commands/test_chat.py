"""The chat: in a pseudo-terminal, in a pipe, and its commands."""

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from held_out import PROMPTS

pytest.importorskip("pexpect")
pytest.importorskip("pyte")

from screens import Terminal

from mlx_gemma_mtp import chat

MODULE = "mlx_gemma_mtp.chat"
ENDLESS = ("--ignore-eos", "--max-tokens", "6000", "--temp", "0")
SHORT = ("--ignore-eos", "--max-tokens", "12", "--temp", "0")
PASTE, PASTED = "\x1b[200~", "\x1b[201~"
CTRL_C, CTRL_D, ENTER, ALT_ENTER, UP = "\x03", "\x04", "\r", "\x1b\r", "\x1b[A"
SAID = "def add(a, b):"


def at_the_prompt(terminal: Terminal, *argv: str) -> Terminal:
    terminal.wait(lambda: terminal.line == ">")
    return terminal


def say(terminal: Terminal, text: str, shows: str) -> str:
    """Sends a turn, waits for what it shows and for the next prompt, and returns all that the screen has of it."""
    before = len(terminal.text)
    terminal.send(text + ENTER)
    terminal.wait(lambda: shows in terminal.text[before:] and terminal.line == ">")
    return terminal.text[before:]


def saved(path: Path) -> list[dict]:
    return json.loads(path.read_text())["messages"]


def test_a_chat_in_a_terminal(tmp_path, monkeypatch):
    """Streams, stops at Ctrl-C and goes on, keeps what came and marks it, takes turns back, saves and loads."""
    monkeypatch.chdir(tmp_path)
    file = Path("chat.json")  # a short name: what is waited for stands in one line
    with Terminal(MODULE, *ENDLESS) as terminal:
        at_the_prompt(terminal)
        terminal.send(SAID + ENTER)
        terminal.wait("```python")
        terminal.wait(lambda: "tokens/s · " in terminal.text and "Ctrl-C stops" in terminal.text.splitlines()[-1])
        so_far = terminal.text.count("\n")
        terminal.wait(lambda: terminal.text.count("\n") > so_far + 1)  # it goes on below
        terminal.send(CTRL_C)
        terminal.wait(lambda: terminal.line == ">")
        assert "\nstopped · " in terminal.text and terminal.text.count("Ctrl-C stops · ") == 0
        say(terminal, f"/save {file}", "1 turn saved in")
        said, reply = saved(file)
        assert said == {"role": "user", "content": SAID} and reply["status"] == "incomplete"
        assert reply["content"].startswith("```python\n") and reply["content"].splitlines()[1] in terminal.text
        say(terminal, "/undo", "0 turns")
        say(terminal, "/undo", "error: there is no turn to take back")
        say(terminal, f"/load {file}", "chat.json: 1 turn")
        say(terminal, "/save", "1 turn saved in")
        assert saved(file) == [said, reply]
        terminal.send(CTRL_D)
        assert terminal.ends() == 0
    assert b"Traceback" not in terminal.raw and b"\x1b[2m" in terminal.raw


def test_several_lines_and_keys(tmp_path, monkeypatch):
    """A paste is one turn; Alt-Enter, Ctrl-J and a backslash go on; Ctrl-C clears, Tab completes, up goes back. What is
    typed is kept for its user alone.
    """
    monkeypatch.chdir(tmp_path)
    file = Path("chat.json")  # a short name: what is waited for stands in one line
    with Terminal(MODULE, "--history", *SHORT, MLX_GEMMA_MTP_CACHE=str(tmp_path / "cache")) as terminal:
        at_the_prompt(terminal)
        terminal.send(f"{PASTE}one\r\ntwo\n    three{PASTED}")
        terminal.wait("three")
        assert "> one\n  two\n      three" in terminal.text
        say(terminal, "", "12 tokens")
        terminal.send(f"a{ALT_ENTER}b\nc\\{ENTER}d")
        terminal.wait("  d")
        assert "> a\n  b\n  c\n  d" in terminal.text
        say(terminal, "", "12 tokens")
        terminal.send("never said")
        terminal.wait("never said")
        terminal.send(CTRL_C)
        terminal.wait(lambda: terminal.line == ">")
        assert "never said" not in terminal.text
        terminal.send(CTRL_C)
        terminal.wait("\n>\nCtrl-D ends.\n\n>")
        terminal.send(UP)
        terminal.wait("> a\n  b\n  c\n  d")
        terminal.send(CTRL_C)
        terminal.wait(lambda: terminal.line == ">")
        terminal.send("/sa\t")
        terminal.wait("> /save")
        say(terminal, f" {file}", "2 turns saved in")
        assert [each["content"] for each in saved(file)[::2]] == ["one\ntwo\n    three", "a\nb\nc\nd"]
        terminal.send("/exit\r")
        assert terminal.ends() == 0
    kept = tmp_path / "cache" / chat.HISTORY
    assert f"/save {file}" in kept.read_text() and stat.S_IMODE(kept.stat().st_mode) == 0o600


def test_a_narrow_window_without_colours():
    """Nothing is dimmed, the live line keeps to one row, and what was typed during a reply comes next."""
    with Terminal(MODULE, *SHORT, "--num-draft-tokens", "3", columns=18, rows=12, NO_COLOR="1") as terminal:
        at_the_prompt(terminal)
        terminal.send(f"你好 def add(a):{ENTER}/exit{ENTER}")
        assert terminal.ends() == 0
    assert "你好 def" in terminal.text and "\n```python\n" in terminal.text and "\n> /exit" in terminal.text
    assert b" tokens/s" in terminal.raw and b"tokens/s \xc2\xb7" not in terminal.raw  # nothing more fits
    assert "cut off: length" in terminal.lines and b"\x1b[2m" not in terminal.raw


def test_an_error_ends_a_turn_and_not_the_chat():
    """A prompt beyond the context, and a second Ctrl-C; SIGTERM is no traceback."""
    with Terminal(MODULE, *ENDLESS) as terminal:
        at_the_prompt(terminal)
        long = say(terminal, f"{PASTE}{'word ' * 9000}{PASTED}", "error: ")
        assert "expected fewer than the context of" in " ".join(long.split())
        say(terminal, "/tokens", "error: nothing is counted yet")
        terminal.send(SAID + ENTER)
        terminal.wait("tokens/s")
        terminal.send(CTRL_C + CTRL_C)
        terminal.wait(lambda: terminal.line == ">")
        terminal.send(CTRL_D)
        assert terminal.ends() == 0 and b"Traceback" not in terminal.raw


def piped(lines: str | bytes, *argv: str, **options) -> subprocess.CompletedProcess:
    env = os.environ | {"MLX_GEMMA_MTP_BLAS": "off", "PYTHONPATH": str(Path(__file__).parents[2])}
    said = lines.encode() if isinstance(lines, str) else lines
    command = [sys.executable, "-m", MODULE, *argv]
    return subprocess.run(command, input=said, env=env, capture_output=True, timeout=300, **options)


def test_a_chat_in_a_pipe(tmp_path):
    """Each line is a turn; replies alone on standard output, as they are; the history is that of a conversation."""
    file = tmp_path / "chat.json"
    lines = [PROMPTS[0], "", "//slash", f"/save {file}", "/stats"]
    done = piped("\n".join(lines), *SHORT)
    err = done.stderr.decode()
    assert done.returncode == 0 and b"\x1b" not in done.stdout + done.stderr and "Traceback" not in err
    messages = saved(file)
    assert [each["content"] for each in messages[::2]] == [PROMPTS[0], "/slash"]
    assert done.stdout.decode() == "".join(f"{each['content']}\n" for each in messages[1::2])
    assert "2 turns saved in" in err and "tokens a round" in err and "Ctrl-C" not in err


def test_failures_in_a_pipe_go_on_and_are_told_at_the_end(tmp_path):
    done = piped(b"/nonsense\n\xff\n" + f"{SAID}\n/exit\n{SAID}\n".encode(), *SHORT)
    errors = [line for line in done.stderr.decode().splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(errors) == 2, done.stderr
    assert "'/nonsense'" in errors[0] and "not UTF-8" in errors[1]
    assert done.stdout.decode().count("```python") == 1  # nothing after /exit


def test_ctrl_c_in_a_pipe_ends_the_chat():
    env = os.environ | {"MLX_GEMMA_MTP_BLAS": "off", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", MODULE, *ENDLESS]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env=env, **pipes)
    process.stdin.write(f"{SAID}\n{SAID}\n".encode())
    process.stdin.flush()
    assert process.stdout.read(9) == b"```python"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in err and b"```python" not in out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--load", "x", "--system-prompt", "y"], "drop one of the two"),
        (["--num-draft-tokens", "many"], "--num-draft-tokens is many"),
        (["--timeout", "0"], "--timeout"),
        (["--max-tokens", "0"], "max_tokens"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_bad_flags_are_one_line(capsys, monkeypatch, flags, message):
    monkeypatch.setattr("mlx_gemma_mtp.engine.load.load", None)
    assert chat.main(flags) == 2
    err = capsys.readouterr().err
    assert message in err.splitlines()[-1] and "Traceback" not in err

"""What all command lines share: one name for them, text from arguments and files, streams that are closed or full."""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

from convert import cli as convert
from mlx_gemma_mtp import __main__ as dispatcher
from mlx_gemma_mtp import __version__, calibrate, chat, doctor, generate, load, serve, trace_routing, verify
from mlx_gemma_mtp.cli import command
from mlx_gemma_mtp.cli.prompts import read_lines, read_schema, read_source
from mlx_gemma_mtp.engine import load as loading
from mlx_gemma_mtp.engine.calibration import Costs
from mlx_gemma_mtp.engine.request import Result
from mlx_gemma_mtp.engine.stats import Stats
from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.files import files, hub
from mlx_gemma_mtp.speculative.costs import CostFile

ROOT = Path(__file__).parents[2]
MODULES = {
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "verify": verify,
    "calibrate": calibrate,
    "doctor": doctor,
    "trace-routing": trace_routing,
}
NO_TEXT = "a\udcff"  # as the bytes a, 0xff of an argument arrive


def main(capsys, *argv: str) -> tuple[int, str, str]:
    code = dispatcher.main([str(each) for each in argv])
    return code, *capsys.readouterr()


def one_line(err: str, *parts: str) -> None:
    lines = [line for line in err.splitlines() if not line.startswith(("note:", "This is the small"))]
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    for part in parts:
        assert part in lines[0]


def python(*argv: str, env: dict | None = None, **options) -> subprocess.CompletedProcess:
    environment = os.environ | {"MLX_GEMMA_MTP_BLAS": "off", "PYTHONPATH": str(ROOT)} | (env or {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL} | options
    return subprocess.run([sys.executable, *argv], env=environment, timeout=120, **pipes)


def child(*argv: str, **options) -> subprocess.CompletedProcess:
    return python("-m", "mlx_gemma_mtp", *argv, **options)


def test_every_command_has_its_module():
    assert set(MODULES) | {"convert"} == set(dispatcher.COMMANDS)
    for name, module in MODULES.items():
        assert import_module(dispatcher.COMMANDS[name][0]) is module


def test_help_and_version(capsys):
    code, out, err = main(capsys, "--help")
    assert code == 0 and err == "" and all(f"  {name} " in out for name in dispatcher.COMMANDS)
    assert main(capsys, "--version")[:2] == (0, f"mlx_gemma_mtp {__version__}\n")


@pytest.mark.parametrize("argv", [[], ["genrate"], ["--prompt", "x"], [""], [NO_TEXT]])
def test_what_is_no_command_is_one_line(capsys, argv):
    code, out, err = main(capsys, *argv)
    assert code == 2 and out == ""
    one_line(err, "not UTF-8" if argv == [NO_TEXT] else "expected one of generate, chat, serve, convert, verify")


@pytest.mark.parametrize("name", sorted(dispatcher.COMMANDS))
def test_a_command_by_its_name(capsys, name):
    """Its own help, and its own usage errors."""
    with pytest.raises(SystemExit) as stop:
        dispatcher.main([name, "--help"])
    assert stop.value.code == 0 and "usage:" in capsys.readouterr().out
    code, _, err = main(capsys, name, "--nonsense")
    assert code == 2
    one_line(err, "--nonsense" if name != "convert" else "")


def test_what_is_large_is_imported_when_it_is_needed():
    """The version, a command's help and an error in its line need none of it, but for two commands' own arrays."""
    code = (
        "import sys, mlx_gemma_mtp.__main__ as m\nfrom importlib import import_module\n"
        "large = {'mlx_lm', 'transformers', 'tokenizers', 'huggingface_hub', 'torch', 'fastapi', 'jinja2'}\n"
        "arrays = {'mlx', 'numpy', 'tqdm'}\n"
        "loaded = lambda names: sorted({n.split('.')[0] for n in sys.modules} & names)\n"
        "assert m.main(['--version']) == 0 and not loaded(large | arrays)\n"
        "for name in sorted(m.COMMANDS, key=lambda name: name in ('trace-routing', 'convert')):\n"
        "    import_module(m.COMMANDS[name][0])\n"
        "    arrays -= {'trace-routing': {'numpy'}, 'convert': arrays}.get(name, set())\n"
        "    assert not loaded(large | arrays), name\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_child_runs_a_command():
    done = child("convert", "inspect", str(hub.DEMO / "target"))
    assert done.returncode == 0 and b"target, gemma4" in done.stdout, done
    assert child("wat").returncode == 2


def text_options() -> list[tuple[str, str]]:
    """Every option of every command that takes text."""
    parsers = {name: module.parser() for name, module in MODULES.items()} | {"convert": convert._parser()}
    return [
        (name, action.option_strings[-1])
        for name, parser in parsers.items()
        for action in parser._actions
        if action.option_strings and action.nargs is None and not isinstance(action, argparse._StoreTrueAction)
    ]


@pytest.mark.parametrize("command, flag", text_options())
@pytest.mark.parametrize("joined", [False, True])
def test_bytes_that_are_no_text_are_refused_by_the_option_s_name(capsys, command, flag, joined):
    argv = [f"{flag}={NO_TEXT}"] if joined else [flag, NO_TEXT]
    code, out, err = main(capsys, command, *argv)
    assert code == 2 and out == ""
    one_line(err, f"argument {flag}: ", "is not UTF-8 (byte 0xff at ")


@pytest.mark.parametrize("argv", [["inspect", NO_TEXT], ["check", NO_TEXT], ["check", "x", "--against", NO_TEXT]])
def test_bytes_that_are_no_text_are_refused_in_every_place(capsys, argv):
    code, _, err = main(capsys, "convert", *argv)
    assert code == 2
    one_line(err, "argument --against" if "--against" in argv else "an argument", "is not UTF-8")


def test_bytes_of_a_locale_without_text_are_read_as_utf8():
    read = command.texts(["--prompt", "été".encode().decode("ascii", "surrogateescape"), "é"])
    assert read == ["--prompt", "été", "é"]
    with pytest.raises(UserError, match="not UTF-8"):
        command.texts(["\ud800"])


def test_real_bytes():
    done = child("generate", "--prompt", "x", "--system-prompt", b"a\xff")
    assert done.returncode == 2 and done.stdout == b""
    one_line(done.stderr.decode(), "argument --system-prompt: 'a\\udcff' is not UTF-8 (byte 0xff at 1)")


def test_notes_never_reach_a_closed_standard_error_s_neighbour():
    done = child(
        "generate", "--prompt", "x", "--max-tokens", "2", "--json", stderr=None, preexec_fn=lambda: os.close(2)
    )
    assert done.returncode == 0 and done.stdout.count(b"\n") == 1 and json.loads(done.stdout)["tokens"], done


def test_a_file_does_not_become_standard_error():
    code = (
        "from mlx_gemma_mtp.cli import command as cli; import os, sys\ncli.open_streams()\n"
        "assert os.open('/dev/zero', os.O_RDONLY) > 2\nprint('note', file=sys.stderr); os.write(2, b'x')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, preexec_fn=close_all_but_output
    )
    assert done.returncode == 0 and done.stdout == b""


def close_all_but_output():
    os.close(0)
    os.close(2)


def test_a_full_standard_error_stops_nothing():
    with open("/dev/full", "wb") as full:
        done = child("convert", "inspect", str(hub.DEMO / "target"), stderr=full)
        assert done.returncode == 0 and done.stdout
        assert child("convert", "inspect", "/nowhere", stderr=full).returncode == 2


INSPECT = ["convert", "inspect", str(hub.DEMO / "target")]


@pytest.mark.parametrize(
    "argv, unbuffered", [(["--help"], ""), (["generate", "--help"], ""), (INSPECT, ""), (INSPECT, "1")]
)
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_standard_output_is_one_line(argv, unbuffered):
    with open("/dev/full", "wb") as full:
        done = child(*argv, stdout=full, env={"PYTHONUNBUFFERED": unbuffered})
    assert done.returncode == 2
    one_line(done.stderr.decode(), "standard output or a file cannot be written (No space left on device)")


def test_a_closed_standard_output_is_one_line():
    done = child("generate", "--prompt", "x", stdout=None, preexec_fn=lambda: os.close(1))
    assert done.returncode == 2
    one_line(done.stderr.decode(), "standard output is closed")


def test_a_closed_standard_input_is_one_line():
    done = child("generate", "--prompt", "-", stdin=None, preexec_fn=lambda: os.close(0))
    assert done.returncode == 2
    one_line(done.stderr.decode(), "standard input, which is closed")


def test_a_reader_that_has_gone_is_no_error():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as pipe:
        done = child("--help", stdout=pipe)
    assert done.returncode == 1 and done.stderr == b""


SOURCES = {
    "a schema that is not there": (
        ["--json-schema", "missing.json"],
        "missing.json: there is no such file",
    ),
    "a schema in a folder that is not there": (["--json-schema", "/x/y.json"], "there is no such file"),
    "a schema that is none": (["--json-schema", "{]"], "--json-schema is no JSON"),
    "a folder as schema": (["--json-schema", "{folder}"], "Is a directory"),
    "a file that is no schema": (["--json-schema", "{text}"], "text.txt is no JSON"),
    "a schema in bytes": (["--json-schema", "{bytes}"], "bytes.bin is not UTF-8 (byte 0xff at 1)"),
    "a grammar that is not there": (["--grammar", "missing.lark"], "--grammar missing.lark: there is no such file"),
    "a folder as grammar": (["--grammar", "{folder}"], "Is a directory"),
    "prompts that are not there": (["--prompt-file", "missing.txt"], "--prompt-file missing.txt: No such file"),
    "a folder of prompts": (["--prompt-file", "{folder}"], "Is a directory"),
    "prompts in bytes": (["--prompt-file", "{bytes}"], "bytes.bin is not UTF-8 (byte 0xff at 1)"),
    "prompts behind a file": (["--prompt-file", "{text}/x"], "Not a directory"),
    "no name": (["--prompt-file", ""], "No such file"),
    "no name at all": (["--prompt-file", "a\0b"], "is no name of a file"),
    "an endless name": (["--prompt-file", "x" * 5000], "File name too long"),
    "an endless schema": (["--json-schema", "x" * 5000], "there is no such file"),
}


@pytest.mark.parametrize("case", SOURCES)
def test_files_that_cannot_be_read_are_one_line_before_a_model_is_looked_for(tmp_path, monkeypatch, capsys, case):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.txt").write_text("no schema")
    (tmp_path / "bytes.bin").write_bytes(b"a\xff")
    names = {"{folder}": "folder", "{text}": "text.txt", "{bytes}": "bytes.bin"}
    argv, part = SOURCES[case]
    for mark, name in names.items():
        argv = [each.replace(mark, str(tmp_path / name)) for each in argv]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate, "load_engine", lambda *_: pytest.fail("a model is loaded"))
    code, out, err = main(capsys, "generate", "--prompt", "x", *argv)
    assert code == 2 and out == ""
    one_line(err, part)


def test_prompts_of_a_file(tmp_path):
    """A byte order mark is none of the first; a line ends at a line feed, and nowhere else."""
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffone\r\n\r\ntwo\u2028 and a half\x0c\n \nthree".encode())
    assert read_lines(str(path)) == ["one", "two\u2028 and a half\x0c", "three"]
    path.write_bytes(b"\xef\xbb\xbf" + b'{"type": "object"}')
    assert read_schema(str(path)) == '{"type": "object"}'


def test_a_file_in_the_home_folder(tmp_path, monkeypatch):
    """As in --prompt-file=~/x, which no shell expands."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x").write_text("[]")
    assert read_lines("~/x") == ["[]"] and read_schema("~/x") == "[]"


@pytest.mark.skipif(not os.path.exists("/dev/fd"), reason="no /dev/fd here")
def test_a_schema_may_come_through_a_pipe():
    """As in `--json-schema <(jq .schema file)`."""
    read, write = os.pipe()
    os.write(write, b'{"type": "array"}')
    os.close(write)
    assert read_schema(f"/dev/fd/{read}") == '{"type": "array"}'
    os.close(read)


def test_text_that_is_no_file_stays_text():
    assert read_schema(' {"a": 1}') == ' {"a": 1}'
    assert read_source("--grammar", 'start: "a"', lambda text: ":" in text) == 'start: "a"'


HOME = str(Path.home())


@pytest.mark.parametrize(
    "settings, folder",
    [
        ({files.CACHE: "~/c"}, f"{HOME}/c"),
        ({files.CACHE: "c/d"}, "{cwd}/c/d"),
        ({files.CACHE: "/c"}, "/c"),
        ({files.CACHE: "", "XDG_CACHE_HOME": "/x"}, "/x/mlx_gemma_mtp"),
        ({files.CACHE: " ", "XDG_CACHE_HOME": "/x"}, "/x/mlx_gemma_mtp"),
        ({"XDG_CACHE_HOME": "x"}, f"{HOME}/.cache/mlx_gemma_mtp"),
        ({"XDG_CACHE_HOME": ""}, f"{HOME}/.cache/mlx_gemma_mtp"),
        ({files.CACHE: "~nobody-of-this-name/c"}, "{tmp}/c"),
    ],
)
@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac has another folder")
def test_the_cache_folder(tmp_path, monkeypatch, settings, folder):
    monkeypatch.chdir(tmp_path)
    for name in (files.CACHE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert str(files.cache_folder()) == folder.format(cwd=tmp_path, tmp=tempfile.gettempdir())
    assert list(tmp_path.iterdir()) == []


PLACES = {
    "a file": "file",
    "below a file": "file/x",
    "where nothing can be made": "/proc/x",
    "a link to nothing": "link",
}


@pytest.mark.parametrize("kind", PLACES)
def test_a_cache_folder_that_is_none_is_one_notice(tmp_path, monkeypatch, kind):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("/proc/nothing/at/all")
    monkeypatch.setenv(files.CACHE, str(tmp_path / PLACES[kind]))
    notices = []
    costs = Costs("greedy", CostFile({}), notices.append)
    assert costs.kept() is None and notices == []
    costs._write({(1, 0, 0): 1.0}, {(1, 0): 0.1})
    assert len(notices) == 1 and "cannot be kept" in notices[0] and costs.where in notices[0]
    load(notice=notices.append).generate("def f(x):", generate.SamplingParams(max_tokens=4))


def test_a_row_that_ended_with_an_error_is_shown(monkeypatch, capsys):
    good = Result("ab", [1, 2], "stop", Stats(1))
    results = [good, replace(good, finish_reason="error", error="the grammar leaves no token")]
    fake = argparse.Namespace(max_rows=2, description="", advice=None)
    monkeypatch.setattr(generate, "load_engine", lambda *_: fake)
    monkeypatch.setattr(generate, "generate", lambda *_: results)
    argv = ["generate", "--prompt", "x", "--prompt", "y"]
    code, out, err = main(capsys, *argv)
    assert code == 1 and out == ""
    one_line(err, "error: prompt 2: the grammar leaves no token")
    code, out, err = main(capsys, *argv, "--json")
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 1 and "error" not in records[0] and records[1]["error"] == "the grammar leaves no token"
    assert records[1]["finish_reason"] == "error"
    monkeypatch.setattr(generate, "generate", lambda *_: [good, good])
    monkeypatch.setattr(generate, "print_speedup", lambda *_: None)
    assert main(capsys, *argv) == (0, "", "")


def test_what_takes_long_says_so(capsys):
    with command.Stage(0) as stage:
        stage("reading")
        stage._timer.join()
        stage("waiting")
    assert capsys.readouterr().err.splitlines()[0] == "note: reading \u2026"
    with command.Stage(1000) as stage:
        stage("reading")
        timer = stage._timer
    assert timer.finished.is_set() and capsys.readouterr().err == ""


def test_load_tells_its_stages(monkeypatch):
    told = []
    monkeypatch.setattr(loading, "warm_up", lambda *_: None)
    load(stage=told.append)
    assert "checking the model's files" in told and "importing the tokenizer" in told[-2] and told[-1] == ""


def test_help_that_cannot_be_written(tmp_path):
    """argparse passes over such errors; an unbuffered stream shows them in the midst of writing."""
    for argv in (["generate", "--help"], ["verify", "--help"], ["convert", "--help"]):
        with open(os.devnull) as unwritable:
            assert child(*argv, stdout=unwritable, env={"PYTHONUNBUFFERED": "1"}).returncode == 2


def test_a_working_directory_that_was_deleted(tmp_path):
    (tmp_path / "gone").mkdir()
    code = (
        "import os, sys; os.chdir(sys.argv[1]); os.rmdir(sys.argv[1])\n"
        "from mlx_gemma_mtp import generate; sys.exit(generate.main(['--prompt', 'x', '--model', '.']))"
    )
    environment = os.environ | {"MLX_GEMMA_MTP_BLAS": "off", "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-c", code, str(tmp_path / "gone")]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]  # of what took long
    assert done.returncode == 2 and len(lines) == 1
    assert "the working directory was deleted" in done.stderr


@pytest.mark.parametrize(
    "argv",
    [
        ["--model", "m" * 5000], ["--draft-model", "d" * 5000], ["--num-draft-tokens", "9" * 5000],
        ["--num-draft-tokens", "\u0663"], ["--max-tokens", "9" * 5000], ["--top-k", "8" * 5000], ["--seed", "x" * 5000],
        ["--logit-bias", "7" * 5000], ["--accept", "a" * 5000], ["--no-such-option" + "x" * 5000],
        ["--prompt-file", "f" * 5000], ["--json-schema", "{" * 5000], ["--grammar", "g" * 5000],
        ["--revision", "r" * 5000, "--model", "org/name"], ["--thinking-budget", "9" * 4000],
        ["--logit-bias", "9" * 4000 + "=1"],
    ],
)  # fmt: skip
def test_long_arguments_are_shortened_in_messages(capsys, argv):
    code = generate.main(["--prompt", "x", *argv])
    err = capsys.readouterr().err
    assert code == 2
    one_line(err)
    assert len(err.splitlines()[-1]) < 400


@pytest.fixture
def listening():
    """Whoever runs the tests in the background ignores Ctrl-C, and a child would inherit that."""
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, usual)


@pytest.mark.usefixtures("listening")
@pytest.mark.parametrize("delay", [0.0, 0.2, 0.6])
def test_ctrl_c_during_the_start_is_quiet(delay):
    """Once the model is being loaded, a library imported and the models run for the first time."""
    endless = ("--ignore-eos", "--max-tokens", "4000")
    argv = [sys.executable, "-m", "mlx_gemma_mtp", "generate", "--prompt", "x", *endless]
    environment = os.environ | {"MLX_GEMMA_MTP_BLAS": "off", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(argv, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    for line in process.stderr:
        if b"no GPU" in line:
            break
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 130
    assert all(line.startswith(b"note: ") for line in err.splitlines()), err


@pytest.mark.usefixtures("listening")
def test_ctrl_c_while_modules_are_imported_is_quiet():
    code = (
        "import os, runpy, signal, sys, tqdm\n"
        "class Interrupted:\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name == 'mlx_gemma_mtp.cli.prompts': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupted)\n"
        "sys.argv = ['generate']; runpy.run_module('mlx_gemma_mtp.generate', run_name='__main__', alter_sys=True)"
    )
    done = python("-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


@pytest.mark.usefixtures("listening")
def test_ctrl_c_once_the_work_is_done_is_quiet():
    code = (
        "import atexit, os, runpy, signal, sys\n"
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))\n"
        "sys.argv = ['generate', '--version']\n"
        "runpy.run_module('mlx_gemma_mtp.generate', run_name='__main__', alter_sys=True)"
    )
    done = python("-c", code)
    assert (done.returncode, done.stderr) == (130, b"") and done.stdout.startswith(b"mlx_gemma_mtp ")

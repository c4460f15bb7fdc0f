"""Full, read-only and missing disks, signals and kills: nothing half-written stays, and one line says why."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_convert import ROOT, Checkpoint, make_moe, run
from test_convert_pair import sources  # noqa: F401

from convert import blocks, destination, source, writer
from convert import run as convert_run
from convert.cli import main
from convert.destination import Destination
from convert.interruption import SIGNALS

AGAIN = "error: interrupted; nothing was written; run the same command again (finished downloads are kept)\n"


@pytest.fixture
def moe(tmp_path) -> Checkpoint:
    checkpoint = make_moe(tmp_path / "hf")
    checkpoint.save()
    return checkpoint


def failed(capsys, says: str) -> bool:
    """One line, with `says` in it."""
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("error: ") and error.count("\n") == 1 and says in error, error
    return True


def held(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---- disks ---------------------------------------------------------------------------------


class Full(io.FileIO):
    """A file on a disk with room for 20,000 bytes."""

    def write(self, data) -> int:
        if self.tell() + len(data) > 20_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def test_disk_that_fills_up_while_writing(moe, tmp_path, capsys, monkeypatch):
    path_open = Path.open
    monkeypatch.setattr(
        Path, "open", lambda path, mode="r", **kw: Full(path, mode) if mode == "wb" else path_open(path, mode, **kw)
    )
    assert run(moe, tmp_path / "out") == 2
    assert failed(capsys, f"{tmp_path} is full; expected 0.000 GB for the conversion; nothing was written; free some")
    assert held(tmp_path) == {"hf"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_disk_that_tells_at_the_end_only(moe, tmp_path, capsys, monkeypatch, number):
    """As network and delayed-allocation file systems do."""

    def fsync(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    assert run(moe, tmp_path / "out") == 2
    assert failed(capsys, os.strerror(number) if number == errno.EIO else "is full")
    assert held(tmp_path) == {"hf"}


@pytest.fixture
def mount(tmp_path) -> Iterator:
    """mount(options): a tmpfs, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def tmpfs(options: str) -> Path:
        try:
            done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True)
        except FileNotFoundError:
            pytest.skip("there is no mount command")
        if done.returncode:
            pytest.skip(f"mounting is not permitted: {done.stderr.decode().strip()}")
        return folder

    yield tmpfs
    subprocess.run(["umount", folder], capture_output=True)


@pytest.mark.parametrize("flags", [(), ("--pair",)])
@pytest.mark.parametrize("size", ["60k", "300k"])
def test_real_full_disk(mount, sources, tmp_path, capsys, monkeypatch, size, flags):  # noqa: F811
    """60 kB: full in the first weights; 300 kB: in the tokenizer or the drafter."""
    disk = mount(f"size={size}")
    (sources[0].folder / "tokenizer.json").write_text(json.dumps({"x": "y" * 200_000}))
    monkeypatch.setattr(Destination, "check_space", lambda *args: None)  # as if another program wrote meanwhile
    assert run(sources[0], disk / "new" / "out", *flags) == 2
    assert failed(capsys, f"{disk / 'new'} is full") and held(disk) == set()


def test_disk_without_room_for_a_folder(mount, moe, capsys):
    disk = mount("size=16k,nr_inodes=2")
    (disk / "file").touch()
    assert run(moe, disk / "out") == 2
    assert failed(capsys, f"{disk}: No space left on device; expected a folder that can be written")
    assert held(disk) == {"file"}


def test_read_only_disk(mount, moe, capsys):
    disk = mount("ro")
    for out in (disk / "out", disk / "new" / "out"):
        assert run(moe, out) == 2
        assert failed(capsys, f"{out.parent}: Read-only file system; expected a folder that can be written")


def test_nothing_is_downloaded_for_a_folder_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(source, "find", lambda name: pytest.fail("it was downloaded"))
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "out", tmp_path / "file" / "new" / "out"):
        assert main(["--hf-path", "org/name", "--mlx-path", str(out)]) == 2
        assert failed(capsys, "expected a folder that can be written")
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for out in ("there", "link", "file"):
        assert main(["--hf-path", "org/name", "--mlx-path", str(tmp_path / out)]) == 2
        assert failed(capsys, "exists; expected a new folder")
    assert held(tmp_path) == {"file", "there", "link"}


def test_new_parents_go_with_what_failed(moe, tmp_path):
    (moe.folder / "config.json").unlink()
    assert run(moe, tmp_path / "new" / "er" / "out") == 2
    assert held(tmp_path) == {"hf"}


def test_a_name_that_was_taken_meanwhile_leaves_neither_of_a_pair(sources, tmp_path, capsys, monkeypatch):  # noqa: F811
    write = convert_run._write

    def taken(*args):
        write(*args)
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "file").touch()

    monkeypatch.setattr(convert_run, "_write", taken)
    assert run(sources[0], tmp_path / "out", "--pair") == 2
    assert failed(capsys, "not empty") and held(tmp_path) == {"hf", "hf-assistant", "out"}
    assert held(tmp_path / "out") == {"file"}


def test_disk_without_locks(moe, tmp_path, monkeypatch):
    def flock(*args):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(destination.fcntl, "flock", flock)
    (tmp_path / ".out.123.tmp").mkdir()  # whose, nobody can tell
    assert run(moe, tmp_path / "out") == 0 and held(tmp_path) == {"hf", "out", ".out.123.tmp"}


# ---- signals -------------------------------------------------------------------------------


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def once(monkeypatch, where, name: str, action=kill) -> None:
    """`action` comes in the first call of where.name."""
    original, calls = getattr(where, name), []

    def hit(*args, **kwargs):
        calls.append(name)
        if len(calls) == 1:
            action()
        return original(*args, **kwargs)

    monkeypatch.setattr(where, name, hit)


MOMENTS = {
    "claim": (destination, "_lock"),
    "download": (source, "find"),
    "plan": (convert_run.writer, "plan"),
    "weights": (writer, "_converted"),
    "checksums": (blocks, "sha256"),
    "config": (json, "dumps"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_interruption_leaves_nothing(moe, tmp_path, capsys, monkeypatch, moment):
    before = [signal.getsignal(number) for number in SIGNALS]
    once(monkeypatch, *MOMENTS[moment])
    assert run(moe, tmp_path / "new" / "out") == 130
    assert capsys.readouterr().err == AGAIN
    assert held(tmp_path) == {"hf"}
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_impatience_does_not_stop_the_removal(moe, tmp_path, monkeypatch):
    once(monkeypatch, writer, "_converted")
    once(monkeypatch, destination.shutil, "rmtree")
    assert run(moe, tmp_path / "out") == 130 and held(tmp_path) == {"hf"}


def test_interruption_between_the_two_renames_of_a_pair_comes_after_them(sources, tmp_path, capsys, monkeypatch):  # noqa: F811
    once(monkeypatch, Path, "rename")
    assert run(sources[0], tmp_path / "out", "--pair") == 130
    assert (
        capsys.readouterr().err == f"error: interrupted; {tmp_path / 'out'}, {tmp_path / 'out'}-assistant: complete\n"
    )
    for name in ("out", "out-assistant"):
        assert main(["check", str(tmp_path / name)]) == 0


def test_signals_that_were_ignored_stay_ignored(moe, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    once(monkeypatch, writer, "_converted", lambda: os.kill(os.getpid(), signal.SIGHUP))
    try:
        assert run(moe, tmp_path / "out") == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def sigint():
    """Ctrl-C as on a terminal: shells start background jobs with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("flags", [(), ("--pair",)])
@pytest.mark.usefixtures("sigint")
def test_interruption_at_any_line(sources, tmp_path, flags):  # noqa: F811
    """A signal at every seventh line of what creates and removes: all is there, or nothing."""
    files = {module.__file__ for module in (convert_run, destination)}
    stop, line = 0, 0

    def trace(frame, event, arg):
        nonlocal line
        line += event == "line"
        if line == stop and event == "line":
            interrupt()
        return trace

    complete = {"out", "out-assistant"} if flags else {"out"}
    codes = set()
    while line >= stop:
        stop, line = stop + 7, 0
        out = tmp_path / str(stop) / "out"
        out.parent.mkdir()
        sys.settrace(lambda frame, *args: trace if frame.f_code.co_filename in files else None)
        try:
            codes.add((run(sources[0], out, *flags), *sorted(held(out.parent))))
        finally:
            sys.settrace(None)
    assert codes == {(130,), (130, *sorted(complete)), (0, *sorted(complete))}


STUCK = """
import sys, time
from convert import writer
from convert.cli import main
writer._converted = lambda *args: time.sleep(100)
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def stuck(moe, tmp_path) -> Iterator[subprocess.Popen]:
    """A real conversion in the middle of its weights."""
    command = [sys.executable, "-c", STUCK, "--hf-path", moe.folder, "--mlx-path", tmp_path / "out"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob(".out.*.tmp/*.safetensors")) and process.poll() is None:
        time.sleep(0.02)
    yield process
    process.kill()
    process.communicate()


def test_stopped_process_leaves_nothing(stuck, tmp_path):
    stuck.send_signal(signal.SIGTERM)
    assert stuck.communicate(timeout=60)[1] == AGAIN and stuck.returncode == 130
    assert held(tmp_path) == {"hf"}


def test_killed_process_leaves_nothing_that_loads_and_the_next_run_removes_it(stuck, moe, tmp_path, capsys):
    (debris,) = tmp_path.glob(".out.*.tmp")
    assert run(moe, tmp_path / "out") == 0  # beside one that runs, which is left alone
    assert capsys.readouterr().err == "" and debris.is_dir()
    destination.shutil.rmtree(tmp_path / "out")
    stuck.kill()
    stuck.wait()
    assert not (debris / "config.json").exists() and main(["check", str(debris)]) == 2
    (tmp_path / ".out.x.tmp").mkdir()  # no name of ours
    capsys.readouterr()
    assert run(moe, tmp_path / "out") == 0
    assert capsys.readouterr().err == f"removed {debris}, left by a conversion that was killed\n"
    assert held(tmp_path) == {"hf", "out", ".out.x.tmp"}

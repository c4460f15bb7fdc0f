"""Prefixes on disk: what is found, what is kept within the limit, and what is not what it should be."""

import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.files import prefix_store
from mlx_gemma_mtp.files.background import Background, Write
from mlx_gemma_mtp.files.prefix_store import HostArray, PrefixStore
from tests.files.prefixes import layers, same

LARGE = 10**9


def opened(folder: Path, key: str = "key", limit: int = LARGE, **options) -> tuple[PrefixStore, list[str]]:
    """A store, and the list of its notices."""
    told: list[str] = []
    return PrefixStore(folder, key, limit, notice=told.append, **options), told


def kept(store: PrefixStore, tokens: list[int], salt: str | None = None) -> Path:
    """Writes an entry, and returns its file."""
    before = set(store.folder.iterdir())
    assert store.put(tokens, salt, layers(tokens, salt)) and store.flush()
    (path,) = set(store.folder.iterdir()) - before
    return path


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_entry_comes_back_bit_for_bit_in_another_store(tmp_path):
    store, told = opened(tmp_path / "new" / "folder")
    tokens = [5, 2**31 - 1, 0, 7]
    path = kept(store, tokens, "a salt")
    length, found = opened(store.folder)[0].read([*tokens, 9], "a salt")
    assert length == 4 and same(found, layers(tokens, "a salt")) and told == []
    assert path.stat().st_mode & 0o777 == 0o600 and store.folder.stat().st_mode & 0o777 == 0o700
    assert b"a salt" not in path.read_bytes() and (store.written, store.dropped) == (1, 0)


def test_a_file_is_one_that_mlx_reads(tmp_path):
    store, _ = opened(tmp_path)
    ones = np.ones((1, 2, 3, 4), np.uint16)
    assert store.put([1, 2, 3], None, [[HostArray("BF16", ones.shape, memoryview(ones).cast("B"))]]) and store.flush()
    arrays = mx.load(str(next(tmp_path.iterdir())))
    assert arrays["tokens"].tolist() == [1, 2, 3] and arrays["0.0"].view(mx.uint16).tolist() == ones.tolist()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=9), st.sampled_from([None, "", "s"]))))
def test_the_longest_known_beginning_is_found(tmp_path_factory, entries):
    store, _ = opened(tmp_path_factory.mktemp("store"))
    for tokens, salt in entries:
        store.put(tokens, salt, layers(tokens, salt))
        store.flush()
    for prompt, salt in [([0, 1, 0, 2, 1], None), *entries, *((tokens[:-1], salt) for tokens, salt in entries)]:
        beginnings = [tokens for tokens, own in entries if own == salt and prompt[: len(tokens)] == tokens]
        longest = max(map(len, beginnings), default=0)
        assert store.longest(prompt, salt) == longest
        found = store.read(prompt, salt)
        assert found is None if not longest else found[0] == longest and same(found[1], layers(prompt[:longest], salt))
    store.close()


def test_salts_and_keys_are_strangers(tmp_path):
    store, _ = opened(tmp_path)
    for salt in (None, "", "one", "\ud800"):
        kept(store, [1, 2, 3], salt)
    for salt in (None, "", "one", "\ud800"):
        assert same(store.read([1, 2, 3], salt)[1], layers([1, 2, 3], salt))
    assert store.longest([1, 2, 3], "two") == 0 and store.read([1, 2, 3], "two") is None
    other, told = opened(tmp_path, "another key")
    assert other.longest([1, 2, 3]) == 0 and other.read([1, 2, 3]) is None
    assert len(files(tmp_path)) == 4 and told == []


def test_what_is_there_is_not_written_again(tmp_path):
    store, _ = opened(tmp_path)
    path = kept(store, [1, 2])
    os.utime(path, (1, 1))
    assert not store.wants([1, 2], None, 10) and not store.put([1, 2], None, layers([1, 2]))
    assert path.stat().st_mtime > 1 and (store.written, store.dropped) == (1, 0)


def test_what_was_used_the_longest_ago_goes_first(tmp_path):
    store, _ = opened(tmp_path)
    paths = {first: kept(store, [first, 1, 2, 3]) for first in range(4)}
    for age, first in enumerate((2, 0, 3, 1)):
        os.utime(paths[first], (age + 1, age + 1))
    store.read([2, 1, 2, 3])  # which is now the newest
    store.limit = 3 * paths[0].stat().st_size
    added = kept_within(store, [4, 1, 2, 3])
    assert files(tmp_path) == sorted([paths[1].name, paths[2].name, added])


def kept_within(store: PrefixStore, tokens: list[int]) -> str:
    """Writes an entry for which others may go, and returns its name."""
    before = set(files(store.folder))
    assert store.put(tokens, None, layers(tokens)) and store.flush()
    (name,) = set(files(store.folder)) - before
    return name


def test_many_entries_stay_within_the_limit(tmp_path):
    kept(opened(tmp_path, "another key")[0], [7] * 30)
    size = next(tmp_path.iterdir()).stat().st_size
    store, told = opened(tmp_path, limit=10 * size)
    rng, most = np.random.default_rng(0), 0
    for _ in range(300):
        tokens = rng.integers(0, 9, rng.integers(1, 60)).tolist()
        store.put(tokens, None, layers(tokens))
        store.flush()
        most = max(most, sum(path.stat().st_size for path in tmp_path.iterdir()))
    assert 8 * size < most <= 10 * size and told == []
    assert not store.put([1] * 600, None, layers([1] * 600)) and store.dropped == 1  # larger than all may be


def test_files_of_others_are_left_alone(tmp_path):
    names = ["model.safetensors", "prefix-notes.txt", "x.part", "prefix-0123-1-0.safetensors"]
    for name in names:
        (tmp_path / name).write_bytes(b"x" * 1000)
        os.utime(tmp_path / name, (1, 1))
    store, told = opened(tmp_path, limit=4000)
    for first in range(20):
        assert store.put([first], None, layers([first])) and store.flush()
    assert set(names) < set(files(tmp_path)) and told == []


def test_unfinished_files_are_removed_once_they_are_old(tmp_path):
    store, _ = opened(tmp_path)
    path = kept(store, [1])
    old, new = (tmp_path / f"{path.name}.{word}.part" for word in ("old", "new"))
    for part in (old, new):
        part.write_bytes(b"x")
    long_ago = time.time() - prefix_store.STALE - 1
    os.utime(old, (long_ago, long_ago))
    opened(tmp_path)
    assert files(tmp_path) == sorted([path.name, new.name])


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_damage_is_never_served(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("store")
    store, told = opened(folder)
    path = kept(store, [3, 1, 4, 1, 5])
    whole = path.read_bytes()
    if data.draw(st.booleans()):
        spoilt = bytearray(whole)
        for _ in range(data.draw(st.integers(1, 3))):
            spoilt[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
        if bytes(spoilt) == whole:
            return
    else:
        begin = data.draw(st.integers(0, len(whole) - 1))
        end = data.draw(st.integers(begin + 1, len(whole)))
        spoilt = whole[:begin] + whole[end:] + data.draw(st.binary(max_size=3))
        if spoilt == whole:
            return
    path.write_bytes(spoilt)
    assert store.read([3, 1, 4, 1, 5, 9]) is None
    assert told == [f"{path} is damaged; it is ignored and removed"] and files(folder) == []
    store.close()
    shutil.rmtree(folder)


def test_every_cut_is_noticed(tmp_path):
    store, told = opened(tmp_path)
    path = kept(store, [3, 1])
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert store.read([3, 1]) is None and not path.exists()
    assert len(told) == 1  # once for each file


def strange(kind: str, path: Path, other: Path) -> str:
    """Puts something in place of an entry's file, and returns what is said of it."""
    if kind == "key":
        shutil.copy(other, path)
        return "is another model's, or another version's; it is ignored and removed"
    path.unlink()
    if kind == "tokens":
        shutil.copy(next(path.parent.glob("prefix-*-2-*")), path)
        return "has another file's name; it is ignored and removed"
    if kind == "pipe":
        os.mkfifo(path)
        return "is no regular file; it is ignored and removed"
    if kind == "folder":
        path.mkdir()
        return "cannot be read (Is a directory); it is ignored"
    path.symlink_to(other)
    return "cannot be read (Too many levels of symbolic links); it is ignored"


@pytest.mark.parametrize("kind", ["key", "tokens", "pipe", "folder", "link"])
def test_what_stands_in_place_of_an_entry_is_not_read(tmp_path, kind):
    other = kept(opened(tmp_path / "other", "another key")[0], [1, 2, 3])
    store, told = opened(tmp_path / "own")
    kept(store, [1, 9]), kept(store, [1])
    path = kept(store, [1, 2, 3])
    says = strange(kind, path, other)
    length, found = store.read([1, 2, 3])  # what is shorter serves
    assert length == 1 and same(found, layers([1]))
    assert told == [f"{path} {says}"]
    assert store.longest([1, 2, 3]) == 1 and store.read([1, 2, 3])[0] == 1 and len(told) == 1
    if kind != "folder":  # and is written anew
        assert store.put([1, 2, 3], None, layers([1, 2, 3])) and store.flush()
        assert same(store.read([1, 2, 3])[1], layers([1, 2, 3]))


def test_layers_that_do_not_fit_are_not_served(tmp_path):
    path = kept(opened(tmp_path)[0], [1, 2])
    store, told = opened(tmp_path, fits=lambda tokens, found: len(found) == tokens)
    assert store.read([1, 2]) is None
    assert told == [f"{path} has other shapes than this model's; it is ignored and removed"]


def test_files_that_vanish_were_never_there(tmp_path, monkeypatch):
    store, told = opened(tmp_path)
    kept(store, [1]), kept(store, [1, 2])
    known = store._known
    monkeypatch.setattr(store, "_known", lambda *asked: [known(*asked), shutil.rmtree(tmp_path)][0])
    assert store.read([1, 2, 3]) is None
    monkeypatch.undo()
    assert store.longest([1, 2, 3]) == 0 and told == []
    tmp_path.mkdir()
    shutil.rmtree(tmp_path)
    assert store.put([1], None, layers([1])) and store.flush() and store.longest([1]) == 1 and told == []


def test_a_folder_that_nothing_can_be_asked_about_has_no_files(tmp_path, monkeypatch):
    """Every look at a file fails, again and again: nothing is raised, into a round least of all."""
    store, told = opened(tmp_path)
    kept(store, [1])

    def fails(*asked: object, **named: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    for name in ("utime", "stat", "lstat"):
        monkeypatch.setattr(os, name, fails)
    length, found = store.read([1, 2])
    assert length == 1 and same(found, layers([1]))
    assert store.put([1], None, layers([1])) and store.flush(10)  # it is lost, and told
    monkeypatch.undo()
    assert store.longest([1]) == 1 and len(told) == store.dropped == 1


def test_whoever_is_told_may_raise(tmp_path, monkeypatch):
    """A notice that nobody can print: neither the thread that writes ends, nor a request."""
    told = []

    def notice(message: str) -> None:
        told.append(message)
        raise BrokenPipeError

    store, replace = PrefixStore(tmp_path, "key", LARGE, notice=notice), os.replace

    def full(*asked: object) -> None:
        monkeypatch.setattr(os, "replace", replace)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    assert store.put([1], None, layers([1])) and store.flush(10) and len(told) == 1
    monkeypatch.setattr(prefix_store, "RETRY", 0)
    path = kept(store, [1, 2])
    path.write_bytes(b"damaged")
    assert store.read([1, 2, 3]) is None and len(told) == 2


def test_without_a_thread_nothing_is_written(tmp_path, monkeypatch):
    """A process may have as many threads as it is allowed: what is put then is dropped, and later writes work."""
    store, told = opened(tmp_path)

    def full(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", full)
    assert not store.put([1], None, layers([1])) and store.flush(0) and store.dropped == 1
    monkeypatch.undo()
    assert kept(store, [1]) and told == []


def test_a_path_that_can_never_be_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/prefixes")):
        with pytest.raises(UserError, match=r"name a folder|expected one for prefixes") as error:
            opened(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_waiting_writes_are_bounded_by_bytes(tmp_path):
    go, done = threading.Event(), []
    background = Background(100)
    assert background.put(Write(go.wait, 1000))  # a single one may be larger
    assert not background.has_room(1) and not background.put(Write(lambda: done.append(0), 1))
    go.set()
    assert background.flush(10)
    go.clear()
    assert background.put(Write(go.wait, 60)) and background.put(Write(lambda: done.append(1), 40))
    assert not background.put(Write(lambda: done.append(2), 1)) and not background.flush(0.01)
    go.set()
    assert background.flush(10) and done == [1]
    background.close()
    assert not background.put(Write(lambda: done.append(3), 1)) and not background.has_room(1)


def test_closing_does_not_wait_for_a_disk_that_hangs(tmp_path, monkeypatch):
    store, told = opened(tmp_path)
    write, hangs, go = os.write, threading.Event(), threading.Event()
    monkeypatch.setattr(os, "write", lambda *asked: [hangs.set(), go.wait(), write(*asked)][-1])
    assert store.put([1], None, layers([1])) and hangs.wait(10)
    store.put([2], None, layers([2]))
    store.close(0.01)
    go.set()
    assert store.flush(10) and files(tmp_path) == [] and (store.written, store.dropped, told) == (0, 1, [])
    assert not store.put([3], None, layers([3]))


EXIT = """
import os, sys, threading
from pathlib import Path
from mlx_gemma_mtp.files import background
from mlx_gemma_mtp.files.prefix_store import PrefixStore
from tests.files.prefixes import layers
store = PrefixStore(Path(sys.argv[1]), "key", 10**9, notice=print)
if sys.argv[2] == "hangs":
    background.Background.close.__defaults__ = (0.05,)
    os.write = lambda *asked: threading.Event().wait()
for first in range(5):
    store.put([first], None, layers([first]))
print("end")
"""


@pytest.mark.parametrize("disk", ["works", "hangs"])
def test_a_program_that_ends_writes_what_waits_and_does_not_hang(tmp_path, disk):
    command = [sys.executable, "-c", EXIT, tmp_path, disk]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2])
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")
    store, told = opened(tmp_path)
    assert [store.longest([first]) for first in range(5)] == [int(disk == "works")] * 5 and told == []

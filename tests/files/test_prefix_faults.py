"""Prefixes on disk, and what may happen to it: power cuts, disks that are full or can only be read, other processes."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_gemma_mtp.files.prefix_store import PrefixStore
from tests.files.faults import CALLS, OLD, USED, at_every, prepared, use, wrong
from tests.files.prefixes import layers, same

ROOT = Path(__file__).parents[2]
ERRORS = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO)


def test_a_process_that_is_killed_anywhere_loses_nothing_but_its_entry():
    command = [sys.executable, "-m", "tests.files.faults"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["faults"] == [] and found["points"] > 50


@pytest.mark.parametrize("share", [0, 0.1, 0.3, 0.5, 0.8, 0.99])
def test_what_a_power_cut_did_not_write_is_not_served(tmp_path, share):
    """A disk may know of a renamed file before it has its bytes: these are zeros, or missing."""
    prepared(tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        whole = path.read_bytes()
        path.write_bytes(whole[: int(share * len(whole))].ljust(len(whole), b"\0"))
    told = []
    store = PrefixStore(tmp_path, "key", 10**9, notice=told.append)
    assert store.read(OLD) is None and store.read(USED) is None and len(told) == 2


@pytest.mark.parametrize("number", ERRORS, ids=lambda number: errno.errorcode[number])
def test_a_call_that_fails_anywhere_loses_nothing_but_its_entry(tmp_path, number):
    """Each call of the system in turn, of all that a store makes while it is used; the next ones work again."""
    at, failed = 0, set()
    while True:
        folder, told, hit = tmp_path / str(at), [], []
        limit = prepared(folder)

        def act(name, count, call, arguments, at=at, hit=hit):
            if count != at:
                return call()
            hit.append(name)
            if name == "write":
                call(arguments[0], arguments[1][: len(arguments[1]) // 2])
            raise OSError(number, os.strerror(number))

        with at_every(act):
            written = use_or_none(folder, limit, told)
        if not hit:
            break
        assert wrong(folder, limit) == [], f"call {at}, {hit}"
        assert len(told) <= 1, f"call {at}, {hit}: {told}"
        if hit in (["write"], ["ftruncate"], ["replace"]):
            assert len(told) == 1 and os.strerror(number) in told[0] and not written[1]  # it rests then
        failed |= set(hit)
        at += 1
    assert failed == set(CALLS) and at > 30


def use_or_none(folder: Path, limit: int, told: list[str]) -> tuple[bool, bool] | None:
    """What `use` returns; None where the folder is refused when it is opened."""
    try:
        return use(folder, limit, told.append)
    except ValueError as error:
        assert str(folder) in str(error)
        return None


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A real file system of 400,000 bytes, which can be mounted anew."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", place], capture_output=True)
    if done.returncode:
        pytest.skip("nothing can be mounted here")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk(disk):
    now, told = [0.0], []
    store = PrefixStore(disk / "new", "key", 10**9, notice=told.append, clock=lambda: now[0])
    size, written = 0, 0
    for first in range(8):
        tokens = [first] * 900
        if store.wants(tokens, None, 1):
            store.put(tokens, None, layers(tokens))
            store.flush()
        written += store.longest(tokens) > 0
        size = sum(path.stat().st_size for path in (disk / "new").iterdir())
    assert 0 < written < 8 and size > 200_000 and store.dropped == 8 - written
    assert told == [f"prefixes are not kept in {disk / 'new'} (No space left on device); what is there is read"]
    assert [store.read([first] * 900) is not None for first in range(8)] == [first < written for first in range(8)]
    for path in list((disk / "new").iterdir()):
        path.unlink()
    assert not store.wants([1], None, 1)  # it rests
    now[0] += 100
    assert store.put([1], None, layers([1])) and store.flush() and store.longest([1]) == 1 and len(told) == 1


def test_a_folder_that_can_only_be_read(disk):
    """Mounted so: whoever runs the tests may be root, whom no mode of a folder stops."""
    limit = prepared(disk)
    damaged = next(path for path in disk.glob("*.safetensors") if path.stat().st_mtime == 1)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    told, before = [], sorted(disk.iterdir())
    assert use(disk, limit, told.append) == (False, False)
    store = PrefixStore(disk, "key", limit, notice=told.append)
    assert same(store.read(USED)[1], layers(USED))
    assert store.read(OLD) is None and store.read(OLD) is None and store.longest(OLD) == 0
    assert told == [
        f"prefixes are not kept in {disk} (Read-only file system); what is there is read",
        f"{damaged} is damaged; it is ignored",
    ]
    assert sorted(disk.iterdir()) == before
    with pytest.raises(ValueError, match="name a folder that can be read and written"):
        PrefixStore(disk / "new", "key", limit)


CROWD = """
import random, sys
from pathlib import Path
from mlx_gemma_mtp.files import prefix_file
from mlx_gemma_mtp.files.prefix_store import PrefixStore
from tests.files.prefixes import layers, same
prefix_file.PIECE = 512
folder, seed, limit = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
random.seed(seed)
store = PrefixStore(folder, "key", limit, notice=print)
hits = 0
for step in range(600):
    tokens = [random.randrange(3) for _ in range(random.randrange(1, 5))]
    if random.random() < 0.5:
        store.put(tokens, None, layers(tokens))
    else:
        found = store.read(tokens)
        hits += found is not None
        if found is not None and not same(found[1], layers(tokens[:found[0]])):
            print("wrong", tokens)
store.flush()
store.close()
print(hits > 50)
"""


def test_processes_that_read_write_and_evict_at_once(tmp_path):
    limit = 40_000
    command = [sys.executable, "-c", CROWD, tmp_path]
    crowd = [
        subprocess.Popen([*command, str(seed), str(limit)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for seed in range(3)
    ]
    assert [process.communicate(timeout=120)[0] for process in crowd] == ["True\n"] * 3
    left = list(tmp_path.iterdir())
    assert limit // 2 < sum(path.stat().st_size for path in left) <= limit
    assert all(path.name.endswith(".safetensors") for path in left)

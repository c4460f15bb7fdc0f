"""Where compiled kernels are kept, and what is made ready before it is needed."""

import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_gemma_mtp.engine import warmup
from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.files import hub
from mlx_gemma_mtp.machine.device import TABLE, Kind
from mlx_gemma_mtp.models import linear, loading
from mlx_gemma_mtp.ops.kernels import few_rows

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="MLX compiles for CPUs on Linux alone")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MLX_GEMMA_MTP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", "/nowhere/at/all")  # as if unset: MLX fails on it, Python passes over it
    return tmp_path / "cache"


def test_kernels_are_kept_in_the_user_s_cache(cache):
    before = tempfile.gettempdir()
    warmup.keep_kernels()
    folder = Path(os.environ["TMPDIR"])
    assert folder.parent == cache / "kernels" and folder.is_dir() and folder.stat().st_mode & 0o077 == 0
    assert warmup.kernel_folder().is_relative_to(folder) and tempfile.gettempdir() == before


def test_a_folder_that_the_user_named_stays(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    warmup.keep_kernels()
    assert os.environ["TMPDIR"] == str(tmp_path) and not cache.exists()


@pytest.mark.parametrize("name", ["/proc/none", "{tmp}/file/x", '{tmp}/a"b', "{tmp}/$(touch x)", "{tmp}/`x`"])
def test_a_cache_folder_that_cannot_hold_kernels_is_left_alone(cache, tmp_path, monkeypatch, name):
    """Nor does a TMPDIR stay on which MLX would fail."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLX_GEMMA_MTP_CACHE", name.format(tmp=tmp_path))
    warmup.keep_kernels()
    assert os.environ["TMPDIR"] == tempfile.gettempdir()


def test_a_temporary_folder_that_cannot_be_written_is_passed_over(cache, monkeypatch):
    monkeypatch.setenv("TMPDIR", "/proc")
    warmup.keep_kernels()
    assert Path(os.environ["TMPDIR"]).parent == cache / "kernels"


def test_a_program_is_told_about_such_a_folder(monkeypatch):
    monkeypatch.setenv("TMPDIR", "/proc")
    with pytest.raises(UserError, match=r"/proc/mlx.* set TMPDIR to a folder"):
        warmup.warm_up(loading.open_target(hub.DEMO / "target"), None, 1)


def test_mlx_looks_there(cache):
    code = (
        "from mlx_gemma_mtp.engine import warmup; import mlx.core as mx\nwarmup.keep_kernels()\n"
        "mx.eval(mx.compile(lambda x: mx.sin(x) * 2 + 1)(mx.ones((3,))))\n"
        "print(*(file.suffix for file in sorted(warmup.kernel_folder().iterdir())))"
    )
    settings = {"MLX_GEMMA_MTP_BLAS": "off", "MLX_GEMMA_MTP_CACHE": f"{cache} with spaces"}
    environment = {name: value for name, value in (os.environ | settings).items() if name != "TMPDIR"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.split() in ([".cpp", ".so"], []), done  # none where there is no g++
    assert done.returncode == 0, done


def test_what_one_row_does_not_need_is_not_made(monkeypatch):
    """Kernels of two rows are a fifth of a first start."""
    made = []

    class Bench:
        def __init__(self, target, drafter, prompt, params, rows, context, specs):
            made.append(rows)

        def rounds(self, width):
            pass

    monkeypatch.setattr(warmup, "Bench", Bench)
    monkeypatch.setattr(warmup, "preamble_compiled", nullcontext)
    monkeypatch.setattr(warmup, "_done", set())
    target = loading.open_target(hub.DEMO / "target")
    for most, expected in ((1, [1]), (1, []), (8, [2]), (8, [])):
        made.clear()
        warmup.warm_up(target, None, most)
        assert made == expected


@pytest.mark.parametrize("most, rounds", [(1, [(1, 1), (1, 3), (1, 7)]), (8, [(1, 1), (1, 3), (1, 7), (2, 7)])])
def test_on_a_gpu_every_width_is_run_before_the_first_request(monkeypatch, most, rounds):
    """And every kernel of few rows, of every kind of matrix, where products go through them."""
    made, widths = [], []

    class Bench:
        def __init__(self, target, drafter, prompt, params, rows, context, specs):
            self.rows = rows

        def rounds(self, width):
            made.append((self.rows, width))

    def few(x, weights):
        widths.append((x.shape[0], weights.weight.shape))
        return mx.zeros(1)

    target = loading.load_target(hub.DEMO / "target")
    monkeypatch.setattr(warmup, "Bench", Bench)
    monkeypatch.setattr(warmup.device, "traits", lambda: TABLE[Kind.METAL])
    warmup.warm_up(target, None, most)
    assert made == rounds and not widths and "compiles kernels" in warmup.making_ready(target)
    monkeypatch.setattr(linear, "why_off", lambda name: None)
    monkeypatch.setattr(few_rows, "usable", lambda *_: True)
    monkeypatch.setattr(few_rows, "few_rows", few)
    assert linear.keep_rows(target, target.dtype) == []
    warmup.warm_up(target, None, most)
    kinds = {module.weight.shape for module in linear.products_of(target)}
    assert set(widths) == {(rows, kind) for rows in few_rows.ROWS for kind in kinds} and len(kinds) > 5


def test_what_is_being_done_is_told(cache, monkeypatch):
    target = loading.open_target(hub.DEMO / "target")
    monkeypatch.setattr(warmup.shutil, "which", lambda name: "/usr/bin/g++")
    monkeypatch.setenv("TMPDIR", str(cache.parent))
    assert "compiling kernels" in warmup.making_ready(target)
    warmup.kernel_folder().mkdir(parents=True)
    (warmup.kernel_folder() / "libx.so").touch()
    assert warmup.making_ready(target) == "importing the tokenizer"
    (warmup.kernel_folder() / "libx.so").unlink()
    monkeypatch.setattr(warmup.shutil, "which", lambda name: None)
    assert warmup.making_ready(target) == "importing the tokenizer"


def test_processes_that_start_together_compile_in_turn(cache, monkeypatch):
    """One that is stopped in the middle is not waited for without end."""
    monkeypatch.setenv("TMPDIR", str(cache.parent))
    code = (
        "from mlx_gemma_mtp.engine import warmup\nwith warmup._one_at_a_time():\n    print('in', flush=True); input()\n"
        "print('out', flush=True)"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    other = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"MLX_GEMMA_MTP_BLAS": "off"}, **pipes)
    assert other.stdout.readline() == "in\n"
    folder = os.open(warmup.kernel_folder(), os.O_RDONLY)
    assert not warmup._locked(folder)
    monkeypatch.setattr(warmup, "PATIENCE", 0)
    with warmup._one_at_a_time():
        pass
    assert other.communicate("\n", timeout=60)[0] == "out\n" and warmup._locked(folder)
    os.close(folder)


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++ here")
def test_g_plus_plus_takes_the_compiled_header(cache, monkeypatch):
    """`g++ -H` marks a compiled header that it takes with an exclamation mark."""
    monkeypatch.setenv("TMPDIR", str(cache.parent))
    include, folder = Path(mx.__file__).parent / "include", warmup.kernel_folder()
    if not (include / warmup.PREAMBLE).is_file() or "clang" in subprocess.getoutput("g++ --version"):
        pytest.skip("another MLX, or another compiler")
    with warmup.preamble_compiled():
        (folder / "x.cpp").write_text(f'#include "{warmup.PREAMBLE}"\n')
        argv = ["g++", *warmup.FLAGS, "-shared", "-I", include, "-H", folder / "x.cpp", "-o", folder / "libx.so"]
        done = subprocess.run(argv, capture_output=True, text=True, check=True)
        assert f"! {folder / warmup.PREAMBLE}.gch" in done.stderr
        with warmup.preamble_compiled():
            pass
        assert (folder / f"{warmup.PREAMBLE}.gch").is_file(), "another's is left to it"
    assert sorted(file.name for file in folder.iterdir()) == ["libx.so", "x.cpp"]


def test_a_header_that_cannot_be_compiled_stops_nothing(cache, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(cache.parent))
    monkeypatch.setattr(warmup, "FLAGS", ("-no-such-flag",))
    with warmup.preamble_compiled():
        assert not list(warmup.kernel_folder().rglob("*.gch"))
    assert list(warmup.kernel_folder().iterdir()) == []

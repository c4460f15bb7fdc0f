"""--stream: the files of a source come, are converted and go one by one; what was done is not done again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest
from hub_server import COMMIT, Hub, served
from huggingface_hub import HfApi, constants
from test_convert import ROOT, Checkpoint, load, make_drafter, make_e2b, make_moe, make_text
from test_convert_pair import sources  # noqa: F401

from convert import remote, stream, writer
from convert.cli import main
from convert.destination import Destination
from mlx_gemma_mtp.files import hub as files_hub

MAKERS = {"e2b": make_e2b, "moe": make_moe, "text": make_text, "drafter": make_drafter}
SHARDS = 4
PART = ".out.stream.tmp"


@pytest.fixture
def online(tmp_path, monkeypatch):
    """A hub at the real client's endpoint, and an empty cache."""
    with served() as hub:
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(files_hub, "list_repo_files", HfApi(hub.url).list_repo_files)
        monkeypatch.setenv("NO_PROXY", "*")
        yield hub


def published(hub: Hub, checkpoint: Checkpoint, repo: str = "org/name", shards: int = SHARDS) -> Checkpoint:
    checkpoint.save(shards)
    (checkpoint.folder / "tokenizer.json").write_text("{}")
    hub.repos[repo] = checkpoint.folder
    return checkpoint


def streamed(out: Path, *flags: str, repo: str = "org/name") -> int:
    return main(["--hf-path", repo, "--mlx-path", str(out), "--stream", *flags])


def plainly(checkpoint: Checkpoint, out: Path, *flags: str) -> Path:
    assert main(["--hf-path", str(checkpoint.folder), "--mlx-path", str(out), *flags]) == 0
    return out


def same(one: Path, other: Path) -> bool:
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (one, other)]
    return files[0] == files[1]


def failed(capsys, says: str) -> bool:
    """One line, with `says` in it, after the client's bars."""
    out, error = capsys.readouterr()
    lines = [line for line in error.splitlines() if "error" in line]
    assert out == "" and len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0], error
    assert error.endswith(f"{lines[0]}\n")
    return True


def weights_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.safetensors") if path.is_file())


@pytest.mark.parametrize("flags", [(), ("-q", "--q-group-size", "32")], ids=["floats", "4 bit"])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_the_folder_is_that_of_a_whole_source(online, tmp_path, monkeypatch, make, flags):
    """Byte for byte, in several files; the tensors of a written file come from all over the source."""
    monkeypatch.setattr(writer, "SHARD_BYTES", 60_000)
    checkpoint = published(online, make(tmp_path / "hf"))
    assert streamed(tmp_path / "out", *flags) == 0
    assert same(tmp_path / "out", plainly(checkpoint, tmp_path / "plain", *flags))
    assert len(weights_in(tmp_path / "out")) > 1 and not weights_in(tmp_path / "cache")
    assert not (tmp_path / PART).exists()


def test_one_file_of_the_source_is_here_at_once(online, tmp_path, monkeypatch):
    """Counted whenever one has come, and when one is gone."""
    checkpoint = published(online, make_e2b(tmp_path / "hf"))
    sizes = {path.name: path.stat().st_size for path in weights_in(checkpoint.folder)}
    most, everywhere, held = [], [], sum(sizes.values())

    def watched(name):
        original = getattr(remote.Remote, name)

        def call(self, *args):
            original(self, *args)
            here = weights_in(tmp_path / PART / stream.PLACE)
            most.append(sum(path.stat().st_size for path in here))
            everywhere.append(sum(path.stat().st_size for path in weights_in(tmp_path)) - held)

        monkeypatch.setattr(remote.Remote, name, call)

    watched("fetch")
    watched("keep")
    assert streamed(tmp_path / "out", "-q") == 0
    result = sum(path.stat().st_size for path in weights_in(tmp_path / "out"))
    assert sorted(set(most)) == sorted({0, *sizes.values()})
    assert max(everywhere) <= result + max(sizes.values()) < result + held
    assert online.downloads == dict.fromkeys(sizes, 1) | {"config.json": 1, "model.safetensors.index.json": 1,
                                                          "tokenizer.json": 1}  # fmt: skip


def single_experts(folder: Path) -> Checkpoint:
    """Experts one by one, as some tools save them: of one layer they lie in all files."""
    checkpoint = make_moe(folder)
    for name in [name for name in checkpoint.weights if name.endswith("experts.gate_up_proj")]:
        path, fused = name.removesuffix("gate_up_proj"), checkpoint.weights.pop(name)
        down = checkpoint.weights.pop(f"{path}down_proj")
        for i in range(fused.shape[0]):
            half = fused.shape[1] // 2
            parts = {"gate": fused[i, :half], "up": fused[i, half:], "down": down[i]}
            checkpoint.weights |= {f"{path}{i}.{part}_proj.weight": value for part, value in parts.items()}
    return checkpoint


def test_experts_that_lie_in_several_files(online, tmp_path):
    checkpoint = published(online, single_experts(tmp_path / "hf"))
    assert streamed(tmp_path / "out", "-q") == 0
    assert same(tmp_path / "out", plainly(checkpoint, tmp_path / "plain", "-q"))
    whole = make_moe(tmp_path / "fused")
    whole.save()
    for name, value in load(plainly(whole, tmp_path / "floats", "-q"))[0].items():
        assert mx.array_equal(value, load(tmp_path / "out")[0][name]), name
    assert all(online.downloads[path.name] == 1 for path in weights_in(checkpoint.folder))


def test_mlx_weights_are_dequantised(online, tmp_path):
    checkpoint = make_moe(tmp_path / "hf")
    checkpoint.save()
    online.repos["org/name"] = plainly(checkpoint, tmp_path / "few", "-q")
    assert streamed(tmp_path / "out", "-d") == 0
    assert main(["--hf-path", str(tmp_path / "few"), "--mlx-path", str(tmp_path / "plain"), "-d"]) == 0
    assert same(tmp_path / "out", tmp_path / "plain")


def test_a_pair(online, sources, tmp_path):  # noqa: F811
    for source, repo in zip(sources, ("org/name", "org/name-assistant"), strict=True):
        published(online, source, repo, 3)
    assert streamed(tmp_path / "out", "-q", "--pair") == 0
    plainly(sources[0], tmp_path / "plain", "-q", "--pair")
    assert same(tmp_path / "out", tmp_path / "plain")
    assert same(tmp_path / "out-assistant", tmp_path / "plain-assistant")


def test_files_that_the_cache_has_are_read_there(online, tmp_path):
    checkpoint = published(online, make_moe(tmp_path / "hf"))
    assert main(["--hf-path", "org/name", "--mlx-path", str(tmp_path / "plain")]) == 0
    cached, online.downloads = weights_in(tmp_path / "cache"), type(online.downloads)()
    assert streamed(tmp_path / "out") == 0 and same(tmp_path / "out", tmp_path / "plain")
    assert not any(online.downloads[path.name] for path in weights_in(checkpoint.folder))
    assert weights_in(tmp_path / "cache") == cached


# ---- what is stopped goes on ---------------------------------------------------------------


def test_what_is_done_is_not_downloaded_again(online, tmp_path, capsys):
    checkpoint = published(online, make_e2b(tmp_path / "hf"))
    names = [path.name for path in weights_in(checkpoint.folder)]
    online.refused = {names[2]}
    assert streamed(tmp_path / "out", "-q") == 2
    assert failed(capsys, f"{names[2]} of 'org/name' cannot be downloaded (") and not (tmp_path / "out").exists()
    assert main(["check", str(tmp_path / PART)]) == 2  # no model yet
    online.refused = set()
    assert streamed(tmp_path / "out", "-q") == 0
    assert [online.downloads[name] for name in names] == [1, 1, 1, 1]
    assert same(tmp_path / "out", plainly(checkpoint, tmp_path / "plain", "-q"))


def test_where_what_is_done_is_kept_is_told(online, tmp_path, capsys):
    published(online, make_e2b(tmp_path / "hf"))
    online.refused = {f"model-2-of-{SHARDS}.safetensors"}
    assert streamed(tmp_path / "out") == 2
    assert failed(capsys, f"; what is done is kept in {tmp_path / PART}, where the same command goes on")


STUCK = """
import sys, time
from convert import writer
from convert.cli import main
write, calls = writer._converted, []
def slow(job, *args):
    calls.append(job.tensor.path)
    if len(set(calls)) == 3:
        time.sleep(600)
    return write(job, *args)
writer._converted = slow
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "stopped"])
def test_a_process_that_is_stopped_in_the_middle(online, tmp_path, capsys, number):
    """In the third file: what is half-written is written again, what is whole is not."""
    checkpoint = published(online, make_moe(tmp_path / "hf"))
    names = [path.name for path in weights_in(checkpoint.folder)]
    flags = ["--hf-path", "org/name", "--mlx-path", tmp_path / "out", "--stream", "-q"]
    settings = {"HF_ENDPOINT": online.url, "HF_HUB_CACHE": str(tmp_path / "cache"), "NO_PROXY": "*"}
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, *flags], cwd=ROOT, env=os.environ | settings, stderr=subprocess.PIPE, text=True
    )
    journal = tmp_path / PART / stream.JOURNAL
    while process.poll() is None:
        time.sleep(0.02)
        third = tmp_path / PART / stream.PLACE / names[2]
        if journal.exists() and len(json.loads(journal.read_text())["done"]) == 2 and third.exists():
            break
    assert process.poll() is None, process.communicate()
    assert streamed(tmp_path / "out", "-q") == 2 and failed(capsys, f"another conversion to {tmp_path / 'out'} runs")
    process.send_signal(number)
    error = process.communicate(timeout=120)[1]
    if number == signal.SIGTERM:
        assert f"error: interrupted; what is done is kept in {tmp_path / PART}; run the same command again" in error
    assert not (tmp_path / "out").exists() and main(["check", str(tmp_path / PART)]) == 2
    assert streamed(tmp_path / "out", "-q") == 0
    assert [online.downloads[name] for name in names] == [1, 1, 1, 1]
    assert same(tmp_path / "out", plainly(checkpoint, tmp_path / "plain", "-q"))


def stopped(hub: Hub, out: Path, *flags: str, after: int = 2) -> None:
    hub.refused = {f"model-{after + 1}-of-{SHARDS}.safetensors"}
    assert streamed(out, *flags) == 2
    hub.refused = set()
    hub.downloads.clear()


@pytest.mark.parametrize("what", ["recipe", "commit", "journal", "file"])
def test_only_the_same_conversion_goes_on(online, tmp_path, capsys, what):
    """Another recipe or commit, and what somebody damaged, begin anew."""
    checkpoint = published(online, make_moe(tmp_path / "hf"))
    stopped(online, tmp_path / "out", "-q")
    flags = ["-q", "--q-bits", "8"] if what == "recipe" else ["-q"]
    if what == "commit":
        online.commits["org/name"] = COMMIT[::-1]
    elif what == "journal":
        (tmp_path / PART / stream.JOURNAL).write_text("{")
    elif what == "file":
        (tmp_path / PART / "model.safetensors").unlink()
    assert streamed(tmp_path / "out", *flags) == 0
    assert f"{tmp_path / PART} holds a part of another conversion, which is removed\n" in capsys.readouterr().err
    assert all(online.downloads[path.name] == 1 for path in weights_in(checkpoint.folder))
    assert same(tmp_path / "out", plainly(checkpoint, tmp_path / "plain", *flags))


def test_a_pair_goes_on_in_its_second_folder(online, sources, tmp_path):  # noqa: F811
    for source, repo in zip(sources, ("org/name", "org/name-assistant"), strict=True):
        published(online, source, repo, 1 if repo == "org/name" else 2)
    online.refused = {"model-2-of-2.safetensors"}
    assert streamed(tmp_path / "out", "--pair") == 2 and not (tmp_path / "out").exists()
    online.refused = set()
    assert streamed(tmp_path / "out", "--pair") == 0
    assert {name: n for name, n in online.downloads.items() if name.startswith("model")} == {
        "model.safetensors": 1, "model-1-of-2.safetensors": 1, "model-2-of-2.safetensors": 1,
        "model.safetensors.index.json": 1,
    }  # fmt: skip
    plainly(sources[0], tmp_path / "plain", "--pair")
    assert same(tmp_path / "out-assistant", tmp_path / "plain-assistant")


def test_what_is_kept_goes_when_the_folder_is_there(online, tmp_path):
    checkpoint = published(online, make_moe(tmp_path / "hf"))
    stopped(online, tmp_path / "out")
    assert (tmp_path / PART).is_dir()
    plainly(checkpoint, tmp_path / "out")
    assert not (tmp_path / PART).exists()


# ---- what cannot be --------------------------------------------------------------------------


def test_repeats_are_compared_when_both_are_here(online, tmp_path, capsys):
    checkpoint = make_moe(tmp_path / "hf")
    table = checkpoint.weights["model.language_model.embed_tokens.weight"]
    checkpoint.weights["lm_head.weight"] = table
    published(online, checkpoint)
    assert streamed(tmp_path / "out") == 0
    shutil.rmtree(tmp_path / "out")
    capsys.readouterr()
    checkpoint.weights["lm_head.weight"] = table * 2
    published(online, checkpoint)
    assert streamed(tmp_path / "out") == 2
    assert failed(capsys, "org/name: lm_head.weight differs from model.language_model.embed_tokens.weight")
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_another_one_when_it_comes(online, tmp_path, capsys, monkeypatch):
    checkpoint = published(online, make_moe(tmp_path / "hf"))
    fetch, name = remote.Remote.fetch, f"model-2-of-{SHARDS}.safetensors"

    def changed(self, path):
        if path.name == name:
            shutil.copyfile(checkpoint.folder / f"model-1-of-{SHARDS}.safetensors", checkpoint.folder / name)
        fetch(self, path)

    monkeypatch.setattr(remote.Remote, "fetch", changed)
    assert streamed(tmp_path / "out") == 2
    assert failed(capsys, f"{name} of 'org/name' came with another header than the hub told before")
    assert not (tmp_path / PART / stream.PLACE / name).exists()


def test_a_disk_that_is_too_small_is_told_before_a_download(online, tmp_path, capsys, monkeypatch):
    checkpoint = published(online, make_moe(tmp_path / "hf"))
    free = []
    monkeypatch.setattr(Destination, "check_space", lambda self, size: free.append(size))
    assert streamed(tmp_path / "out") == 0
    largest = max(path.stat().st_size for path in weights_in(checkpoint.folder))
    arrays = load(tmp_path / "out")[0].values()
    assert free == [largest + sum(value.nbytes for value in arrays)]


def without(name: str):
    return lambda folder: (folder / name).unlink()


def escaping(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-1-of", "../model-1-of"))


def short(folder: Path) -> None:
    (folder / f"model-1-of-{SHARDS}.safetensors").write_bytes(b"short")


BAD = {
    "no config": (without("config.json"), "config.json"),
    "a file is missing": (without(f"model-1-of-{SHARDS}.safetensors"), f"model-1-of-{SHARDS}.safetensors"),
    "a path in the index": (escaping, "expected a plain NAME.safetensors"),
    "a broken header": (short, "header length"),
    "another model": (lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'), "'llama'"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "cannot be read as JSON"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_sources_are_one_line(online, tmp_path, capsys, case):
    damage, says = BAD[case]
    damage(published(online, make_moe(tmp_path / "hf")).folder)
    assert streamed(tmp_path / "out") == 2
    assert failed(capsys, says)
    assert not (tmp_path / PART).exists() and not (tmp_path / "out").exists()


def test_bad_input_is_one_line(online, tmp_path, capsys):
    (tmp_path / "hf").mkdir()
    for flags, repo, says in (
        ((), str(tmp_path / "hf"), "--stream is for a repository on the hub"),
        ((), "org/none", "there is no model 'org/none'"),
        (("--quality",), "org/name", "--quality reads the whole source, of which --stream keeps nothing"),
    ):
        assert streamed(tmp_path / "out", *flags, repo=repo) == 2
        assert failed(capsys, says) and {path.name for path in tmp_path.iterdir()} <= {"hf", "cache"}

"""Finding models and their drafters; memory is checked first."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from convert.cli import main as convert
from mlx_gemma_mtp import generate, load
from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.files import hub


def answer(kind: type, status: int) -> HfHubHTTPError:
    """An error of the hub's client, as it raises it for an answer of the hub."""
    return kind(f"{status} for url\nmore", response=SimpleNamespace(status_code=status, headers={}, request=None))


NOT_THERE = answer(RepositoryNotFoundError, 404)


def folders(root, *names):
    for name in names:
        (root / name).mkdir(exist_ok=True)
        (root / name / "config.json").write_text("{}")
        (root / name / "model.safetensors").write_bytes(b"")
    return root / names[0]


def test_the_bundled_pair_is_the_default():
    pair = hub.find_pair(None, "auto")
    assert (pair.target, pair.drafter, pair.reason) == (hub.DEMO / "target", hub.DEMO / "drafter", None)
    assert "none" in hub.find_pair(None, "none").reason


@pytest.mark.parametrize("sibling", ["m-4bit-assistant", "m-assistant", "m-assistant-bf16", "drafter"])
def test_a_drafter_beside_its_target_is_found(tmp_path, sibling):
    target = folders(tmp_path, "m-4bit", sibling)
    assert hub.find_pair(str(target), "auto").drafter == tmp_path / sibling


def test_mlx_community_spells_the_two_unlike(tmp_path):
    target = folders(tmp_path, "gemma-4-26b-a4b-it-4bit", "gemma-4-26B-A4B-it-assistant-bf16")
    assert hub.find_pair(str(target), "auto").drafter == tmp_path / "gemma-4-26B-A4B-it-assistant-bf16"


def test_no_drafter_gives_the_reason(tmp_path):
    pair = hub.find_pair(str(folders(tmp_path, "m")), "auto")
    assert pair.drafter is None and "m-assistant" in pair.reason


def test_hub_ids_are_downloaded_and_their_drafters_found_by_name(tmp_path, monkeypatch):
    asked = []

    def download(name, revision=None, **patterns):
        asked.append((name, revision))
        if "4bit-assistant" in name:
            raise NOT_THERE
        return str(folders(tmp_path, name.replace("/", "-")))

    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *args, **kwargs: None)
    pair = hub.find_pair("org/gemma-it-4bit", "auto", "main")
    assert pair.drafter == tmp_path / "org-gemma-it-assistant"
    assert asked[0] == ("org/gemma-it-4bit", "main") and ("org/gemma-it-assistant", None) in asked


@pytest.mark.parametrize(
    "error, message",
    [
        (LocalEntryNotFoundError("down"), "reached (down); check the name, or connect and run: hf download org/name"),
        (OSError("no route\nmore"), "(no route)"),
    ],
)
def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch, error, message):
    def download(*args, **kwargs):
        raise error

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(UserError) as raised:
        hub.find("org/name")
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_repository_that_is_not_there(monkeypatch):
    def download(*args, **kwargs):
        raise NOT_THERE

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(UserError, match="neither a folder nor a repository"):
        hub.find("org/name")


def test_a_hub_that_does_not_answer_is_asked_for_one_drafter_only(tmp_path, monkeypatch):
    """The reason says so; decoding goes on plainly."""
    asked = []

    def download(name, revision=None, **patterns):
        asked.append(name)
        if "assistant" in name:
            raise LocalEntryNotFoundError("no route")
        return str(folders(tmp_path, "target"))

    monkeypatch.setattr(hub, "snapshot_download", download)
    pair = hub.find_pair("org/gemma-4-E2B-it", "auto")
    assert pair.drafter is None and "no route" in pair.reason and len(set(asked)) == 2


@pytest.mark.parametrize(
    "name, ids",
    [
        ("org/mine-4bit", ["org/mine-4bit-assistant", "org/mine-assistant"]),
        (
            "mlx-community/gemma-4-26b-a4b-it-4bit",
            [
                "mlx-community/gemma-4-26b-a4b-it-4bit-assistant",
                "mlx-community/gemma-4-26b-a4b-it-assistant",
                "google/gemma-4-26B-A4B-it-assistant",
                "mlx-community/gemma-4-26B-A4B-it-assistant-bf16",
            ],
        ),
        ("gemma-4-E2B", ["google/gemma-4-E2B-assistant", "mlx-community/gemma-4-E2B-assistant-bf16"]),
        ("gemma-4-E2B-italian", ["google/gemma-4-E2B-assistant", "mlx-community/gemma-4-E2B-assistant-bf16"]),
        (
            "my-gemma-4-12b-it-qat",
            [
                "google/gemma-4-12B-it-qat-q4_0-unquantized-assistant",
                "google/gemma-4-12B-it-assistant",
                "mlx-community/gemma-4-12B-it-assistant-bf16",
            ],
        ),
        ("notes", []),
    ],
)
def test_names_of_drafters(name, ids):
    assert hub._drafter_ids(name, tuned=False) == ids
    if "gemma-4-E2B" in name:  # the template says more than the name
        tuned = ["google/gemma-4-E2B-it-assistant", "mlx-community/gemma-4-E2B-it-assistant-bf16"]
        assert hub._drafter_ids(name, tuned=True) == tuned


@pytest.mark.parametrize(
    "target, drafter, refused",
    [
        ("gemma-4-E2B-it-4bit", "gemma-4-E2B-it-assistant", False),
        ("gemma-4-E2B", "gemma-4-E2B-it-assistant", True),
        ("gemma-4-E2B-it", "gemma-4-E2B-assistant", False),
        ("my-finetune", "gemma-4-E2B-it-assistant", False),
    ],
)
def test_a_base_model_takes_no_drafter_of_a_tuned_one(tmp_path, target, drafter, refused):
    folders(tmp_path, target, drafter)
    if not refused:
        assert hub.find_pair(str(tmp_path / target), str(tmp_path / drafter)).drafter == tmp_path / drafter
        return
    with pytest.raises(UserError) as raised:
        hub.find_pair(str(tmp_path / target), str(tmp_path / drafter))
    message = str(raised.value)
    assert f"{target} is" in message and f"{drafter} is the drafter" in message and "\n" not in message


@pytest.mark.parametrize("file", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
def test_a_template_says_more_than_a_name(tmp_path, file):
    """Conversions often leave out the `-it`: such a target takes the tuned drafter, and finds it."""
    folders(tmp_path, "gemma-4-12b-4bit", "gemma-4-12B-it-assistant")
    (tmp_path / "gemma-4-12b-4bit" / file).write_text('{"chat_template": "x"}')
    for draft_model in ("auto", str(tmp_path / "gemma-4-12B-it-assistant")):
        found = hub.find_pair(str(tmp_path / "gemma-4-12b-4bit"), draft_model)
        assert found.drafter == tmp_path / "gemma-4-12B-it-assistant"


def cached(cache: Path, name: str, lacks: str = "") -> Path:
    """A model as the hub's client keeps it, in two weight files, all empty; `lacks`: a file that is not there."""
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = {"weight_map": dict(zip("ab", shards, strict=True))}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    for file in ("config.json", *shards):
        if file != lacks:
            (snapshot / file).write_text("{}")
    return snapshot


FIND = """
import sys
from mlx_gemma_mtp.files import hub
for model in sys.argv[1:]:
    try:
        print(hub.find_pair(model, "auto"))
    except hub.UserError as error:
        print(error)
"""


def test_offline_the_cache_is_enough_and_what_it_lacks_is_named(tmp_path):
    cache, local = tmp_path / "cache", folders(tmp_path, "gemma-4-E2B-it-4bit")
    target = cached(cache, "org/gemma-4-E2B-it")
    drafter = cached(cache, "google/gemma-4-E2B-it-assistant")
    cached(cache, "org/part", lacks="model-00002-of-00002.safetensors")
    models = ("org/gemma-4-E2B-it", str(target), str(local), "org/part", "org/none")
    environment = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.getcwd()}
    found = subprocess.run([sys.executable, "-c", FIND, *models], env=environment, capture_output=True, text=True)
    lines = found.stdout.splitlines()
    assert lines[:3] == [str(hub.Pair(folder, drafter, None)) for folder in (target, target, local)], found
    assert lines[3] == (
        "'org/part' is in the hub's cache without model-00002-of-00002.safetensors, and HF_HUB_OFFLINE is set; "
        "check the name, or connect and run: hf download org/part"
    )
    assert lines[4].startswith("'org/none' is no folder, nor in the hub's cache, and HF_HUB_OFFLINE is set;")


class Dropped(Exception):
    """As httpx's errors: of no base that others share."""

    __module__ = "httpx"


ANSWERS = {
    "gated": (answer(GatedRepoError, 403), ["org/name and run: hf auth login", "accept its licence at"]),
    "401": (answer(RepositoryNotFoundError, 401), ["there is no model 'org/name'", "hf auth login"]),
    "403": (answer(HfHubHTTPError, 403), ["does not give 'org/name' to this login", "hf auth login"]),
    "revision": (answer(RevisionNotFoundError, 404), ["has no revision 'v9'", "name a branch, a tag or a commit"]),
    "429": (answer(HfHubHTTPError, 429), ["hf download org/name --revision v9", "the hub asks to wait (429"]),
    "503": (answer(HfHubHTTPError, 503), ["the hub answered 503 (503 for url)", "hf download"]),
    "no JSON": (json.JSONDecodeError("Expecting value", "<html>", 0), ["not from a hub", "hf download"]),
    "an id that is none": (HFValidationError("bad id"), ["there is no model 'org/name'"]),
    "dropped": (Dropped("peer closed connection"), ["cannot be reached (peer closed connection)", "hf download"]),
    "without a word": (Dropped(""), ["cannot be reached (Dropped)"]),
    "time": (TimeoutError("timed out"), ["cannot be reached (timed out)"]),
    "nothing cached": (LocalEntryNotFoundError("no\nway"), ["cannot be reached (no)"]),
    "disk": (OSError(28, "No space left on device"), ["disk of the hub's cache", "is full", "HF_HUB_CACHE"]),
    "rights": (PermissionError(13, "Permission denied"), ["cannot be written", "HF_HUB_CACHE"]),
    "a strange answer": (KeyError("sha"), ["the hub's client failed ('sha')"]),
}


def refuse(monkeypatch, error: Exception, what: str = "", other: Path | None = None) -> None:
    """The hub gives no model whose name has `what` in it, and the folder `other` for others."""

    def download(name, **options):
        if what in name:
            raise error
        return str(other)

    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *args, **kwargs: None)


@pytest.mark.parametrize("case", ANSWERS)
def test_what_the_hub_answers_is_one_line_with_a_fix(monkeypatch, case):
    error, parts = ANSWERS[case]
    refuse(monkeypatch, error)
    with pytest.raises(UserError) as raised:
        hub.find("org/name", "v9")
    assert "\n" not in str(raised.value) and all(part in str(raised.value) for part in parts), raised.value


@pytest.mark.parametrize("case", ANSWERS)
def test_a_drafter_that_the_hub_does_not_give_is_done_without(tmp_path, monkeypatch, case):
    """The reason, which `load` tells as a notice, says why; a drafter that was named is an error."""
    refuse(monkeypatch, ANSWERS[case][0], "assistant", folders(tmp_path, "target"))
    pair = hub.find_pair("org/gemma-4-E2B-it", "auto")
    assert pair.drafter is None and pair.reason.startswith("no drafter was found (looked for")
    assert "\n" not in pair.reason
    if case not in ("401", "revision", "an id that is none"):  # then the next spelling is tried, and all are listed
        assert ANSWERS[case][1][-1] in pair.reason
    with pytest.raises(UserError):
        hub.find_pair("org/gemma-4-E2B-it", "org/gemma-4-E2B-it-assistant")


def test_a_web_page_instead_of_the_hub_leaves_what_is_cached(tmp_path, monkeypatch):
    refuse(monkeypatch, ANSWERS["no JSON"][0])
    snapshot = cached(tmp_path, "org/name")
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda name, file, revision: str(snapshot / file))
    assert hub.find("org/name") == snapshot


class Portal(BaseHTTPRequestHandler):
    """A hotel's page for everything."""

    def do_GET(self):
        page = b"<!DOCTYPE html><html>Sign in</html>"
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, *args):
        pass


class Drop(Portal):
    """No answer at all."""

    def do_GET(self):
        self.connection.close()


@pytest.mark.parametrize("handler, part", [(Portal, "is not from a hub"), (Drop, "the hub cannot be reached")])
def test_a_server_that_is_no_hub(tmp_path, handler, part):
    """The client itself, as it is installed."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    settings = {"HF_ENDPOINT": url, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
    argv = [sys.executable, "-c", FIND, "org/gemma-4-E2B-it"]
    found = subprocess.run(argv, env=os.environ | settings, capture_output=True, text=True, timeout=60)
    server.shutdown()
    assert part in found.stdout and found.stdout.count("\n") == 1 and found.returncode == 0, found


def linked(link: Path, folder: Path) -> Path:
    link.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    link.symlink_to(folder)
    return link


def test_a_drafter_beside_the_name_as_it_is_given(tmp_path):
    """Each model lies on another disk under a name of its own; names are those of the links."""
    target = linked(tmp_path / "models" / "gemma-4-toy-it", tmp_path / "disk" / "x")
    drafter = linked(tmp_path / "models" / "gemma-4-toy-it-assistant", tmp_path / "disk" / "y")
    assert hub.find_pair(str(target), "auto").drafter == drafter
    assert hub.find_pair(f"{target}/", "auto").drafter == drafter
    again = tmp_path / "shelf" / "favourite"
    again.parent.mkdir()
    again.symlink_to("../models/gemma-4-toy-it")  # a link to a link
    assert hub.find_pair(str(again), "auto").drafter == drafter
    assert hub.assistant(str(target)) == f"{target}-assistant" and hub.assistant(str(again)) == f"{drafter}"


def test_a_drafter_beside_what_a_link_leads_to(tmp_path, monkeypatch):
    target = linked(tmp_path / "m", tmp_path / "disk" / "gemma-4-toy-it")
    (tmp_path / "disk" / "gemma-4-toy-it-assistant").mkdir()
    (tmp_path / "disk" / "gemma-4-toy-it-assistant" / "config.json").write_text("{}")
    assert hub.find_pair(str(target), "auto").drafter == tmp_path / "disk" / "gemma-4-toy-it-assistant"
    monkeypatch.chdir(target)
    assert hub.find_pair(".", "auto").drafter == tmp_path / "disk" / "gemma-4-toy-it-assistant"


def test_links_that_lead_nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "gone").symlink_to("nowhere")
    (tmp_path / "models" / "round").symlink_to("round")
    refuse(monkeypatch, AssertionError("the hub is asked"))
    for name in ("models/gone", "models/round"):
        with pytest.raises(UserError, match="is a link to"):
            hub.find(name)


def test_names_of_links_tell_a_base_model(tmp_path):
    target = linked(tmp_path / "gemma-4-E2B", tmp_path / "disk" / "x")
    drafter = linked(tmp_path / "gemma-4-E2B-it-assistant", tmp_path / "disk" / "y")
    with pytest.raises(UserError, match="is a base model"):
        hub.find_pair(str(target), str(drafter))


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b", "~nobody-here/x/y"])
def test_names_that_are_no_paths(name):
    with pytest.raises(UserError, match="there is no model"):
        hub.find(name)


NO_IDS = [
    "models/my gemma", "a/b c", "google/gemma-4@main", "a/b:c", "org/name.git", "org/-x", "org/..", "é/b", "a/b#c",
    f"a/{'b' * 300}", "a--b/c", "a/b..c", "-a/b", "a/b-", "a/b\nc", "a/b?c=d",
]  # fmt: skip


@pytest.mark.parametrize("name", NO_IDS)
@pytest.mark.parametrize("flag", ["--model", "--draft-model"])
def test_names_that_are_no_hub_ids_are_one_line(capsys, monkeypatch, name, flag):
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **options: pytest.fail("it is not asked for"))
    assert generate.main(["--prompt", "x", f"{flag}={name}"]) == 2
    (line,) = [each for each in capsys.readouterr().err.splitlines() if "error" in each]
    assert line.startswith("error: there is no model ") and len(line) < 400  # a long path stays readable


@pytest.mark.parametrize("name", NO_IDS)
def test_converting_what_is_no_hub_id_is_one_line(capsys, tmp_path, monkeypatch, name):
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **options: pytest.fail("it is not asked for"))
    for argv in ([f"--hf-path={name}", "--mlx-path", str(tmp_path / "out")], ["inspect", "--", name]):
        assert convert(argv) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: there is no model ")


def test_a_long_id_whose_drafter_s_name_would_be_too_long():
    assert hub._drafter_ids(f"org/{'b' * 92}", tuned=False) == []


@pytest.mark.parametrize("revision", ["", "a b", "../../x", "a\0b", "r" * 300])
def test_revisions_that_are_no_names(monkeypatch, revision):
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **options: pytest.fail("it is not asked for"))
    with pytest.raises(UserError, match=r"^the revision .* expected a branch"):
        hub.find("org/name", revision)


def test_an_empty_name_is_not_the_current_folder(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(folders(tmp_path, "m"))
    for argv in (["--model", ""], ["--draft-model", ""]):
        assert generate.main(["--prompt", "x", *argv]) == 2
        assert "is empty, expected" in capsys.readouterr().err
    for options in ({"model": ""}, {"draft_model": ""}):
        with pytest.raises(UserError, match="is empty"):
            load(**options)
    for argv in (["--hf-path", "", "--mlx-path", "x"], ["inspect", ""], ["--hf-path", "m", "--mlx-path", ""]):
        assert convert(argv) == 2
        assert "error: " in capsys.readouterr().err
    assert convert(["--hf-path", "m", "--mlx-path", "a\0b"]) == 2 and os.listdir() == os.listdir(tmp_path / "m")


def test_a_drafter_beside_the_link_that_is_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    link = linked(tmp_path / "models" / "m", tmp_path / "stored")
    folders(tmp_path / "models", "m-assistant")
    monkeypatch.chdir(link)
    monkeypatch.setenv("PWD", str(link))  # as a shell leaves it
    assert hub.find_pair(".", "auto").drafter == tmp_path / "models" / "m-assistant"
    monkeypatch.setenv("PWD", str(tmp_path))  # left over from elsewhere: not believed
    assert hub.find_pair(".", "auto").drafter is None

"""--upload-repo: asked before the conversion, done after it, and never a reason to convert again."""

import json
import shlex

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError
from test_convert import make_drafter, make_moe, run
from test_convert_pair import sources  # noqa: F401

from convert import source, upload
from convert.cli import main
from mlx_gemma_mtp.files import hub

ME = {"name": "me", "orgs": [{"name": "Team"}], "auth": {"accessToken": {"role": "write"}}}
CARD = "---\nlicense: apache-2.0\nlicense_link: https://example.org/licence\ntags: [x]\n---\n# Theirs\n"


class Hub:
    """What HfApi does with a hub that remembers."""

    def __init__(self):
        self.me, self.failure, self.calls, self.files = ME, {}, [], {}

    def whoami(self):
        self.calls.append("whoami")
        if isinstance(self.me, BaseException):
            raise self.me
        return self.me

    def create_repo(self, repo_id, *, exist_ok):
        assert exist_ok
        self.calls.append(f"create {repo_id}")

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self.calls.append(f"upload {repo_id}")
        if repo_id in self.failure:
            raise self.failure[repo_id]
        self.files[repo_id] = {path.name: path.read_bytes() for path in hub.Path(folder_path).iterdir()}

    def card(self, repo) -> ModelCard:
        return ModelCard(self.files[repo]["README.md"].decode())


@pytest.fixture
def online(monkeypatch) -> Hub:
    hub_ = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub_)
    monkeypatch.setattr("huggingface_hub.ModelCard.load", lambda repo: ModelCard(CARD))
    return hub_


@pytest.fixture
def published(sources, monkeypatch):  # noqa: F811
    """The pair as google/gemma-it and google/gemma-it-assistant."""
    folders = {"google/gemma-it": sources[0].folder, "google/gemma-it-assistant": sources[1].folder}
    monkeypatch.setattr(source, "find", lambda path, revision=None: folders[path])


def converted(out, *flags: str) -> int:
    return main(["--hf-path", "google/gemma-it", "--mlx-path", str(out), "--upload-repo", "me/x-4bit", *flags])


def test_a_pair_is_uploaded_with_its_cards(published, online, tmp_path, capsys):
    assert converted(tmp_path / "out", "--pair", "-q") == 0
    repos = ["me/x-4bit", "me/x-4bit-assistant"]
    assert online.calls == ["whoami"] + [f"{verb} {repo}" for repo in repos for verb in ("create", "upload")]
    assert capsys.readouterr().out.endswith(
        f"{tmp_path / 'out'}-assistant: uploaded to https://huggingface.co/{repos[1]}\n"
    )
    for repo, end in zip(repos, ("", "-assistant"), strict=True):
        folder = tmp_path / f"out{end}"
        assert online.files[repo] == {path.name: path.read_bytes() for path in folder.iterdir()}
        assert {"config.json", "model.safetensors", "checksums.json"} <= online.files[repo].keys()
        data = online.card(repo).data
        assert (data.library_name, data.license, data.pipeline_tag) == ("mlx", "apache-2.0", "text-generation")
        assert data.base_model == f"google/gemma-it{end}" and data.base_model_relation == "quantized"
        assert data.license_link == "https://example.org/licence" and "mlx" in data.tags
        assert "python -m mlx_gemma_mtp.generate --model me/x-4bit --prompt" in online.card(repo).text
    text = online.card(repos[0]).text
    assert "| embed_tokens, experts, self_attn | 4-bit affine, groups of 64 |" in text
    assert "| mlp, router | 8-bit affine, groups of 64 |" in text and "| norms and scalars | BF16 |" in text
    assert main(["check", str(tmp_path / "out")]) == 0  # a card is no damage


def test_the_card_of_a_local_source_names_no_path(online, tmp_path):
    checkpoint = make_moe(tmp_path / "hf")
    checkpoint.save()
    assert run(checkpoint, tmp_path / "out", "--upload-repo", "team/x") == 0
    card = online.card("team/x")
    assert card.data.base_model is None and card.data.license is None and str(tmp_path) not in str(card)
    assert "| embed_tokens, experts, mlp, norms and scalars, router, self_attn | BF16 |" in card.text


def test_a_drafter_alone_says_how_it_is_given(online, tmp_path):
    checkpoint = make_drafter(tmp_path / "hf")
    checkpoint.save()
    assert run(checkpoint, tmp_path / "out", "--upload-repo", "me/d") == 0
    assert "--model TARGET --draft-model me/d --prompt" in online.card("me/d").text


def test_a_source_without_a_card_has_no_licence(published, online, tmp_path, monkeypatch):
    def absent(repo):
        raise OSError("404")

    monkeypatch.setattr("huggingface_hub.ModelCard.load", absent)
    assert converted(tmp_path / "out") == 0
    assert online.card("me/x-4bit").data.license is None


def test_without_the_flag_nobody_is_asked_and_no_card_is_written(published, online, tmp_path):
    assert main(["--hf-path", "google/gemma-it", "--mlx-path", str(tmp_path / "out")]) == 0
    assert online.calls == [] and not (tmp_path / "out" / "README.md").exists()


REFUSED = {
    "no login": (
        "me/x",
        LocalTokenNotFoundError("Token is required,\nbut no token"),
        "Token is required, but no token",
    ),
    "no network": ("me/x", OSError("no route"), "the hub knows no login (no route); run: hf auth login"),
    "a token that reads": ("me/x", ME | {"auth": {"accessToken": {"role": "read"}}}, "the token can only read"),
    "somebody else's": ("google/x", ME, "'google' is not yours; expected one of me, Team"),
    "no owner": ("x", ME, "--upload-repo 'x'; expected org/name"),
    "no id": ("me/x y", ME, "--upload-repo 'me/x y'; expected org/name"),
    "a path": ("me/x/y", ME, "expected org/name"),
    "nothing": ("", ME, "--upload-repo ''"),
    "too long for the drafter": ("me/" + "x" * 90, ME, "expected org/name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_uploaded_is_not_converted(online, tmp_path, capsys, monkeypatch, case):
    repo, online.me, says = REFUSED[case]
    monkeypatch.setattr(source, "find", lambda name: pytest.fail("it was downloaded"))
    out = tmp_path / "new" / "out"
    assert main(["--hf-path", "org/n", "--mlx-path", str(out), "--pair", "--upload-repo", repo]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1, error
    assert not any("create" in call for call in online.calls) and not out.parent.exists()


@pytest.mark.parametrize("failed", ["me/x-4bit", "me/x-4bit-assistant"])
@pytest.mark.parametrize(
    ("failure", "code", "says"),
    [
        (
            OSError("503\nlater"),
            2,
            "error: the conversion is complete, but not its upload (503 later); upload it with: ",
        ),
        (KeyboardInterrupt(), 130, "error: interrupted; the conversion is complete; upload it with: "),
    ],
)
def test_failed_uploads_keep_the_folders(published, online, tmp_path, capsys, failed, failure, code, says):
    out = tmp_path / "an out"
    online.failure[failed] = failure
    assert converted(out, "--pair") == code
    error = capsys.readouterr().err
    commands = [shlex.split(part) for part in error.removeprefix(says).split(" && ")]
    assert error.startswith(says) and error.count("\n") == 1
    ends = ["", "-assistant"] if failed == "me/x-4bit" else ["-assistant"]
    assert commands == [["hf", "upload", f"me/x-4bit{end}", f"{out}{end}"] for end in ends]
    for end in ("", "-assistant"):
        assert main(["check", f"{out}{end}"]) == 0


def test_a_failed_conversion_is_not_uploaded(published, online, tmp_path):
    (source.find("google/gemma-it") / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert converted(tmp_path / "out") == 2 and online.calls == ["whoami"]


def test_the_client_has_what_is_called():
    """The fake above has the signatures of the real thing."""
    from inspect import signature

    from huggingface_hub import HfApi

    signature(HfApi.create_repo).bind(None, "me/x", exist_ok=True)
    signature(HfApi.upload_folder).bind(None, repo_id="me/x", folder_path=".", commit_message="x")
    signature(HfApi.whoami).bind(None)
    signature(ModelCard.load).bind("me/x")
    assert upload.LICENSE[0] in ModelCard(CARD).data.to_dict()

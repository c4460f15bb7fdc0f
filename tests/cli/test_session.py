"""The commands of a chat, and chats in files."""

import json
import os
import threading

import pytest

from mlx_gemma_mtp import SamplingParams, UserError, load
from mlx_gemma_mtp.cli import slash, transcripts
from mlx_gemma_mtp.cli.session import Session, Settings
from mlx_gemma_mtp.cli.transcripts import Transcript

PARAMS = SamplingParams(max_tokens=8, temperature=0)
MESSAGES = [{"role": "user", "content": "héllo\x1b"}, {"role": "assistant", "content": "a", "status": "incomplete"}]


@pytest.fixture(scope="module")
def engine():
    with load() as engine:
        yield engine


@pytest.fixture
def session(engine) -> Session:
    return Session(engine, Settings(PARAMS, "auto"), "a model", "be brief")


def say(session: Session, text: str, **options) -> str:
    return "".join(chunk.text for chunk in session.reply(text, **options))


def test_turns_are_those_of_a_conversation(session, engine):
    first = say(session, "def f(x):")
    second = say(session, "def g(x):")
    expected = engine.conversation("be brief", params=PARAMS)
    assert [expected.say("def f(x):").text, expected.say("def g(x):").text] == [first, second]
    assert session.turns == 2 and session.last.stats.prompt_tokens == expected.tokens
    slash.obey(session, "/undo")
    assert session.turns == 1
    assert say(session, "def g(x):") == second
    slash.obey(session, "/reset")
    assert session.turns == 0 and session.system_prompt == "be brief" and session.last is None
    assert say(session, "def f(x):") == first


def test_the_system_prompt_changes_amid_a_chat(session, engine):
    say(session, "def f(x):")
    assert slash.obey(session, "/system be\nlong") == "system prompt: be\nlong" and session.turns == 1
    messages = [*session.conversation.messages, {"role": "user", "content": "x"}]
    assert say(session, "x") == engine.generate(messages, PARAMS, system_prompt="be\nlong").text
    assert slash.obey(session, "/system off") == "there is no system prompt" and session.system_prompt is None
    slash.obey(session, "/system a\x1b[2J")
    assert slash.obey(session, "/system") == "system prompt: a\\x1b[2J"


def test_a_reply_that_is_cut_off_is_marked(session):
    """By an event, by closing, by max_tokens; one that said nothing leaves the chat as before."""
    cancel = threading.Event()
    for chunk in session.reply("def f(x):", cancel=cancel):
        if chunk.text:
            cancel.set()
    assert session.last.finish_reason == "cancelled" and session.turns == 1
    assert session.conversation.messages[-1]["status"] == "incomplete"
    chunks = session.reply("def g(x):")
    while not next(chunks).text:
        pass
    chunks.close()
    assert session.turns == 2 and session.conversation.messages[-1]["status"] == "incomplete"
    say(session, "def h(x):", cancel=cancel)  # before anything came
    assert session.turns == 2
    say(session, "def h(x):")
    assert session.last.finish_reason == "length" and session.conversation.messages[-1]["status"] == "incomplete"


def test_settings_of_the_next_replies(session):
    assert slash.obey(session, "/draft 0") == "plain decoding"
    say(session, "def f(x):")
    assert session.last.stats.drafted == 0
    assert slash.obey(session, "/draft 3") == "drafts a round: 3" == slash.obey(session, "/draft")
    say(session, "def f(x):")
    assert session.last.stats.drafted > 0
    assert slash.obey(session, "/think on") == "thoughts are on" and session.settings.params.thinking
    assert slash.obey(session, "/think off") == "thoughts are off" and not session.settings.params.thinking
    assert "of a context of 8,192" in slash.obey(session, "/tokens")
    assert slash.obey(session, "/stats").startswith("prompt: ")


def test_a_budget_of_thoughts_holds_while_they_are_on(engine):
    params = SamplingParams(thinking=True, thinking_budget=5)
    session = Session(engine, Settings(params), "a model")
    session.think(False)
    assert session.settings.params.thinking_budget is None
    session.think(True)
    assert session.settings.params == params


@pytest.mark.parametrize(
    "text, message",
    [
        ("/nonsense", "there is no command '/nonsense'"),
        ("/", "there is no command '/'"),
        ("/reset now", "takes no argument"),
        ("/draft -1", "expected auto, 0"),
        ("/draft 1.5", "expected auto, 0"),
        ("/think maybe", "neither on nor off"),
        ("/save", "expected its name"),
        ("/load", "expected its name"),
        ("/load /nowhere/x", "there is no such file"),
        ("/save /nowhere/x", "cannot be written"),
        ("/save a\0b", "is no name of a file"),
        ("/stats", "no figures yet"),
        ("/tokens", "nothing is counted yet"),
        ("/undo", "no turn to take back"),
    ],
)
def test_what_a_command_cannot_do_is_one_line(session, text, message):
    with pytest.raises(UserError) as found:
        slash.obey(session, text)
    assert message in str(found.value) and "\n" not in str(found.value)


def test_drafts_without_a_drafter():
    with load(draft_model="none") as plain:
        session = Session(plain, Settings(PARAMS), "a model")
        with pytest.raises(UserError, match="there is no drafter"):
            slash.obey(session, "/draft 2")
        assert slash.obey(session, "/draft 0") == "plain decoding" == slash.obey(session, "/draft")


def test_the_help_names_every_command(session):
    lines = slash.obey(session, "/help").splitlines()
    assert [line.split()[0] for line in lines] == list(slash.COMMANDS) and max(map(len, lines)) < 80
    for name in ("/exit", "/quit"):
        with pytest.raises(slash.Leave):
            slash.obey(session, name)


def test_a_message_may_begin_with_a_slash():
    assert slash.is_command("/x") and not slash.is_command("//x") and not slash.is_command(" /x")
    assert slash.message("//x") == "/x" and slash.message(" /x") == " /x"


def test_a_file_gives_back_what_it_took(tmp_path):
    path, transcript = tmp_path / "chat.json", Transcript(MESSAGES, "be\nbrief", "a model")
    for _ in range(2):  # a chat may be replaced
        transcripts.save(path, transcript)
        assert transcripts.load(path) == transcript
    assert os.listdir(tmp_path) == ["chat.json"]


def test_load_goes_on(session, engine, tmp_path):
    say(session, "def f(x):")
    slash.obey(session, f"/save {tmp_path / 'a.json'}")
    other = Session(engine, Settings(PARAMS), "a model")
    slash.obey(other, f"/load {tmp_path / 'a.json'}")
    assert other.system_prompt == "be brief" and other.turns == 1
    assert say(other, "def g(x):") == say(session, "def g(x):")


def record(**changes) -> str:
    whole = {"format": transcripts.FORMAT, "version": 1, "model": None, "system_prompt": None, "messages": MESSAGES}
    return json.dumps(whole | changes)


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "is no chat"),
        ("{", "is no chat"),
        ("[" * 100_000, "is no chat"),
        ("[]", "is no chat"),
        ('{"a": 1}', "is no chat"),
        (b"\xff\xfe", "is no chat"),
        (record(version=2), "has version 2"),
        (record(messages={}), "is damaged: messages is {}"),
        (record(messages=[1]), "is damaged: messages is"),
        (record(messages=[{"role": "user"}]), "is damaged: "),
        (record(messages=[{"role": "nobody", "content": "x"}]), "is damaged: "),
        (record(messages=MESSAGES[1:]), "its first message is the assistant's"),
        (record(system_prompt=1), "is damaged: system_prompt is 1"),
        (record(system_prompt="\ud800"), "is damaged: system_prompt"),
    ],
)
def test_a_file_that_is_no_chat_is_refused_and_never_replaced(tmp_path, content, message):
    path = tmp_path / "file"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = path.read_bytes()
    with pytest.raises(UserError) as found:
        transcripts.load(path)
    assert message in str(found.value) and "\n" not in str(found.value)
    with pytest.raises(UserError, match="it stays as it is"):
        transcripts.save(path, Transcript(MESSAGES))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("nothing", path)])
def test_what_is_no_file_is_refused(tmp_path, make):
    make(tmp_path / "it")
    for call in (transcripts.load, lambda path: transcripts.save(path, Transcript(MESSAGES))):
        with pytest.raises(UserError):
            call(tmp_path / "it")


def test_a_full_disk_leaves_the_chat_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "chat.json"
    transcripts.save(path, Transcript(MESSAGES))

    def full(self, text, **options):
        open(self, "w").close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(UserError, match="No space left on device"):
        transcripts.save(path, Transcript([]))
    assert transcripts.load(path) == Transcript(MESSAGES) and os.listdir(tmp_path) == ["chat.json"]

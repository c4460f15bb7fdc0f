"""The page in a real browser: what is seen, what keys do, and that nothing goes wrong on the console."""

from __future__ import annotations

import asyncio
import json
import queue
from collections.abc import Awaitable
from contextlib import suppress
from types import SimpleNamespace

import browser
import pytest
from serving import Scripted, ids_of, serving

from mlx_gemma_mtp.server.service import Served

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser.found() is None, reason=f"needs a browser: one of {', '.join(browser.NAMES)}"),
]
END = "<turn|>"
IDLE = "!running && !document.querySelector('.busy') && "
SAID = "document.querySelector('.assistant:last-child .text').textContent"


@pytest.fixture(scope="module")
def chromium():
    with browser.started() as chromium:
        yield chromium


@pytest.fixture(scope="module")
def script(engine):
    """A server whose replies are `script.text`, three tokens a round, `script.pause` seconds each; or one for
    each thing that is put into `script.gate`.
    """
    script = SimpleNamespace(text="", pause=0.0, gate=None)

    def rounds(number: int) -> list[list[int]]:
        ids = ids_of(engine, script.text + END)
        return [ids[:1], *(ids[at : at + 3] for at in range(1, len(ids), 3))]

    def wait() -> Awaitable[object]:
        return asyncio.sleep(script.pause) if script.gate is None else asyncio.to_thread(script.gate.get, timeout=300)

    with serving(Scripted(engine, rounds, wait)) as script.url:
        yield script


@pytest.fixture
def tab(chromium):
    with chromium.tab() as tab:
        yield tab
        assert tab.faults() == []


def ask(tab: browser.Tab, text: str) -> None:
    """Opens no page: types into the one that is there."""
    tab.run("document.getElementById('prompt').focus()")
    tab.type(text)
    tab.press("Enter")


def ready(tab: browser.Tab, url: str) -> None:
    tab.open(url)
    tab.wait("document.getElementById('state').textContent === 'ready'")


def drafts(tab: browser.Tab, count: str) -> None:
    tab.run(f"document.getElementById('drafts').value = {json.dumps(count)}")


def test_a_stream_is_seen_while_it_runs(tab, script, monkeypatch):
    """However slow the machine is: a round comes after each look."""
    script.text = "one two three four five six seven eight nine ten " * 4
    monkeypatch.setattr(script, "gate", queue.Queue(1))
    ready(tab, script.url)
    ask(tab, "Count.")
    seen, live = [0], set()
    while tab.run("messages.length < 2"):
        with suppress(queue.Full):
            script.gate.put_nowait(None)
        if (length := tab.run(f"document.querySelector('.assistant') ? {SAID}.length : 0")) > seen[-1]:
            seen.append(length)
            live.add(tab.text("#speed"))
    assert len(seen) > 5 and len(live) > 2  # grew between looks, and the speed was told meanwhile
    assert tab.run(SAID) == script.text
    assert tab.text("#plot-note").startswith(
        tab.text(".assistant .foot").split(" drafts kept")[0].rpartition("  ·  ")[2]
    )
    marked = tab.run("[...document.querySelectorAll('.assistant .d1')].map((each) => each.textContent).join('')")
    assert marked and tab.run("document.querySelectorAll('.assistant .d3').length") == 0


def test_escape_stops_and_the_next_message_goes_on(tab, script, engine):
    script.text, script.pause = "word " * 200, 0.05
    ready(tab, script.url)
    ask(tab, "Go on.")
    tab.wait("document.querySelector('.assistant .d')")
    assert tab.text("#go") == "Stop"
    tab.press("Escape")
    tab.wait(IDLE + "messages.length === 2")
    assert tab.text(".assistant .foot") == "stopped" and tab.text("#go") == "Send"
    script.text, script.pause = "Yes.", 0.0
    tab.type("line one")
    tab.press("Enter", shift=True)
    tab.type("line two")
    assert tab.run("document.getElementById('prompt').value") == "line one\nline two"
    tab.press("Enter")
    tab.wait(IDLE + "messages.length === 4")
    assert tab.run("messages[1].content.length") > 0 and tab.run(SAID) == "Yes."
    tab.click("#fresh")
    assert tab.run("messages.length") == 0 and tab.run("document.querySelectorAll('.turn').length") == 0


def test_what_a_model_says_is_text(tab, script):
    script.text, script.pause = (
        "<img src=x onerror=alert(1)> <b>no</b>\n```html\n<script>1</script>\n```\nafter `it`",
        0.0,
    )
    ready(tab, script.url)
    ask(tab, "<i>Show</i> </div>")
    tab.wait(IDLE + "messages.length === 2")
    assert tab.run("document.querySelectorAll('img, .log b, .log i, .log script').length") == 0
    assert tab.text(".assistant pre") == "<script>1</script>\n" and tab.run(SAID).endswith("after `it`")
    assert tab.run("messages[1].content") == script.text and tab.text(".user .text") == "<i>Show</i> </div>"


def test_the_policy_lets_nobody_write_html(chromium, script):
    with chromium.tab() as tab:
        ready(tab, script.url)
        with pytest.raises(AssertionError, match="TrustedHTML"):
            tab.run("document.body.insertAdjacentHTML('beforeend', '<p>x</p>')")
        added = (
            "document.body.append(Object.assign(document.createElement('style'), {textContent: 'body {color: red}'}))"
        )
        tab.run(added)
        assert tab.run("getComputedStyle(document.body).color") != "rgb(255, 0, 0)" and len(tab.faults()) == 2


def test_thoughts_are_folded_away(tab, script):
    script.text, script.pause = "<|channel>thought\nHm, so.\n<channel|>The answer.", 0.0
    ready(tab, script.url)
    ask(tab, "Think.")
    tab.wait(IDLE + "messages.length === 2")
    assert tab.run(SAID) == "The answer." and "Hm, so." in tab.text(".thought div")
    assert tab.run("document.querySelector('.thought').open") is False


def test_side_by_side(chromium, engine):
    with serving(engine) as url, chromium.tab(dark=True) as tab:
        ready(tab, url)
        drafts(tab, "3")
        tab.click("#tab-compare")
        tab.type("def add(a, b):")
        tab.press("Enter")
        verdict = tab.wait(IDLE + "document.querySelector('#verdict b')?.textContent")
        assert verdict.startswith("The same text")
        off, on = (f".pane:nth-child({place}) .text" for place in (1, 2))
        assert tab.text(off) == tab.text(on) and len(tab.text(on)) > 40
        marked = [tab.run(f"document.querySelectorAll('{each} .d').length") for each in (off, on)]
        assert marked[0] == 0 < marked[1]
        assert tab.run("document.querySelectorAll('#plot rect').length") == 3
        assert tab.run("getComputedStyle(document.body).backgroundColor") == "rgb(23, 23, 22)"
        assert tab.faults() == []


def test_a_key_is_asked_for_and_kept_in_the_tab_alone(chromium, engine):
    rounds = [[each] for each in ids_of(engine, "Hello." + END)]
    with serving(Scripted(engine, lambda number: rounds), keys=("right",)) as url, chromium.tab() as tab:
        tab.open(url)
        tab.wait("document.getElementById('key').open")
        for key, kept in (("wrong", False), ("right", True)):
            tab.wait("document.activeElement.id === 'key-input'")
            tab.type(key)
            tab.press("Enter")
            if not kept:
                tab.wait("document.querySelector('#key-note.wrong') && document.getElementById('key').open")
        tab.wait("document.getElementById('model').textContent === 'demo'")
        ask(tab, "Hi.")
        tab.wait(IDLE + "messages.length === 2")
        assert tab.run("sessionStorage.getItem('key')") == "right" and "right" not in tab.run(
            "JSON.stringify(localStorage)"
        )
        assert "right" not in tab.run("location.href + document.cookie") and tab.faults() == []


def test_a_server_that_stops_says_so_and_one_can_try_again(tab, engine, monkeypatch):
    rounds = [[each] for each in ids_of(engine, "Hello." + END)]
    made: list[Served] = []
    monkeypatch.setattr("serving.Served", lambda *args, **more: made.append(Served(*args, **more)) or made[0])
    with serving(Scripted(engine, lambda number: rounds)) as url:
        ready(tab, url)
        made[0].draining = True
        ask(tab, "Hi.")
        assert "stopping" in tab.wait("document.querySelector('[role=alert] span')?.textContent")
        tab.wait("look() && document.getElementById('state').textContent === 'stopping'")
        made[0].draining = False
        tab.click("[role=alert] button")
        tab.wait(IDLE + "messages.length === 2")
        assert tab.run(SAID) == "Hello." and tab.run("document.querySelectorAll('[role=alert]').length") == 0
    ask(tab, "Still there?")
    assert "does not answer" in tab.wait("document.querySelector('[role=alert] span')?.textContent")


def test_narrow_windows_and_keys(chromium, script):
    script.text, script.pause = "a" * 400 + " " + "word " * 100, 0.0
    with chromium.tab(360, 640) as tab:
        ready(tab, script.url)
        ask(tab, "Long.")
        tab.wait(IDLE + "messages.length === 2")
        assert tab.run("document.documentElement.scrollWidth") <= 360
        assert tab.run("getComputedStyle(document.getElementById('aside')).display") == "none"
        tab.click("#more")
        assert tab.run("getComputedStyle(document.getElementById('aside')).display") == "block"
        tab.press("Escape")
        assert tab.run("document.activeElement.id") == "more"
        tab.run("document.getElementById('tab-chat').focus()")
        tab.press("ArrowRight")
        assert tab.run("document.activeElement.id") == "tab-compare" and not tab.run(
            "document.getElementById('compare').hidden"
        )
        assert tab.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        named = "[...document.querySelectorAll('input, select, textarea')].every((e) => e.labels.length || e.ariaLabel)"
        assert tab.run(named) and tab.faults() == []


def test_colours_by_hand(tab, script):
    ready(tab, script.url)
    tab.prefer(True)
    seen = []
    for _ in range(3):
        tab.click("#theme")
        seen.append((tab.text("#theme"), tab.run("getComputedStyle(document.body).backgroundColor")))
    assert seen == [("Light", "rgb(250, 249, 246)"), ("Dark", "rgb(23, 23, 22)"), ("Auto", "rgb(23, 23, 22)")]

"""README, CONTRIBUTING and docs/ are true: links lead somewhere, code runs, commands are understood and run."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import re
import shlex
import tomllib
from itertools import pairwise
from pathlib import Path

import checkpoints
import pytest

from convert import cli as convert_cli
from mlx_gemma_mtp import SamplingParams, UserError, calibrate, chat, doctor, generate, load, trace_routing, verify
from mlx_gemma_mtp.files import hub

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MODEL = "gemma-4-26B-A4B-it-4bit"  # what the pages call a converted folder
SECONDS_TO_READ = 300
EXTRAS = {"matplotlib", "rich", "torch", "transformers", "tokenizers"}
MAINS = {"convert": "convert.cli", "training": "training.__main__", "mlx_gemma_mtp": "mlx_gemma_mtp.__main__"}


PROGRAMS = re.compile(r"(\S*/)?(python3?|pip|mlx-gemma-mtp|pytest|bash) ")


def commands(page: Path) -> list[list[str]]:
    """Every command of a page, as words: of indented lines, && taken apart, and of code within a line."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    parts = [part for line in lines for part in line.split(" && ")] + re.findall(r"`([^`\n]+)`", text)
    return [shlex.split(part) for part in parts if PROGRAMS.match(part) and "COMMAND" not in part]


def every_command() -> list[tuple[str, list[str]]]:
    return [(page.name, words) for page in PAGES for words in commands(page)]


def anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, part = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name} links to {target}"
        if part:
            headings = re.findall(r"^#+ (.*)$", there.read_text(), flags=re.M)
            assert part in map(anchor, headings), f"{page.name} links to {target}"


def test_files_that_the_pages_name_exist():
    """`mlx_gemma_mtp/engine/engine.py` and the like; a name with a wildcard or a placeholder is none."""
    for page in PAGES:
        for name in re.findall(
            r"`((?:mlx_gemma_mtp|convert|tests|training|benchmarks|docs)/[\w./]*)`", page.read_text()
        ):
            assert "NAME" in name or (ROOT / name).exists(), f"{page.name} names {name}"


def test_the_architecture_names_every_module():
    """Each file of the package stands in the tree of docs/architecture.md, under its folder or as a command."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    tree = page[page.index("    mlx_gemma_mtp/\n") : page.index("    convert/ ")]
    for path in sorted((ROOT / "mlx_gemma_mtp").rglob("*.py")):
        folder, name = path.parent.name, path.stem
        part = tree if folder == "mlx_gemma_mtp" else re.split(r"\n {6}\w", tree.partition(f"      {folder}/ ")[2])[0]
        if name != "__init__" and folder != "kernels":
            assert re.search(rf"\b{name}\b", part), f"{folder}/{name}.py"


def test_every_page_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text()
    missing = [page.name for page in PAGES[1:] if f"({page.relative_to(ROOT)})" not in readme]
    assert missing == []


def test_the_readme_is_read_in_five_minutes():
    words = len((ROOT / "README.md").read_text().split())
    assert words / 200 * 60 <= SECONDS_TO_READ, f"{words} words"


def test_the_pages_have_commands():
    """Else the tests below would have nothing to look at."""
    assert len(every_command()) > 25 and len(RUN) >= 6


class Parsed(Exception):
    """Raised in the place of running a command whose arguments were understood."""


@pytest.mark.parametrize(
    "where, words", every_command(), ids=lambda each: each if isinstance(each, str) else " ".join(each)[:60]
)
def test_commands_are_understood(where, words, monkeypatch):
    """Every flag that a page writes is a flag of that command."""
    module, arguments = resolved(words)
    if module is None:
        return
    parse = argparse.ArgumentParser.parse_args

    def stop(self, *args, **kwargs):
        raise Parsed(parse(self, *args, **kwargs))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    try:
        main = importlib.import_module(module).main
    except ModuleNotFoundError as error:
        assert error.name.partition(".")[0] in EXTRAS
        pytest.skip(f"{error.name} is not installed")
    if len(words) > 3 or (module == "mlx_gemma_mtp.__main__" and len(words) > 2):  # else the page only names it
        with pytest.raises(Parsed):
            main(arguments)


def resolved(words: list[str]) -> tuple[str | None, list[str]]:
    """The module with a command's `main`, and its arguments; (None, []) for any other, once its words are checked."""
    program, *rest = words
    name = Path(program).name
    if name == "pip":
        return check_install(rest)
    if name in ("python", "python3") and rest[:1] == ["-m"]:
        module, *arguments = rest[1:]
        if module in ("venv", "pytest"):
            return check_pytest(arguments) if module == "pytest" else (None, [])
        return MAINS.get(module, module), arguments
    if name == "mlx-gemma-mtp":
        return "mlx_gemma_mtp.__main__", rest
    if name in ("bash", "python", "python3"):
        assert (ROOT / rest[0]).is_file(), words
        return None, []
    return check_pytest(rest) if name == "pytest" else (None, [])


def check_install(words: list[str]) -> tuple[None, list[str]]:
    """The extras that a page asks for exist."""
    for extra in re.findall(r"\[([\w,]+)\]", " ".join(words)):
        assert set(extra.split(",")) <= set(PROJECT["project"]["optional-dependencies"]), words
    return None, []


def check_pytest(words: list[str]) -> tuple[None, list[str]]:
    """The markers and the files that a page asks for exist."""
    markers = {line.partition(":")[0] for line in PROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    for flag, value in pairwise(words):
        if flag == "-m":
            assert value.removeprefix("not ") in markers, words
    for word in words:
        if word.startswith("tests/"):
            assert (ROOT / word.partition("::")[0]).exists(), words
    return None, []


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> Path:
    """A folder to work in, with a pair under the name that the pages use, a schema, and tools."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / MODEL).symlink_to(hub.DEMO / "target")
    (folder / f"{MODEL}-assistant").symlink_to(hub.DEMO / "drafter")
    (folder / "schema.json").write_text(json.dumps({"type": "object", "properties": {"name": {"type": "boolean"}}}))
    (folder / "tools.json").write_text(json.dumps([{"name": "now", "parameters": {"type": "object"}}]))
    checkpoints.pair(folder / "google", "26B-A4B")
    return folder


@pytest.fixture(scope="module")
def measured() -> None:
    """Costs of the pair are measured, which `calibrate --show` shows."""
    with load() as engine:
        engine.generate("x", SamplingParams(max_tokens=4))


QUICK = {  # what makes a command of the pages short enough for a test
    generate: ["--max-tokens", "8"],
    chat: ["--max-tokens", "8"],
    verify: ["--max-tokens", "4", "--rows", "2", "--num-draft-tokens", "2", "--temps", "0", "--samples", "0"],
    calibrate: ["--show"],
    doctor: ["--no-times"],
    trace_routing: ["--max-tokens", "8", "--batch", "2"],
}
RUN = [
    words
    for _, words in every_command()
    if words[1:2] == ["-m"] and words[2].partition(".")[2] in {module.__name__.partition(".")[2] for module in QUICK}
]


@pytest.mark.parametrize("words", RUN, ids=lambda words: " ".join(words[2:])[:80])
def test_commands_run(words, elsewhere, monkeypatch, capsys, request):
    """The pages' own commands, on the bundled pair, shortened."""
    module = importlib.import_module(words[2])
    if module is calibrate:
        request.getfixturevalue("measured")
    if "--plot" in words:
        pytest.importorskip("matplotlib")
    if "--json-schema" in words or "--tool-choice" in words:
        pytest.importorskip("llguidance")
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"def add(a, b):\n")))  # what a chat hears
    assert module.main([*words[3:], *QUICK[module]]) == 0, capsys.readouterr().err
    for flag in ("--plot", "--json"):
        if flag in words and words[-1] != flag:
            assert (elsewhere / words[words.index(flag) + 1]).stat().st_size > 0


def test_the_conversion_of_the_readme_runs(elsewhere, monkeypatch, capsys):
    """`--pair -q` on a small checkpoint in Google's layout; `inspect` and `check` take what it made."""
    (words,) = (words for words in commands(ROOT / "README.md") if words[1:3] == ["-m", "convert"])
    monkeypatch.chdir(elsewhere)
    out = words[words.index("--mlx-path") + 1] + "-new"
    source = next(
        folder for folder in sorted((elsewhere / "google").iterdir()) if not folder.name.endswith("-assistant")
    )
    swap = {words[words.index("--hf-path") + 1]: str(source), words[words.index("--mlx-path") + 1]: out}
    assert convert_cli.main([swap.get(word, word) for word in words[3:]]) == 0, capsys.readouterr().err
    assert (elsewhere / out).is_dir() and (elsewhere / f"{out}-assistant").is_dir()
    assert convert_cli.main(["check", out, "--against", str(source)]) == 0
    assert convert_cli.main(["inspect", str(source)]) == 0


def test_python_blocks_run():
    """Every ```python block of the pages, as it stands."""
    blocks = [
        code for page in PAGES for code in re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.S | re.M)
    ]
    assert blocks
    for code in blocks:
        exec(compile(code, "a page", "exec"), {})


def test_an_unknown_flag_would_be_noticed(monkeypatch, capsys):
    parser = generate.parser()
    with pytest.raises((UserError, SystemExit)):
        parser.parse_args(["--no-such-flag"])

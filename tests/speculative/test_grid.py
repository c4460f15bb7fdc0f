"""Greedy and sampled text with MTP equals plain decoding, over a grid of batch sizes and draft lengths, in float32.

Two pairs, the bundled one and tests/data/e2b, whose layers borrow keys and whose drafter has a centroid head. 200
prompts, 180 tokens each without a stop, past wrapped windows; 32 cells of 50 prompts (e2b: 25), each prompt in 8 (4) of
them, at every batch size; near-ties are counted as near_ties.py says. All of it takes an hour and more:
`python -m pytest -m slow tests/speculative/test_grid.py`; a few cells of it run always.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from near_ties import NearTies

from mlx_gemma_mtp import SamplingParams, load
from mlx_gemma_mtp.checks.equality import Divergence

HELD_OUT = [p["prompt"] for p in json.loads((Path(__file__).parents[1] / "data" / "prompts.json").read_text())]
NAMES = ("parse", "open", "read_line", "close", "merge", "Cache.get", "sort_keys", "Node.walk", "encode", "retry")
ASKED = (
    "Write a Python function `{}` for the module `shelve`.",
    "What does the Python method `{}` do?",
    "def {}(self, value=None):",
    "Explain `{}` and when it raises an error, with an example that is short.",
    "class Reader:\n    def {}(self):\n        ",
    "{}",
    "import os\n\nresult = {}(os.environ)\n",
    "Fix this: `{}(1, 2, 3) -> TypeError: takes 2 positional arguments but 3 were given`.",
    "How is `{}` tested? " + "Think of edge cases, of empty input and of very long input. " * 4,
    "# {} returns the next item\n",
    "Translate `{}` into a loop.",
    "Compare `{}` with a dictionary lookup and with a binary search in a sorted list.",
    "return {}(x for x in items if x)",
    "Document `{}`.",
    "'''{}'''",
)
PROMPTS = [*HELD_OUT, *(asked.format(name) for name in NAMES for asked in ASKED)]
CELLS = [(rows, drafts) for rows in (1, 2, 4, 8) for drafts in range(8)]
GREEDY = SamplingParams(max_tokens=180, temperature=0.0, ignore_eos=True, seed=0)
SAMPLED = replace(GREEDY, temperature=1.0, top_k=64, top_p=0.95, seed=5)


E2B = Path(__file__).parents[1] / "data" / "e2b"
PAIRS = {"bundled": (None, "auto"), "e2b": (str(E2B / "target"), str(E2B / "drafter"))}
SHARE = {"bundled": 4, "e2b": 8}  # every so manyth prompt is in a cell


@pytest.fixture(scope="module", params=PAIRS)
def pair(request):
    return request.param


@pytest.fixture(scope="module")
def engine(pair):
    return load(*PAIRS[pair], dtype="float32")


@pytest.fixture(scope="module")
def plain(engine):
    """Plain decoding of a prompt, alone; made once, on demand."""
    known: dict[tuple, list[int]] = {}

    def text(index: int, params: SamplingParams) -> list[int]:
        key = (index, params.temperature)
        if key not in known:
            known[key] = engine.generate(PROMPTS[index], params, num_draft_tokens=0).tokens
        return known[key]

    return text


def differences(
    engine, plain, params: SamplingParams, rows: int, drafts: int, some: list[int], ties: NearTies
) -> list[Divergence]:
    """Where the texts of prompts `some`, in batches of `rows` with `drafts`, leave the plain ones."""
    found = []
    for start in range(0, len(some), rows):
        batch = some[start : start + rows]
        results = engine.generate([PROMPTS[i] for i in batch], params, num_draft_tokens=drafts)
        texts = [result.tokens for result in results]
        assert all(len(text) == 180 for text in texts)
        found += ties.found(engine, [PROMPTS[i] for i in batch], [plain(i, params) for i in batch], texts)
    return found


def of_cell(pair: str, number: int) -> list[int]:
    """The prompts of one of the 32 cells; each prompt comes at every batch size, at one or two draft lengths."""
    return [i for i in range(len(PROMPTS)) if (i + number) % SHARE[pair] == 0]


def test_the_grid_is_what_it_says():
    assert len(PROMPTS) == len(set(PROMPTS)) == 200 and len(CELLS) == 32
    for pair, share in SHARE.items():
        cells = [of_cell(pair, number) for number in range(32)]
        assert all(len(cell) == 200 // share >= 25 for cell in cells)
        assert all(sum(i in cell for cell in cells) == 32 // share for i in range(200))


@pytest.mark.slow
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_the_grid(pair, engine, plain, params, capsys):
    ties = NearTies()
    for number, (rows, drafts) in enumerate(CELLS):
        found = differences(engine, plain, params, rows, drafts, of_cell(pair, number), ties)
        with capsys.disabled():
            print(f"\n{pair}, {rows} rows, {drafts} drafts: {len(found)} differ", *found, sep="\n  ", flush=True)


@pytest.mark.parametrize(
    "pair, params, rows, drafts, some",
    [
        ("bundled", GREEDY, 1, 3, [60]),
        ("bundled", SAMPLED, 8, 4, [4, 60, 3, 61]),
        ("e2b", SAMPLED, 2, 7, [3, 61]),
        ("e2b", GREEDY, 4, 2, [60, 4, 99]),
    ],
    ids=["bundled, greedy, alone", "bundled, sampled, 8 rows", "e2b, sampled, 2 rows", "e2b, greedy, 4 rows"],
    indirect=["pair"],
)
def test_some_cells(engine, plain, params, rows, drafts, some):
    """What always runs of it, without any forgiveness."""
    assert differences(engine, plain, params, rows, drafts, some, NearTies()) == []

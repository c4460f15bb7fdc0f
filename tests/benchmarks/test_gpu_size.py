"""The 26B's steps at tiny size: what is written loads, cells come in their order, the page says what was found."""

import json
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from benchmarks.gpu import made, page, products, size
from benchmarks.gpu.simulated import NAME
from benchmarks.gpu.size import Cell, Window, cells
from benchmarks.random_checkpoints import converted, published
from convert.quantize import Format, Recipe
from mlx_gemma_mtp.models.config import TargetConfig
from mlx_gemma_mtp.speculative import drafting

SMALL = {
    "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "global_head_dim": 64, "sliding_window": 64, "vocab_size": 3200,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "num_global_key_value_heads": 1,
}  # fmt: skip


def small() -> tuple[dict, dict]:
    target, drafter = made.raws()
    experts = {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64}
    drafts = {"hidden_size": 64, "num_kv_shared_layers": 4}
    return (
        target | {"text_config": target["text_config"] | SMALL | experts},
        drafter | {"text_config": drafter["text_config"] | SMALL | drafts, "backbone_hidden_size": 128},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("size") / made.TARGET
    assert made.make(path, *small()) > 100_000
    return f"{path}-4bit"


def run(monkeypatch, tmp_path, system: str, folder: str) -> list[dict]:
    monkeypatch.setattr(size, "CONTEXTS", (size.TAIL + 16,))
    monkeypatch.setattr(size, "ROWS", (2,))
    monkeypatch.setattr(size, "TOKENS", 24)
    monkeypatch.setattr(size, "RATES", (0.7, 1.0))
    monkeypatch.setattr(size, "DRAFTS", (3,))
    monkeypatch.setattr(size, "CHUNK", 64)
    monkeypatch.setitem(drafting.SOURCES, NAME, None)  # and out again behind the test
    size.main(system, folder, tmp_path / "out.jsonl", 300.0)
    return [json.loads(line) for line in (tmp_path / "out.jsonl").open()]


def test_ours_runs_every_cell_and_keeps_what_was_stated(folder, monkeypatch, tmp_path):
    lines = run(monkeypatch, tmp_path, "ours", folder)
    assert lines[0]["what"] == "loaded" and "target 4- and 8-bit" in lines[0]["description"], lines[0]
    found = [line for line in lines if line["what"] == "cell"]
    assert len(found) == 2 + 1 + 2 and not any(line["short"] or line["parted"] for line in found)
    for line in found:
        assert line["tps"] > 0 and line["rounds"] > 0 and line["target_bytes"] > line["draft_bytes"] > 0
    (all_right,) = [line for line in found if line["rate"] == 1.0]
    assert all_right["kept"] == 1.0
    assert all(line["kept"] < 1.0 for line in found if line["rate"] == 0.7)
    text = page.page({}, {"size ours": lines}, {"card": "name\nNVIDIA H100 80GB HBM3, 1"})
    assert "| 80, 2 | greedy | 3 | 0.7 |" in text and "| 80, 2 | sampled | 3 | 1.0 | 1.0 |" in text


@pytest.mark.parametrize("system", ["mlx-lm", pytest.param("mlx-vlm", marks=pytest.mark.slow)])
def test_a_peer_decodes_the_same_folder(folder, monkeypatch, tmp_path, system):
    pytest.importorskip(system.replace("-", "_"))
    lines = run(monkeypatch, tmp_path, system, folder)
    assert [line["what"] for line in lines] == ["loaded", "cell"], lines
    assert lines[1]["tps"] > 0 and (lines[1]["rows"], lines[1]["short"]) == (2, 0)


def test_what_raises_is_a_finding(tmp_path):
    assert size.main("ours", str(tmp_path / "nothing"), tmp_path / "out", 5.0) == 1
    assert json.loads((tmp_path / "out").read_text())["what"] == "raised"


def test_values_have_the_planned_distributions():
    """Those that the host draws: same names, types and shapes, about the same mean and deviation."""
    target, drafter = small()
    files, _ = converted(target, Recipe(Format(made.BITS, made.GROUP)))
    for tensors in (*files.values(), *published(drafter).values()):
        arrays = made.arrays(tensors)
        assert list(arrays) == sorted(arrays, key=[each.name for each in tensors].index) or len(arrays) == len(tensors)
        for tensor in tensors:
            ours = arrays[tensor.name]
            assert ours.shape == tensor.shape and ours.dtype == made.KINDS.get(tensor.dtype, mx.uint32)
            if tensor.dtype == "BF16" and ours.size > 1000:
                theirs = np.concatenate([block.ravel() for block in tensor.blocks()])
                theirs = (theirs.astype(np.uint32) << 16).view(np.float32)
                ours = np.array(ours.astype(mx.float32)).ravel()
                assert abs(ours.mean() - theirs.mean()) < 0.1 * theirs.std() + 0.02 * abs(theirs.mean()), tensor.name
                assert 0.85 < ours.std() / theirs.std() < 1.15, tensor.name


def test_a_hollow_folder_is_the_same_but_for_its_values(folder, tmp_path):
    """And takes next to no room; of the real size it would be 15 GB."""
    bytes_said = made.make(tmp_path / made.TARGET, *small(), hollow=True)
    for ours, theirs in (
        (tmp_path / f"{made.TARGET}{end}", Path(f"{folder[:-5]}{end}")) for end in ("-4bit", "-assistant")
    ):
        assert {file.name for file in ours.iterdir()} == {file.name for file in theirs.iterdir()}
        for file in ours.glob("*.safetensors"):
            hollow, drawn = mx.load(str(file)), mx.load(str(theirs / file.name))
            kinds = [{name: (array.shape, array.dtype) for name, array in each.items()} for each in (hollow, drawn)]
            assert kinds[0] == kinds[1] and not any(array.any().item() for array in hollow.values())
            bytes_said -= sum(array.nbytes for array in hollow.values())
            assert file.stat().st_blocks * 512 < file.stat().st_size / 4
    assert bytes_said == 0


def test_fewer_layers_end_with_a_full_one():
    text = made.raws(6)[0]["text_config"]
    assert text["layer_types"][-1] == "full_attention" and len(text["layer_types"]) == text["num_hidden_layers"] == 6
    TargetConfig.from_dict(made.raws(6)[0])


def test_plain_decoding_comes_before_what_says_its_text():
    for group in cells():
        assert group[0].drafts == 0 and all(each.drafts and each.rate for each in group[1:])
        assert len({(each.rows, each.context, each.temperature) for each in group}) == 1
    rates = {cell.rate for group in cells() for cell in group[1:]}
    assert rates == {0.6, 0.7, 0.8, 0.9} and {group[0].rows for group in cells()} == {1, 2, 4, 8}
    assert cells()[0][0] == Cell(1, 1024, 0.0)


def test_prompts_differ_in_their_tails_alone():
    one, two, three = size.prompts(3, 200, 1000)
    assert len(one) == 200 and one[: -size.TAIL] == two[: -size.TAIL] and one[-size.TAIL :] != two[-size.TAIL :]
    assert size.prompts(1, 200, 1000) == [one] and three not in (one, two)


def test_only_what_all_rows_do_counts():
    window = Window(2)
    saw = partial(window.saw, drafted=3, accepted=1, last=False)
    saw(0, 1, now=0.0)
    saw(0, 2, now=1.0)
    saw(1, 1, now=2.0)  # both decode from here on
    saw(0, 2, now=3.0)
    saw(1, 2, now=3.0)
    saw(0, 2, now=4.0)
    window.saw(1, 2, 3, 3, True, 4.0)
    saw(0, 9, now=9.0)
    assert window.figures() == {"tps": 3.0, "rounds": 2, "round_ms": 1000.0, "kept": 0.5, "looked": 6}


def test_shapes_are_those_of_the_models():
    raw = json.loads((products.CONFIGS / "gemma-4-26B-A4B-it.json").read_text())
    shapes = products.shapes(TargetConfig.from_dict(raw))
    assert shapes["head"] == (2816, 262144) and shapes["sliding q/k/v"] == (2816, (16 + 2 * 8) * 256)
    assert shapes["full out"] == (16 * 512, 2816) and (2816, 2 * 2112) in shapes.values()


def test_products_are_told_with_what_a_row_alone_has():
    (found,) = [each for each in products.measured(64, 32, 4, 3) if each["by"] == "MLX"]
    assert found["alone"] is True and found["each_us"] > 0


def test_the_page_says_how_near_the_card_one_row_comes():
    place = {"what": "cell", "system": "ours", "rows": 1, "context": 1024, "temperature": 0.0, "drafts": 0}
    figures = {"rate": None, "tps": 1000.0, "round_ms": 1.0, "kept": None, "target_bytes": 335 * 10**7}
    plain = place | figures
    mtp = plain | {"drafts": 3, "rate": 0.8, "tps": 1500.0, "kept": 0.79, "round_ms": 2.0}
    lm = plain | {"system": "mlx-lm", "tps": 800.0}
    found = {"size ours": [plain, mtp], "size mlx-lm": [lm, {"system": "mlx-lm", "what": "raised", "error": "no"}]}
    text = page.page({"a": {"state": "ended with 0", "seconds": 1}}, found, {"card": "x\nNVIDIA H100 80GB HBM3"})
    assert "| 1024, 1 | 1000.0 | 800.0 | 100% |" in text and "- mlx-lm: no" in text
    assert f"| 1024, 1 | greedy | 3 | 0.8 | 0.79 | 1500.0 | 1.50 | 2.0 | {page.expected(0.8, 3) / 2:.2f} |" in text
    assert page.expected(0.8, 3) == pytest.approx(1 + 0.8 + 0.64 + 0.512)

"""benchmarks/experts.py: the paths that it times compute the same, and its ratios are those of one turn."""

import json

import mlx.core as mx
import numpy as np
import pytest

from benchmarks import expert_paths, experts
from benchmarks.experts import Times, interleaved, quartiles, report
from mlx_gemma_mtp.models.config import MoESpec

SMALL, HIDDEN = MoESpec(num_experts=6, top_k=2, size=64), 128


def by_hand(tensors: dict, x, chosen, weights) -> np.ndarray:
    """One token and one of its experts after the other."""
    gate, up, down = (np.array(tensors[name], np.float64) for name in expert_paths.PROJECTIONS)
    out = np.zeros(x.shape)
    for token, values in enumerate(np.array(x, np.float64)):
        for expert, weight in zip(chosen[token].tolist(), weights[token].tolist(), strict=True):
            g = gate[expert] @ values
            g = 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)))
            out[token] += weight * (down[expert] @ (g * (up[expert] @ values)))
    return out


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_plain_paths_by_hand(tokens):
    shapes = ((SMALL.size, HIDDEN), (SMALL.size, HIDDEN), (HIDDEN, SMALL.size))
    tensors = {
        name: mx.random.normal((SMALL.num_experts, *shape), key=mx.random.key(i)) * 0.1
        for i, (name, shape) in enumerate(zip(expert_paths.PROJECTIONS, shapes, strict=True))
    }
    x, chosen, weights = expert_paths.random_inputs(tokens, HIDDEN, SMALL)
    assert all(len(set(row)) == SMALL.top_k for row in chosen.tolist())
    expected = by_hand(tensors, x, chosen, weights)
    for name, path in expert_paths.Plain(tensors).paths.items():
        assert np.abs(np.array(path(x, chosen, weights)) - expected).max() < 1e-4 * np.abs(expected).max(), name


@pytest.mark.parametrize("bits", [4, 8])
def test_both_layers_have_the_same_weights(bits):
    tensors = expert_paths.quantised(HIDDEN, SMALL, bits)
    codes = {
        name: mx.dequantize(*(tensors[f"switch_glu.{name}.{p}"] for p in ("weight", "scales", "biases")), 64, bits)
        for name in expert_paths.PROJECTIONS
    }
    assert mx.var(codes["gate_proj"]).item() * HIDDEN == pytest.approx(1, rel=0.1)  # outputs as large as inputs
    inputs = expert_paths.random_inputs(5, HIDDEN, SMALL)
    expected = by_hand(codes, *inputs)
    for name, path in expert_paths.layers(HIDDEN, SMALL, bits).items():
        assert np.abs(np.array(path(*inputs)) - expected).max() < 1e-4 * np.abs(expected).max(), name


def test_turns_and_ratios():
    """Every turn begins with the next call; a ratio is of two calls of one turn, not of two medians."""
    order = []
    times = interleaved({name: lambda name=name: order.append(name) for name in "abc"}, 4)
    assert "".join(order) == "abcbcacababc" and len(times["b"].wall) == len(times["b"].cpu) == 4
    base, slow = Times([1.0, 2.0, 4.0], [1.0, 1.0, 1.0]), Times([2.0, 2.0, 12.0], [1.5, 1.0, 2.0])
    records = list(report({"base": base, "slow": slow}, "base", {"tokens": 3}))
    assert records[0]["wall_ratio"] == (1, 1, 1) and records[1]["wall_ratio"] == (1.5, 2, 2.5)
    assert records[1]["wall_ms"] == 2000 and records[1]["cpu_ms"] == 1500 and records[1]["cpu_ratio"][1] == 1.5
    assert quartiles([3.0]) == (3.0, 3.0, 3.0)


def test_the_command(capsys, tmp_path):
    """On the bundled pair, with choices of a real prompt; one JSON line a path."""
    lines = tmp_path / "lines.json"
    argv = ["bundled", "--repeats", "1", "--bundled-tokens", "3", "--json", str(lines)]
    assert experts.main(argv) == 0
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [record["path"] for record in records] == [expert_paths.OURS, "pairs", "sorted", "dense"]
    assert all(4 < record["distinct"] < 12 and record["over"] == "pairs" for record in records)
    assert capsys.readouterr().out.count("| bundled | 3 |") == 4


def test_a_path_that_differs_is_found(capsys, monkeypatch):
    right = expert_paths.bundled
    monkeypatch.setattr(expert_paths, "bundled", lambda e: right(e) | {"broken": lambda x, chosen, weights: x})
    assert experts.main(["bundled", "--repeats", "1", "--bundled-tokens", "3"]) == 1
    assert "broken is" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--repeats", "0"], "--repeats is 0, expected at least 1"),
        (["--tokens", "4", "0"], "--tokens is 0"),
        (["bundled", "--bundled-tokens", "-1"], "--bundled-tokens is -1"),
        (["bundled", "--bundled-tokens", "5000"], "expected at least 5000"),
        (["--json", "nothing/here.json"], "create nothing"),
    ],
)
def test_bad_input(capsys, argv, message):
    code, err = experts.main(argv), capsys.readouterr().err
    assert code == 2 and len(err.splitlines()) == 1 and message in err

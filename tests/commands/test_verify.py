"""`verify` says equal where MTP keeps the text, and finds where it does not."""

import json
import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_gemma_mtp import verify
from mlx_gemma_mtp.checks import invariance
from mlx_gemma_mtp.checks.equality import permutation_test
from mlx_gemma_mtp.machine import device
from mlx_gemma_mtp.sampling.distribution import accept
from mlx_gemma_mtp.speculative import rounds

HARD = [
    "What does the Python function `platform.machine` do?",
    "What does the Python function `platform.processor` do?",
]
QUICK = ["--max-tokens", "12", "--rows", "2", "--num-draft-tokens", "3", "--samples", "24"]


@pytest.fixture
def prompt_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n\n".join(HARD) + "\n")
    return str(path)


def run(capsys, *argv: str) -> tuple[int, str, str]:
    code = verify.main(list(argv))
    return code, *capsys.readouterr()


def test_the_bundled_pair_is_equal(capsys, prompt_file):
    code, out, _ = run(capsys, *QUICK, "--prompt-file", prompt_file)
    assert code == 0, out
    assert "reference: plain decoding, one row at a time; target unquantised" in out and "float32" in out
    assert "greedy, 2 rows, 3 drafts: 2 of 2 texts equal" in out and "equal: MTP changes nothing here" in out
    assert "temperature 1, 24 samples each way: same distribution" in out and "whole pass: 1" in out


@pytest.mark.parametrize("flags", [["--kv-bits", "8"], ["--kv-bits", "4", "--kv-bits-rings"]])
def test_few_bits_of_kv_are_equal(capsys, prompt_file, flags):
    """The reference is plain decoding over the same bits: a text of another engine is no part of it."""
    code, out, _ = run(capsys, *QUICK, "--prompt-file", prompt_file, "--samples", "0", *flags)
    assert code == 0 and "greedy, 2 rows, 3 drafts: 2 of 2 texts equal" in out, out
    assert f"K/V of {'all' if len(flags) > 2 else 'full'} layers in {flags[1]} bits" in out


@pytest.mark.parametrize("products", ["float32", "TF32"])
def test_products_in_tf32_are_told(capsys, prompt_file, monkeypatch, products):
    monkeypatch.setattr(device, "float32_products", lambda: products)
    quick = ["--max-tokens", "2", "--rows", "1", "--num-draft-tokens", "1", "--samples", "0", "--temps", "0"]
    out = "".join(run(capsys, *quick, "--prompt-file", prompt_file)[1:])
    assert ("products of float32 are computed in TF32; MLX_ENABLE_TF32=0" in out) == (products == "TF32")
    found = json.loads(run(capsys, *quick, "--prompt-file", prompt_file, "--json")[1])
    assert found["float32_products"] == products


def test_a_broken_rule_is_found(capsys, prompt_file, monkeypatch):
    """Drafts that are kept whatever the target says: the first divergence comes with both logits."""
    monkeypatch.setattr(rounds, "accept", lambda drafts, targets, real: accept(targets[:, :-1], targets, real))
    code, out, _ = run(capsys, *QUICK, "--prompt-file", prompt_file, "--samples", "48", "--json")
    record = json.loads(out)
    assert code == 1 and not record["equal"]
    found = [each for cell in record["cells"] if cell["temperature"] == 0 for each in cell["divergences"]]
    assert found and all(each["plain_token"] != each["mtp_token"] for each in found)
    assert all(each["plain_logit"] > each["mtp_logit"] for each in found)  # the reference took its best
    assert record["same_distribution"]["1.0"] < 1e-3


def test_gaps_up_to_the_tolerance_are_ties(capsys, prompt_file, monkeypatch):
    monkeypatch.setattr(rounds, "accept", lambda drafts, targets, real: accept(targets[:, :-1], targets, real))
    argv = [*QUICK, "--prompt-file", prompt_file, "--samples", "0"]
    assert run(capsys, *argv, "--temps", "0")[0] == 1
    assert run(capsys, *argv, "--temps", "0", "--tolerance", "1000")[0] == 0


def test_widths_that_agree_are_told_from_those_that_do_not():
    """A product that is made of single rows agrees at every width; one that shifts wider inputs a little at none."""
    weight = mx.random.normal((8, 5), key=mx.random.key(1))
    alone = lambda x: mx.concatenate([x[i : i + 1] @ weight for i in range(x.shape[0])])  # noqa: E731
    assert invariance.agreeing_widths(alone, 8, mx.float32) == list(invariance.WIDTHS)
    shifted = lambda x: alone(x) + (1e-6 if x.shape[0] > 3 else 0)  # noqa: E731
    assert invariance.agreeing_widths(shifted, 8, mx.float32) == [1, 2, 3]


def test_samples_of_one_distribution_are_rarely_told_apart():
    """At the level 0.05, one pair of samples in twenty, whatever the values look like; the same pair always alike."""
    random = np.random.default_rng(3)
    found = [permutation_test(*np.exp(4 * random.standard_normal((2, 8)))) for _ in range(40)]
    assert sum(p < 0.05 for p in found) <= 6 and min(found) > 1e-3
    assert permutation_test([1.0, 2.0], [5.0, 6.0]) > 0.3  # of six partitions, two are as uneven
    assert permutation_test([1.0] * 8, [1.0 + 1e-15] * 8) == 1
    assert permutation_test(range(16), range(100, 116)) == 1e-4
    assert math.isnan(permutation_test([1.0, math.nan], [1.0, 2.0]))


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--rows", "0"], "--rows is [0], expected 1 or more"),
        (["--num-draft-tokens", "0"], "--num-draft-tokens is [0], expected 1 or more"),
        (["--samples", "-1"], "--samples is -1"),
        (["--samples", "2"], "--samples is 2, expected 0 (no statistical test), or 8 and more"),
        (["--tolerance", "nan"], "--tolerance is nan, expected"),
        (["--tolerance", "inf"], "--tolerance is inf, expected"),
        (["--tolerance=-1"], "--tolerance is -1.0, expected"),
        (["--draft-model", "none"], "--draft-model is none"),
        (["--model", "nothing-here"], "no model 'nothing-here'"),
        (["--temps", "-1"], "temperature is -1.0"),
        (["--max-tokens", "0"], "max_tokens is 0"),
        (["--prompt-file", "nothing-here.txt"], "nothing-here.txt"),
        (["--dtype", "int4"], "dtype is 'int4'"),
    ],
)
def test_bad_input_is_one_line(capsys, argv, message):
    code, out, err = run(capsys, *argv)
    lines = [line for line in err.splitlines() if not line.startswith("note:")]
    assert code == 2 and out == "" and len(lines) == 1 and message in lines[0]

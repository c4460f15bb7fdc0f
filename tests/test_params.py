"""Settings are checked when they are made, with one line that names the value."""

import math

import numpy as np
import pytest

from mlx_gemma_mtp.config import GenerationDefaults
from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.params import SamplingParams


def test_settings_come_from_the_folder_where_none_are_given():
    defaults = GenerationDefaults.from_dict({"do_sample": True, "temperature": 0.7, "top_p": 0.95, "top_k": 64})
    p = SamplingParams(top_k=5).resolved(defaults)
    assert (p.temperature, p.top_p, p.top_k) == (0.7, 0.95, 5) and p.seed is not None
    assert SamplingParams(top_k=-1).resolved(defaults).top_k == -1
    greedy = SamplingParams().resolved(GenerationDefaults.from_dict({"do_sample": False, "temperature": 0.7}))
    assert (greedy.temperature, greedy.top_k) == (0, -1)


@pytest.mark.parametrize(
    "bad",
    [
        {"max_tokens": 0},
        {"max_tokens": -3},
        {"max_tokens": 2.5},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": "hot"},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": 0},
        {"top_k": -2},
        {"top_k": 1.5},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0},
        {"presence_penalty": math.inf},
        {"frequency_penalty": math.nan},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {"a": 1.0}},
        {"logit_bias": {1: math.nan}},
        {"logit_bias": {1: math.inf}},
        {"logprobs": -1},
        {"logprobs": 21},
        {"seed": -1},
        {"seed": 2**64},
        {"seed": True},
        {"thinking_budget": -1, "thinking": True},
        {"thinking_budget": 5},
        {"regex": "a", "grammar": "b"},
        {"ignore_eos": True, "json_schema": "{}"},
        {"stop": ("",)},
        {"stop": "text"},
    ],
    ids=str,
)
def test_settings_out_of_range_are_named(bad):
    with pytest.raises(UserError, match=next(iter(bad))) as raised:
        SamplingParams(**bad)
    assert "expected" in str(raised.value) and "\n" not in str(raised.value)


def test_numpy_numbers_are_numbers():
    assert SamplingParams(max_tokens=np.int64(3), temperature=np.float32(0.5), seed=np.uint64(7)).max_tokens == 3

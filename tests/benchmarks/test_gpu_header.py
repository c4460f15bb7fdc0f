"""What stands before a Metal text on CUDA: whether it says all that our kernels' texts ask of Metal."""

import re
from importlib import import_module

import mlx.core as mx
import pytest

from benchmarks.gpu import cuda_as_metal
from benchmarks.gpu.cuda_as_metal import HEADER, metal_kernel
from mlx_gemma_mtp.ops import kernels
from mlx_gemma_mtp.ops.kernels import down, few_rows, gate_up, grouping, head_argmax

KERNELS = [grouping.KERNEL, *(each.kernel(q) for each in (gate_up, down, head_argmax, few_rows) for q in (False, True))]
TEXTS = {f"{each.name} {i}": each.header + each.source for i, each in enumerate(KERNELS)}
ATTRIBUTES = r"\b(?:thread|threads|threadgroups?|simdgroups?)_\w+\b"


def code(text: str) -> str:
    return re.sub(r"//[^\n]*", "", text)


def test_every_kernel_is_looked_at():
    modules = {f"{kernels.__name__}.{name}" for name in kernels.KERNELS}
    assert modules == {each.__name__ for each in (grouping, gate_up, down, head_argmax, few_rows)}
    assert all(import_module(name) for name in modules)


@pytest.mark.parametrize("name", TEXTS)
def test_the_header_says_all_that_a_text_asks_for(name):
    text, header = code(TEXTS[name]), code(HEADER)
    asked = set(re.findall(r"metal::(?:precise::|fast::)?(\w+)\s*\(", text))
    mathematics = set(re.findall(r"OP\((\w+)\)", header))
    functions = set(re.findall(r"inline \w+ (\w+)\(", header))
    assert asked <= mathematics | functions, asked
    defined = set(re.findall(r"#define (\w+)", header)) | functions
    for word in set(re.findall(ATTRIBUTES, text)) | set(re.findall(r"\bsimd_\w+", text)):
        assert word in defined, word
    bare = set(re.findall(r"(?<![\w:])(simd_\w+|threadgroup_barrier|simdgroup_barrier|as_type)\b", text))
    assert all(f"using metal::{word};" in header for word in bare)


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_keeps_to_what_means_the_same_in_both_languages(name):
    """The header's rules: shared memory is declared as arrays alone, and nothing is included or atomic."""
    text = code(TEXTS[name])
    for declared in re.findall(r"\bthreadgroup\b(?!_)[^;{]*[;{]", text):
        assert re.fullmatch(r"threadgroup \w+ \w+(\[[^\]]+\])+;", declared), declared
    assert "#include" not in text and "atomic" not in text


def test_the_check_would_notice():
    assert "simd_ballot" not in HEADER and re.findall(ATTRIBUTES, "thread_index_in_quadgroup")


def test_address_spaces_become_words_that_cuda_knows():
    defines = dict(re.findall(r"#define (\w+)[ ]?(.*)", HEADER))
    assert (defines["threadgroup"], defines["device"], defines["thread"], defines["constant"]) == (
        "__shared__", "", "", "",
    )  # fmt: skip
    assert HEADER.index("#include <cuda_fp16.h>") < HEADER.index("#define device")
    assert HEADER.rindex("#include") < HEADER.index("#define threadgroup")
    for ours, theirs in (("bfloat", "__nv_bfloat16"), ("float16_t", "__half"), ("bfloat16_t", "__nv_bfloat16")):
        assert f"using {ours} = {theirs};" in HEADER


@pytest.fixture
def made(monkeypatch):
    """What mx.fast.cuda_kernel is asked for."""
    asked = []
    monkeypatch.setattr(mx.fast, "cuda_kernel", lambda **given: asked.append(given) or "kernel")
    return asked


def test_a_text_goes_to_cuda_as_it_is_behind_the_header(made):
    assert metal_kernel("k", ["x"], ["y"], "y[0] = x[0];", "int f();", ensure_row_contiguous=True) == "kernel"
    (asked,) = made
    assert asked["source"] == "y[0] = x[0];" and asked["header"] == HEADER + "int f();"
    assert asked["input_names"] == ["x"] and asked["ensure_row_contiguous"] is True


def test_equal_names_of_other_texts_are_other_kernels(made):
    for source, header in (("a", ""), ("b", ""), ("a", "c"), ("a", "")):
        metal_kernel("k", [], [], source, header)
    names = [asked["name"] for asked in made]
    assert len(set(names)) == 3 and names[0] == names[3] and all(name.startswith("k_") for name in names)


def test_atomic_outputs_are_refused(made):
    with pytest.raises(NotImplementedError, match="k: outputs that are atomic"):
        metal_kernel("k", [], [], "", atomic_outputs=True)
    assert not made


def test_nothing_is_replaced_where_no_gpu_computes():
    before = mx.metal.is_available, mx.fast.metal_kernel, mx.device_info
    assert cuda_as_metal.install() == mx.metal.is_available()
    assert before == (mx.metal.is_available, mx.fast.metal_kernel, mx.device_info)

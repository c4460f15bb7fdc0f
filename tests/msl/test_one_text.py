"""One text for three places, the emulator, Metal, and CUDA behind a header; and what it must keep to, so that it means
the same in all of them.
"""

import re
from math import prod
from pathlib import Path

import launches
import mlx.core as mx
import pytest
from signature import emulated, signature

from mlx_gemma_mtp.machine import device
from mlx_gemma_mtp.machine.device import Kind
from mlx_gemma_mtp.ops import kernels
from mlx_gemma_mtp.ops.kernels import Kernel, grouping

CHECKS = launches.of_checks()
KERNELS = launches.texts(CHECKS)
HEADER = kernels.cuda_header()
ATTRIBUTES = r"\b(?:thread|threads|threadgroups?|simdgroups?)_\w+\b"
DECLARED = r"\b(?:struct|class|enum) (\w+)|\btypedef [\w ]+ (\w+);|#define (\w+)|\b(\w+)\s*\([^()]*\)\s*\{"
SIMD = 32
LARGEST = 1024  # threads of a threadgroup


def code(text: str) -> str:
    return re.sub(r"//[^\n]*", "", text)


def faults(text: str) -> list[str]:
    """Returns what of a text means something else on CUDA, where `threadgroup` is `__shared__`: it may stand before
    declarations of arrays alone, not in a pointer's or a parameter's type.
    """
    text = code(text)
    declared = re.findall(r"\bthreadgroup\b(?!_)(?:\[[^\]]*\]|[^;{)\[])*[;{)]", text)
    found = [each for each in declared if not re.fullmatch(r"threadgroup \w+ \w+(\[[^\]]+\])+;", each)]
    return found + re.findall(r"#include.*|\batomic\w*", text)


def test_every_kernel_is_looked_at():
    assert {each.what.rpartition(" ")[2] for each in CHECKS} == set(kernels.KERNELS)
    assert len(KERNELS) >= len(kernels.KERNELS)


@pytest.fixture
def made(monkeypatch):
    """What MLX is asked for, by the function that is called."""
    asked = {}

    def function(by: str):
        def make(name: str, **given):
            asked[name] = given
            return by

        return make

    for name in ("metal_kernel", "cuda_kernel"):
        monkeypatch.setattr(mx.fast, name, function(name))
    monkeypatch.setattr(kernels, "build", kernels.build.__wrapped__)
    return asked


@pytest.mark.parametrize("name", KERNELS)
def test_emulator_metal_and_cuda_get_the_same_text(name, made, monkeypatch):
    kernel = KERNELS[name]
    for kind, function in ((Kind.METAL, "metal_kernel"), (Kind.CUDA, "cuda_kernel")):
        monkeypatch.setattr(device, "kind", lambda kind=kind: kind)
        assert kernels.build(kernel) == function
    on_metal, on_cuda = made[kernel.name], made[kernels.cuda_name(kernel)]
    assert on_metal == {
        "input_names": list(kernel.inputs), "output_names": list(kernel.outputs), "source": kernel.source,
        "header": kernel.header,
    }  # fmt: skip
    assert on_cuda == on_metal | {"header": HEADER + kernel.header}
    launch = next(each for each in CHECKS if each.kernel == kernel)
    of = launch.arguments
    sign = signature(kernel, of["inputs"], of["output_dtypes"], of["template"])
    text, storage = emulated(kernel, sign, counting=False), r"threadgroup [^;]*;|auto& \w+ = emu::tg_alloc[^;]*;"
    plain, emulators = (re.sub(storage, "@", each) for each in (kernel.header + kernel.source, text))
    assert plain[: len(code(kernel.header))] in emulators and re.sub(storage, "@", kernel.source) in emulators


@pytest.mark.parametrize("name", KERNELS)
def test_the_header_says_all_that_a_text_asks_for(name):
    text, header = code(KERNELS[name].header + KERNELS[name].source), code(HEADER)
    asked = set(re.findall(r"metal::(?:precise::|fast::)?(\w+)\s*\(", text))
    mathematics = set(re.findall(r"OP\((\w+)\)", header))
    functions = set(re.findall(r"inline \w+ (\w+)\(", header))
    assert asked <= mathematics | functions, asked
    defined = set(re.findall(r"#define (\w+)", header)) | functions
    for word in set(re.findall(ATTRIBUTES, text)) | set(re.findall(r"\bsimd_\w+", text)):
        assert word in defined, word
    bare = set(re.findall(r"(?<![\w:])(simd_\w+|threadgroup_barrier|simdgroup_barrier|as_type)\b", text))
    assert all(f"using metal::{word};" in header for word in bare)


def test_no_name_of_ours_is_one_that_mlx_declares():
    """MLX puts these headers before a text, in the same namespace: a name that both have would be ambiguous, or MLX's
    would be called.
    """
    folder, found, waiting = Path(mx.__file__).parent / "include", set(), ["mlx/backend/metal/kernels/utils.h"]
    if not (folder / waiting[0]).is_file():
        pytest.skip("MLX is installed without its Metal headers")
    while waiting:
        text = code((folder / waiting.pop()).read_text(encoding="utf-8"))
        waiting += re.findall(r'#include "(mlx/[^"]+)"', text)
        found |= {name for names in re.findall(DECLARED, text) for name in names if name}
    assert {"ceildiv", "elem_to_loc", "simd_shuffle_down", "complex_t", "bfloat16_t", "Limits"} <= found
    for name, kernel in KERNELS.items():
        assert found.isdisjoint(re.findall(r"inline \w+ (\w+)\(", code(kernel.header))), name


@pytest.mark.parametrize("name", KERNELS)
def test_a_text_means_the_same_in_both_languages(name):
    assert faults(KERNELS[name].header + KERNELS[name].source) == []


@pytest.mark.parametrize(
    "text",
    [
        "threadgroup float* part = sums;",
        "inline float total(const threadgroup float* part, int n) { return part[n]; }",
        "inline void add(threadgroup float& sum) {",
        "threadgroup float one;",
        "#include <metal_stdlib>",
        "atomic_fetch_add_explicit(y, 1);",
    ],
)
def test_what_would_mean_something_else_is_found(text):
    assert faults(text) != []
    assert faults("threadgroup float sums[4][(N > 1 ? N : 1)]; // threadgroup T* p;\nthreadgroup_barrier(x);") == []


def test_launches_are_whole_blocks_of_whole_warps():
    """CUDA launches blocks whole, and a SIMD-group's operation waits for all of its lanes."""
    for launch in launches.of_models():
        grid, block = launch.arguments["grid"], launch.arguments["threadgroup"]
        assert all(a % b == 0 for a, b in zip(grid, block, strict=True)), launch.what
        assert prod(block) % SIMD == 0 and prod(block) <= LARGEST, launch.what


def test_a_name_is_that_of_its_text(monkeypatch):
    """CUDA's compiled kernels are looked up by name."""
    texts = [("a", ""), ("b", ""), ("a", "c"), ("", "ac"), ("c", "a")]
    names = [kernels.cuda_name(Kernel("k", (), (), source, header)) for source, header in texts]
    assert len(set(names)) == len(texts) and all(name.startswith("k_") for name in names)
    monkeypatch.setattr(kernels, "cuda_header", lambda: HEADER + " ")
    assert kernels.cuda_name(Kernel("k", (), (), *texts[0])) not in names


def test_on_metal_a_name_and_a_template_stand_for_one_text():
    """MLX compiles anew when the text under them changes; by the number of an input's elements it writes another."""
    texts, names = {}, set()
    for launch in launches.of_models():
        of = launch.arguments
        kernel = launch.kernel.on_metal(of["inputs"])
        sign = signature(kernel, of["inputs"], of["output_dtypes"], of["template"])
        text = (kernel.header, kernel.source, sign.parameters)
        assert texts.setdefault((kernel.name, sign.template, sign.arguments), text) == text, launch.what
        names.add(kernel.name)
    assert {"expert_groups", "expert_groups_few_experts", "expert_down_few_order_scale"} <= names


def test_launches_are_written_down_by_one_name_on_every_device(monkeypatch):
    """So that this file says the same on a Mac."""
    monkeypatch.setattr(device, "kind", lambda: Kind.METAL)
    assert {each.kernel.name for each in launches.of_models()} == {kernel.name for kernel in KERNELS.values()}


def test_a_launch_on_metal_goes_by_that_name(made, monkeypatch):
    monkeypatch.setattr(device, "kind", lambda: Kind.METAL)
    for pairs in (4, 8):
        with pytest.raises(TypeError):  # what is made here launches nothing
            grouping.group_metal(mx.zeros((pairs,), mx.uint32), 24)
    assert list(made) == ["expert_groups_few_experts", "expert_groups"]
    assert made["expert_groups_few_experts"] == made["expert_groups"]


def test_address_spaces_become_words_that_cuda_knows():
    defines = dict(re.findall(r"#define (\w+)[ ]?(.*)", HEADER))
    spaces = {name: defines[name] for name in ("threadgroup", "device", "thread", "constant")}
    assert spaces == {"threadgroup": "__shared__", "device": "", "thread": "", "constant": ""}
    assert HEADER.rindex("#include") < HEADER.index("#define device")
    for ours, theirs in (("bfloat", "__nv_bfloat16"), ("float16_t", "__half"), ("bfloat16_t", "__nv_bfloat16")):
        assert f"using {ours} = {theirs};" in HEADER

"""The emulator itself: what it must compute, count and report. Kernel bodies here are a line or two."""

import mlx.core as mx
import numpy as np
import pytest
from emulator import CLANG, ORDERS, SANITIZED, Emulator, KernelFault, missing, typecheck
from signature import printed_parameters, signature

from mlx_gemma_mtp.ops.kernels import Kernel, build

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

INDEX = "uint i = thread_position_in_grid.x; "
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
TWO_STEPS = """
    threadgroup float parts[2], unused[1];
    uint i = thread_position_in_threadgroup.x;
    float sum = simd_sum(a[i]);
    if (thread_index_in_simdgroup == 0) { parts[simdgroup_index_in_threadgroup] = sum; }
    %s
    out[i] = parts[0] + parts[1];
"""


def run(source, n=64, group=64, inputs=None, names=("a",), out=(64,), dtype=mx.float32, emulator=None, **launch):
    emulator = emulator or Emulator()
    return emulator.build(Kernel("t", names, ("out",), source))(
        inputs=[mx.arange(n).astype(mx.float32)] if inputs is None else inputs,
        grid=(n, 1, 1),
        threadgroup=(group, 1, 1),
        output_shapes=[out],
        output_dtypes=[dtype],
        **launch,
    )[0]


def test_a_sum_over_a_threadgroup_is_right_in_every_order():
    for order in ORDERS:
        assert mx.array_equal(run(TWO_STEPS % BARRIER, emulator=Emulator(order)), mx.full((64,), 2016.0))


def test_a_missing_barrier_shows():
    outs = [np.array(run(TWO_STEPS % "", emulator=Emulator(order))) for order in ORDERS]
    assert any(np.isnan(out).any() for out in outs)  # threadgroup memory starts as NaN


@pytest.mark.parametrize(
    ("source", "report"),
    [
        (INDEX + "float s; if (i % 2) { s = simd_sum(a[i]); } else { s = simd_max(a[i]); } out[i] = s;", "divergent"),
        (INDEX + "if (i == 5) { return; } " + BARRIER + " out[i] = a[i];", "have returned|ended while"),
        (INDEX + "if (i < 5) { " + BARRIER + " } else { simd_sum(a[i]); } out[i] = 0;", "split"),
        (INDEX + "out[i] = a[i + 1];", "buffer 'a' .*offset 4096"),
        (INDEX + "out[i + 4] = a[i];", "buffer 'out' "),
        (INDEX + "out[i] = simd_shuffle_xor(a[i], 32);", "is not there"),
    ],
    ids=["divergent", "early return", "split", "read past the end", "write past the end", "absent lane"],
)
def test_faults_are_reported(source, report):
    with pytest.raises(KernelFault, match=report):
        run(source, n=1024, out=(1024,))


def test_a_fault_does_not_end_the_process():
    copy = INDEX + "out[i] = a[i];"
    with pytest.raises(KernelFault, match="buffer 'a' "):
        run(copy, n=2048, inputs=[mx.zeros((1024,))], out=(2048,))
    assert run(copy, n=1024, out=(1024,))[7] == 7


def test_outputs_that_nobody_writes_are_nan():
    out = np.array(run(INDEX + "if (i < 60) { out[i] = a[i]; }"))
    assert np.isnan(out[60:]).all() and not np.isnan(out[:60]).any()


def test_bfloat_needs_an_explicit_cast():
    with pytest.raises(KernelFault, match="does not compile"):
        run(INDEX + "out[i] = a[i] * 2.0f;", dtype=mx.bfloat16)
    assert run(INDEX + "out[i] = static_cast<bfloat16_t>(a[i] * 2.0f);", dtype=mx.bfloat16)[3] == 6


def test_halves_are_rounded_to_nearest():
    """All 63,488 that are numbers come back, and so does what numpy makes of floats between, above and below them."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    with np.errstate(over="ignore"):
        between = np.concatenate([halves, np.nextafter(halves, np.float16(np.inf))]).astype(np.float32)
        between = np.concatenate([between, (between[1:] + between[:-1]) / 2, [65519.9, 65520.0, 2.0**-25, 3e-8, 7e-46]])
    floats = between.astype(np.float32)[np.isfinite(between)]
    floats = np.concatenate([floats, np.nextafter(floats, np.float32(0))])
    with np.errstate(over="ignore"):
        theirs = floats.astype(np.float16)
    n = floats.size
    source = INDEX + "out[i] = static_cast<float16_t>(a[i]);"
    ours = np.array(run(source, n, inputs=[mx.array(floats)], out=(n,), dtype=mx.float16))
    assert np.array_equal(ours.view(np.uint16), theirs.view(np.uint16))
    finite = mx.array(halves)
    back = run(INDEX + "out[i] = static_cast<float>(a[i]);", halves.size, inputs=[finite], out=(halves.size,))
    assert np.array_equal(np.array(back), halves.astype(np.float32))


def test_a_product_is_fused_into_a_sum_only_where_that_is_asked_for():
    """(1 + e)(1 - e) - 1 is -e^2, and 0 once the product is rounded; across statements nothing is fused."""
    e = 2.0**-13
    inputs, names = [mx.full((64,), 1 + e), mx.full((64,), 1 - e)], ("a", "b")
    for fused in (False, True):
        emulator = Emulator(fused=fused)
        ask = lambda source: run(INDEX + source, inputs=inputs, names=names, emulator=emulator)[5].item()  # noqa: B023, E731
        assert ask("out[i] = a[i] * b[i] - 1.0f;") == (-e * e if fused else 0)
        assert ask("float s = -1.0f; s += a[i] * b[i]; out[i] = s;") == (-e * e if fused else 0)
        assert ask("out[i] = a[i] * b[i] + -1.0f * 1.0f;") == (-e * e if fused else 0)  # the left one
        assert ask("float p = a[i] * b[i]; out[i] = p - 1.0f;") == 0


def test_shuffles_and_partial_groups():
    out = run(INDEX + "out[i] = simd_shuffle_xor(a[i], 1) + 100.0f * simd_broadcast(a[i], 3);")
    assert np.array_equal(np.array(out), [(i ^ 1) + 100 * (i // 32 * 32 + 3) for i in range(64)])
    out = run(INDEX + "out[i] = simd_sum(1.0f);", n=40, out=(40,))
    assert out.tolist() == [32.0] * 32 + [8.0] * 8


def test_scalars_shapes_and_strides_are_arguments():
    source = INDEX + "out[i] = a[i] * s + a_shape[0] + a_ndim + a_strides[0];"
    assert run(source, inputs=[mx.arange(64).astype(mx.float32), mx.array(2.0)], names=("a", "s"))[5] == 10 + 64 + 1 + 1


def test_too_much_threadgroup_memory_is_reported():
    source = "threadgroup float much[9000]; " + INDEX + "much[i] = a[i]; out[i] = much[i];"
    run(source)  # storage is known after the first launch
    with pytest.raises(KernelFault, match="32 KB"):
        run(source)


def test_the_sanitizer_build_finds_an_overrun_of_a_local_array():
    source = INDEX + "float held[4]; for (uint k = 0; k < 4; k++) { held[k] = a[i]; } out[i] = held[i % 5];"
    with pytest.raises(KernelFault, match="undefined behaviour"):
        run(source, emulator=Emulator(flags=SANITIZED))


def test_reads_are_counted_in_all_and_once():
    """Each of 64 threads reads its word twice, through a pointer of another type and through a derived one."""
    source = """
        uint i = thread_position_in_grid.x;
        const device uint32_t* words = (const device uint32_t*)a + 2;
        const device float* floats = a + i;
        out[i] = floats[2] + static_cast<float>(words[i] >> 31) + s[0];
    """
    emulator = Emulator(counting=True)
    inputs = [mx.arange(128).astype(mx.float32), mx.zeros((16,))]
    assert run(source, inputs=inputs, names=("a", "s"), emulator=emulator)[5] == 7
    reads = emulator.reads["t"]
    assert (reads["a"].total, reads["a"].distinct, reads["a"].units) == (64 * 8, 64 * 4, 17)  # from byte 8 on
    assert (reads["s"].total, reads["s"].distinct, reads["s"].units) == (64 * 4, 4, 1)


def test_the_signature_is_the_one_that_mlx_writes(tmp_path, capfd):
    """MLX records a kernel while exporting, even without Metal, and prints the text that it would compile."""
    source = INDEX + "out[i] = static_cast<T>(a[i] + b * few[a_shape[0] % W] + words_ndim * words_strides[0]);"
    kernel = Kernel("s", ("a", "b", "few", "words"), ("out",), source)
    inputs = [mx.zeros((4, 16), mx.bfloat16), mx.array(1.0), mx.zeros((7,)), mx.zeros((3, 8), mx.uint32)]
    template = [("T", mx.float16), ("W", 3), ("Z", True)]
    launch = {"grid": (64, 1, 1), "threadgroup": (64, 1, 1), "output_shapes": [(64,)], "output_dtypes": [mx.float16]}

    def call(*arrays):
        return build(kernel)(inputs=list(arrays), template=template, verbose=True, **launch)

    mx.export_function(str(tmp_path / "k.mlxfn"), call, *inputs)
    ours = signature(kernel, inputs, [mx.float16], template).parameters
    assert printed_parameters(capfd.readouterr().out, "s") == ours


@pytest.mark.skipif(CLANG is None, reason="no clang++: address spaces are not checked")
@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("threadgroup float b[32]; threadgroup float* p = b; p[0] = a[0]; out[0] = p[0];", None),
        ("const float* p = a; out[0] = p[0];", "cannot initialize"),
        ("threadgroup float b[4]; device float* p = b; out[0] = p[0];", "cannot initialize"),
        ("a[0] = 1.0f;", "not assignable"),
        ("out[0] = std::exp(1.0f);", "undeclared identifier"),
    ],
)
def test_address_spaces(source, complaint):
    found = typecheck(Kernel("t", ("a",), ("out",), source), [mx.zeros((64,))], [mx.float32], [])
    assert (found == "") if complaint is None else complaint in found


@pytest.mark.skipif(CLANG is None, reason="no clang++: names are not checked")
def test_names_of_metals_own_headers_are_ambiguous():
    header = "inline float level(float x) { return x; }"
    found = typecheck(Kernel("t", ("a",), ("out",), "out[0] = level(a[0]);", header), [mx.zeros(64)], [mx.float32], [])
    assert "reference to 'level' is ambiguous" in found

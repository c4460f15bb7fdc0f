"""The text around a kernel's body: the signature that MLX writes, as C++ for the emulator and for clang.

MLX's rules (a test compares them with the text MLX prints while exporting): inputs of fewer than eight elements are
`constant`, 0-d ones references; a name's _shape, _strides and _ndim and Metal's attributes are arguments where the
source mentions them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import mlx.core as mx

from mlx_gemma_mtp.ops.kernels import Kernel

MAX_CONSTANT = 8
TYPES = {
    mx.bool_: "bool", mx.uint8: "uint8_t", mx.uint16: "uint16_t", mx.uint32: "uint32_t", mx.uint64: "uint64_t",
    mx.int8: "int8_t", mx.int16: "int16_t", mx.int32: "int32_t", mx.int64: "int64_t",
    mx.float16: "float16_t", mx.float32: "float", mx.bfloat16: "bfloat16_t",
}  # fmt: skip
ATTRIBUTES = {
    "thread_position_in_grid": ("uint3", "uint3(g.x*L.tg[0]+p.x, g.y*L.tg[1]+p.y, g.z*L.tg[2]+p.z)"),
    "thread_position_in_threadgroup": ("uint3", "p"),
    "threadgroup_position_in_grid": ("uint3", "g"),
    "thread_index_in_threadgroup": ("uint", "uint(i)"),
    "thread_index_in_simdgroup": ("uint", "uint(i%32)"),
    "simdgroup_index_in_threadgroup": ("uint", "uint(i/32)"),
    "threads_per_threadgroup": ("uint3", "sz"),
    "threadgroups_per_grid": ("uint3", "uint3(L.ng[0],L.ng[1],L.ng[2])"),
    "threads_per_grid": ("uint3", "uint3(L.grid[0],L.grid[1],L.grid[2])"),
    "simdgroups_per_threadgroup": ("uint", "uint((emu::M.n+31)/32)"),
}
STORAGE = re.compile(
    r"(?<![\w(,<])threadgroup\s+([A-Za-z_][\w:]*(?:<[^;{}()]*?>)?)\s+"
    r"([A-Za-z_]\w*\s*(?:\[[^;]*?\])*(?:\s*,\s*[A-Za-z_]\w*\s*(?:\[[^;]*?\])*)*)\s*;"
)
DEVICE_READ = re.compile(r"const\s+device\s+(\w+)\s*\*")


@dataclass(frozen=True)
class Signature:
    """Parameters of the generated function, what the driver hands to each, and what every buffer holds, in order.

    buffers: (input or output, part), part being "", "shape", "strides" or "ndim".
    """

    template: str
    arguments: str  # of the template
    parameters: tuple[str, ...]
    values: tuple[str, ...]
    buffers: tuple[tuple[str, str], ...]


def signature(kernel: Kernel, inputs: list[mx.array], dtypes: list[mx.Dtype], template: list) -> Signature:
    """What MLX writes for these arguments."""
    parameters, values, buffers = [], [], []

    def add(parameter: str, value: str, name: str, part: str = "") -> None:
        parameters.append(parameter)
        values.append(value.format(b=len(buffers)))
        buffers.append((name, part))

    for name, array in zip(kernel.inputs, inputs, strict=True):
        kind, space = TYPES[array.dtype], "constant" if array.size < MAX_CONSTANT else "device"
        if array.ndim == 0:
            add(f"const {space} {kind}& {name}", f"*(const {space} {kind}*)buf[{{b}}]", name)
            continue
        add(f"const {space} {kind}* {name}", f"(const {space} {kind}*)buf[{{b}}]", name)
        for part, extra, value in (
            ("shape", f"const constant int* {name}_shape", "(const int*)buf[{b}]"),
            ("strides", f"const constant int64_t* {name}_strides", "(const int64_t*)buf[{b}]"),
            ("ndim", f"const constant int& {name}_ndim", "*(const int*)buf[{b}]"),
        ):
            if f"{name}_{part}" in kernel.source:
                add(extra, value, name, part)
    for name, dtype in zip(kernel.outputs, dtypes, strict=True):
        add(f"device {TYPES[dtype]}* {name}", f"({TYPES[dtype]}*)buf[{{b}}]", name)
    for name, (kind, value) in sorted(ATTRIBUTES.items()):
        if name in kernel.source:
            parameters.append(f"{kind} {name}")
            values.append(value)
    kinds = ", ".join(f"{ {bool: 'bool', int: 'int'}.get(type(value), 'typename') } {name}" for name, value in template)
    given = ", ".join(TYPES[value] if isinstance(value, mx.Dtype) else str(value).lower() for _, value in template)
    return Signature(kinds, given, tuple(parameters), tuple(values), tuple(buffers))


def printed_parameters(text: str, name: str) -> tuple[str, ...]:
    """The parameters in the text that MLX prints for a kernel (verbose=True), without Metal's attributes."""
    text = text[text.index(f"custom_kernel_{name}") :]
    text = text[text.index("(") + 1 : text.index(") {")]
    return tuple(re.sub(r"\s+", " ", re.sub(r"\[\[.*?\]\]", "", one)).strip() for one in text.split(",\n"))


def function(kernel: Kernel, sign: Signature, rewrite) -> str:
    """The kernel as a C++ function template; `rewrite` changes header and body."""
    head = f"template <{sign.template}>\n" if sign.template else ""
    return (
        f"{rewrite(kernel.header)}\n{head}void custom_kernel_{kernel.name}(\n  "
        + ",\n  ".join(sign.parameters)
        + f'\n) {{\n#line 1 "{kernel.name}.metal"\n{rewrite(kernel.source)}\n}}\n'
    )


def emulated(kernel: Kernel, sign: Signature, counting: bool, fused: bool = False) -> str:
    """The whole C++ file: kernel and driver. counting: reads of device memory go through emu::counted; fused: products
    go into sums, see msl_fused.h.
    """
    name = f"custom_kernel_{kernel.name}" + (f"<{sign.arguments}>" if sign.template else "")
    text = function(kernel, sign, _allocated) + f"#define EMU_CALL {name}({', '.join(sign.values)});\n"
    if counting:
        text = re.sub(
            r"\(const device (\w+)\*\)buf\[(\d+)\]", r"emu::counted<\1>((const \1*)buf[\2], L.tally + \2)", text
        )
        text = DEVICE_READ.sub(r"emu::counted<\1>", text)
    headers = '#include "msl_emu.h"\n' + '#include "msl_fused.h"\n' * fused
    return f'{headers}{text}#include "msl_driver.h"\n'


def checked(kernel: Kernel, sign: Signature) -> str:
    """A file for clang, with its instantiation."""
    text = function(kernel, sign, lambda source: STORAGE.sub(lambda match: "static " + match.group(0), source))
    types = ", ".join(re.sub(r" \w+$", "", parameter) for parameter in sign.parameters)
    made = f"template void custom_kernel_{kernel.name}<{sign.arguments}>({types});\n" if sign.template else ""
    return f'#include "msl_check.h"\n{text}{made}'


def _allocated(source: str) -> str:
    """threadgroup float a[4][8], b;  ->  auto& a = emu::tg_alloc<float[4][8], 1>(); ..."""
    count = 0

    def declared(match: re.Match) -> str:
        nonlocal count
        out = []
        for one in re.split(r",(?![^\[]*\])", match.group(2)):
            name, dims = re.match(r"\s*(\w+)\s*(.*)", one, re.S).groups()
            count += 1
            out.append(f"auto& {name} = emu::tg_alloc<{match.group(1)}{dims.strip()}, {count}>();")
        return " ".join(out)

    return STORAGE.sub(declared, source)

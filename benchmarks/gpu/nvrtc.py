"""Compiles what mx.fast.cuda_kernel would hand to NVRTC, without a GPU.

MLX looks for a compiled kernel in MLX_PTX_CACHE_DIR before it compiles one; of custom kernels it never puts one there
itself. `Compiler.store` does, so that a GPU's minutes go to running. Needs the wheels that `INSTALL` names in a folder.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

ARCHITECTURE = "sm_90a"  # H100, H200
INSTALL = "pip install --target FOLDER --no-deps mlx==0.32.4 mlx-cuda-13==0.32.4 nvidia-cuda-nvrtc nvidia-cuda-runtime"
TYPES = {
    mx.bool_: "bool", mx.int8: "int8_t", mx.int16: "int16_t", mx.int32: "int32_t", mx.int64: "int64_t",
    mx.uint8: "uint8_t", mx.uint16: "uint16_t", mx.uint32: "uint32_t", mx.uint64: "uint64_t",
    mx.float16: "__half", mx.bfloat16: "__nv_bfloat16", mx.float32: "float",
}  # fmt: skip
IN_NAMES = {mx.float16: "float16_t", mx.bfloat16: "bfloat16_t"}
CARRIED = {  # header that MLX hands over from memory -> a line by which it is known in libmlx.so
    "mlx/backend/cuda/device/utils.cuh": b"using Shape = cuda::std::array<int32_t, MAX_NDIM>;",
    "mlx/backend/cuda/device/complex.cuh": b"#define LIBCUDACXX_ENABLE_SIMPLIFIED_COMPLEX_OPERATIONS",
    "mlx/backend/cuda/device/config.h": b"#define MAX_NDIM",
}
INCLUDES = '\n#include "mlx/backend/cuda/device/utils.cuh"\n\n#include <cooperative_groups.h>\n\n'
HASH_SEED = 0xC70F6907  # of libstdc++'s std::hash


class Compiler:
    """NVRTC of the folder that fake_gpu.py loads; of MLX it needs the headers and the library's file."""

    def __init__(self, site: Path, architecture: str = ARCHITECTURE):
        folder = site / "nvidia/cu13/lib"
        found = [*folder.glob("libnvrtc-builtins.so.*"), *folder.glob("libnvrtc.so.*")]  # it asks for the first by name
        *_, self.library = (ctypes.CDLL(str(each), ctypes.RTLD_GLOBAL) for each in found)
        self.library.nvrtcGetErrorString.restype = ctypes.c_char_p
        texts = re.findall(rb"// Copyright[^\0]+", (site / "mlx/lib/libmlx.so").read_bytes())
        self.headers = {name: next(text for text in texts if mark in text) for name, mark in CARRIED.items()}
        folders = (site / "mlx/include", site / "mlx/include/cccl", site / "nvidia/cu13/include")
        self.options = [
            f"--gpu-architecture={architecture}", "--ptxas-options=-v", "--device-as-default-execution-space",
            *(f"--include-path={folder}" for folder in folders),
        ]  # fmt: skip

    def store(self, function: str, text: str, folder: Path) -> str | None:
        """Compiles a text and stores it where MLX looks. Returns ptxas's figures; None where it lies there already.
        Raises RuntimeError with the compiler's log.
        """
        path = folder / f"{_module(function, text)}.ptx"
        if path.exists():
            return None
        code, symbol, log = self.compile(f"mlx::core::cu::{function}", text)
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(code)
        path.with_suffix(".txt").write_text(f"mlx::core::cu::{function}\t{symbol}\n", encoding="utf-8")
        return figures(log)

    def compile(self, function: str, text: str) -> tuple[bytes, str, str]:
        """Returns machine code, the symbol of the function in it, and the log. Raises RuntimeError with the log."""
        program, count = ctypes.c_void_p(), len(self.headers)
        headers = (ctypes.c_char_p * count)(*self.headers.values())
        names = (ctypes.c_char_p * count)(*(name.encode() for name in self.headers))
        self._call("CreateProgram", ctypes.byref(program), text.encode(), b"kernel.cu", count, headers, names)
        try:
            self._call("AddNameExpression", program, function.encode())
            options = (ctypes.c_char_p * len(self.options))(*(option.encode() for option in self.options))
            failed = self.library.nvrtcCompileProgram(program, len(self.options), options)
            log = self._bytes("ProgramLog", program).decode(errors="replace").strip("\0\n ")
            if failed:
                raise RuntimeError(f"{function} does not compile:\n{log}")
            symbol = ctypes.c_char_p()
            self._call("GetLoweredName", program, function.encode(), ctypes.byref(symbol))
            return self._bytes("CUBIN", program), symbol.value.decode(), log
        finally:
            self._call("DestroyProgram", ctypes.byref(program))

    def _bytes(self, what: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"Get{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(f"Get{what}", program, buffer)
        return buffer.raw

    def _call(self, name: str, *arguments: Any) -> None:
        if code := self.library[f"nvrtc{name}"](*arguments):
            raise RuntimeError(f"nvrtc{name}: {self.library.nvrtcGetErrorString(code).decode()}")


def usable(site: Path) -> bool:
    """Returns whether a folder holds the wheels."""
    return (site / "mlx/lib/libmlx.so").is_file() and any((site / "nvidia/cu13/lib").glob("libnvrtc.so.*"))


def unit(made: dict[str, Any], launch: dict[str, Any]) -> tuple[str, str]:
    """Returns the function's name and the text that MLX 0.32.4 builds for a launch.

    made: the arguments of mx.fast.cuda_kernel; launch: of the call.
    """
    template = launch.get("template", [])
    function = f"custom_kernel_{made['name']}" + "".join(f"_{_in_name(value)}" for _, value in template)
    parameters = []
    for name, array in zip(made["input_names"], launch["inputs"], strict=True):
        parameters.append(f"const {TYPES[array.dtype]}* {name}")
        for part, kind in (("shape", "Shape"), ("strides", "Strides"), ("ndim", "int")):
            if array.ndim and f"{name}_{part}" in made["source"]:
                parameters.append(f"const __grid_constant__ {kind} {name}_{part}")
    for name, dtype in zip(made["output_names"], launch["output_dtypes"], strict=True):
        parameters.append(f"{TYPES[dtype]}* {name}")
    constants = "".join(f"  {_constant(name, value)};\n" for name, value in template) + ("\n" if template else "")
    head = f"__global__ void {function}(\n    " + ",\n    ".join(parameters) + ") {\n"
    return function, (
        f"{INCLUDES}{made['header']}namespace mlx::core::cu {{\n\nnamespace cg = cooperative_groups;\n\n"
        f"{head}{constants}{made['source']}\n}}\n\n}} // namespace mlx::core::cu\n"
    )


def together(units: Sequence[tuple[str, str]], header: str) -> str:
    """Returns one text of many (function, text) of `unit`, each in a namespace of its own: what all begin with, the
    includes and `header`, is most of a compilation, and is read once.
    """
    first, parts = INCLUDES + header, []
    for number, (_, text) in enumerate(units):
        if not text.startswith(first):
            raise ValueError(f"unit {number} does not begin with the header")
        parts.append(f"namespace unit_{number} {{\nusing namespace mlx::core::cu;\n{text[len(first) :]}}}\n")
    return first + "".join(parts)


def entries(log: str) -> list[str]:
    """Returns the functions that ptxas compiled."""
    return re.findall(r"Compiling entry function '(\w+)'", log)


def figures(log: str) -> str:
    """Returns what ptxas says of a kernel: registers, stack, shared memory, spills."""
    found = [re.search(pattern, log) for pattern in (r"\d+ registers", r"\d+ bytes stack", r"\d+ bytes smem")]
    spilled = [f"spills {size} bytes" for size in re.findall(r"(\d+) bytes spill", log) if size != "0"]
    return ", ".join([one.group() for one in found if one] + spilled)


def _module(function: str, text: str) -> str:
    """Returns MLX's name for a compiled text: the function's, and std::hash of the text."""
    hashed = ctypes.CDLL("libstdc++.so.6")._ZSt11_Hash_bytesPKvmm
    hashed.restype, hashed.argtypes = ctypes.c_size_t, (ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t)
    return f"{function}_{hashed(text.encode(), len(text.encode()), HASH_SEED):x}"


def _in_name(value: mx.Dtype | int | bool) -> str:
    if isinstance(value, bool):
        return "t" if value else "f"
    return str(value) if isinstance(value, int) else IN_NAMES.get(value, TYPES[value])


def _constant(name: str, value: mx.Dtype | int | bool) -> str:
    if isinstance(value, bool):
        return f"constexpr bool {name} = {str(value).lower()}"
    return f"constexpr int {name} = {value}" if isinstance(value, int) else f"using {name} = {TYPES[value]}"

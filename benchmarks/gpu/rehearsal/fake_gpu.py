"""MLX's CUDA build on a machine without a GPU: everything happens but the kernels.

`load(SITE)` before anything imports mlx. SITE holds `mlx` (the wheels mlx and mlx-cuda-13) and `nvidia` (the wheels
that these ask for). Which kernel MLX chooses, which operation has none, what NVRTC says of a text: all real. Results
are zeros, small ones anything. Jumps are written over the CUDA runtime inside libmlx.so, in this process alone. Linux
on x86-64, with gcc and nm.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).resolve().with_name("fake_gpu.c")
PAGE = os.sysconf("SC_PAGE_SIZE")
STAND_INS = {  # function of fake_gpu.c -> of the runtime, without "cuda"
    "allocate": "Malloc MallocManaged MallocHost MallocAsync",
    "release": "Free FreeHost FreeAsync",
    "copy": "Memcpy MemcpyAsync",
    "fill": "Memset MemsetAsync",
    "one": "GetDeviceCount OccupancyMaxActiveBlocksPerMultiprocessor"
    " OccupancyMaxActiveBlocksPerMultiprocessorWithFlags",
    "zero": "GetDevice",
    "attribute": "DeviceGetAttribute",
    "memory": "MemGetInfo",
    "pool": "MemPoolGetAttribute",
    "host": "LaunchHostFunc",
    "second_object": "StreamEndCapture",
    "no_nodes": "GraphGetNodes",
    "updated": "GraphExecUpdate",
    "function_facts": "FuncGetAttributes",
    "properties": "GetDeviceProperties",
    "text": "GetErrorString GetErrorName",
    "entry_point": "GetDriverEntryPoint",
    "entry_point_of": "GetDriverEntryPointByVersion",
    "object_out": "StreamCreateWithFlags EventCreateWithFlags DeviceGetDefaultMemPool GraphCreate GraphInstantiate"
    " GraphAddKernelNode GraphAddEmptyNode GraphAddChildGraphNode",
}


def load(site: Path, symbols: Path | None = None, compiles: bool = True) -> None:
    """Makes `import mlx.core` find the CUDA build in `site`, with a fake below it.

    compiles: whether NVRTC takes the texts; without it seconds tell which operations there are. symbols: the wheel's
    own libmlx.so, where the one in `site` is stripped. Raises LookupError where that has none.
    """
    library = site / "mlx/lib/libmlx.so"
    for builtins in (site / "nvidia/cu13/lib").glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
    fake = ctypes.CDLL(str(_compiled(compiles)), ctypes.RTLD_GLOBAL)  # first: libmlx.so finds cuBLASLt's names in it
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    base = _base(library)
    chosen = {f"cuda{name}": stand_in for stand_in, names in STAND_INS.items() for name in names.split()}
    for address, name in _runtime(symbols or library):
        stand_in = fake[chosen.get(name, "nothing")]
        _jump(base + address, ctypes.cast(stand_in, ctypes.c_void_p).value)
    sys.path.insert(0, str(site))


def _compiled(compiles: bool) -> Path:
    folder = Path(tempfile.mkdtemp())
    library = folder / "libcuda.so.1"
    without = [] if compiles else ["-DWITHOUT_NVRTC"]
    flags = ["-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", *without]
    subprocess.run(["gcc", *flags, "-o", library, SOURCE], check=True)
    return library


def _base(library: Path) -> int:
    """Returns the address at which a library is mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return min(int(line.partition("-")[0], 16) for line in lines if line.endswith(str(library)))


def _runtime(library: Path) -> list[tuple[int, str]]:
    """Returns address and name of the runtime's functions in a library."""
    symbols = subprocess.run(["nm", library], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^([0-9a-f]+) [tT] (cuda[A-Z]\w*)$", symbols, re.M)
    if not found:
        raise LookupError(f"{library} has no symbols; expected the wheel's own libmlx.so, not stripped")
    return [(int(address, 16), name) for address, name in found]


def _jump(address: int, target: int) -> None:
    """Writes `mov rax, target; jmp rax` at an address."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address - address % PAGE), ctypes.c_size_t(2 * PAGE), 7):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    ctypes.memmove(address, b"\x48\xb8" + target.to_bytes(8, "little") + b"\xff\xe0", 12)

"""How long passes and rounds of Gemma 4 26B-A4B last on Apple Silicon, PREDICTED: the model behind moe_cost.py.

A pass of the target over some rows (tokens) is taken to last

    a fixed time (launches, small kernels, the host)
    + dense matrices: the larger of bytes / bandwidth and instructions / rate
    + routed experts: likewise, by how they are read (EXPERTS)
    + K/V bytes / bandwidth

and a round of K drafts: K draft steps, one pass over K + 1 tokens a row, one exchange with the host. Parameters are
counted from configs. How many rows MLX's kernels take and what they read again is from its source
(mlx/backend/metal/quantized.cpp and matmul.cpp, 0.32). No assumption here was measured by this project.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mlx_gemma_mtp.models.config import DrafterConfig, TargetConfig

LONGEST = 7  # drafts a round

SUSTAINED = 0.85  # share of the nominal bandwidth
ISSUED = {True: 0.60, False: 0.40}  # of the float32 rate; False: M1 and M2, which load issue limits (MLX's source)
MATRIX, ACCELERATED = 0.65, 3.5  # of the float32 rate in matrix tiles; factor of M5's neural accelerators
QMV_OPS = 3.0  # instructions for a weight and a row in gather_qmv and qmv
WIDE_ROWS, TILE_ROWS, RUN_ROWS = 5, 32, 8  # rows a pass of qmv_wide, of a qmm tile, of a grouped kernel
OWN_TILE_ROWS, OWN_TILE_COST = 16, 1.25  # a dense kernel for 6 to 32 rows, if there were one


@dataclass(frozen=True)
class Chip:
    """bandwidth: nominal GB/s of the largest configuration; tflops: float32; generation: of the GPU, as MLX counts."""

    bandwidth: float
    tflops: float
    generation: int

    @property
    def bytes_per_s(self) -> float:
        return self.bandwidth * 1e9 * SUSTAINED

    @property
    def instructions_per_s(self) -> float:
        """Multiply-adds, two operations each."""
        return self.tflops * 1e12 / 2 * ISSUED[self.generation >= 15]

    def matrix_per_s(self, accelerated: bool) -> float:
        return self.tflops * 1e12 / 2 * MATRIX * (ACCELERATED if accelerated and self.generation >= 17 else 1.0)


# Bandwidth: as Apple announces it; M1: LPDDR4X-4266 on 128 bits, as teardowns say. Float32 rate: 128 units a core x 2 x
# clock; Apple's own figure up to M2, from reported clocks after it.
CHIPS = {
    "M1": Chip(68, 2.6, 13),
    "M1 Pro": Chip(200, 5.2, 13),
    "M1 Max": Chip(400, 10.4, 13),
    "M1 Ultra": Chip(800, 20.8, 13),
    "M2": Chip(100, 3.6, 14),
    "M2 Pro": Chip(200, 6.8, 14),
    "M2 Max": Chip(400, 13.5, 14),
    "M2 Ultra": Chip(800, 27.0, 14),
    "M3": Chip(100, 3.6, 15),
    "M3 Pro": Chip(150, 6.4, 15),
    "M3 Max": Chip(400, 14.2, 15),
    "M3 Ultra": Chip(819, 28.4, 15),
    "M4": Chip(120, 4.3, 16),
    "M4 Pro": Chip(273, 8.6, 16),
    "M4 Max": Chip(546, 17.2, 16),
    "M5": Chip(153.6, 4.6, 17),
    "M5 Pro": Chip(307, 9.2, 17),
    "M5 Max": Chip(614, 18.4, 17),
}


def bytes_per_weight(bits: int, group: int, group_bits: int) -> float:
    """Of a quantised matrix: codes, and for each group of weights its scale (and bias)."""
    return (bits + group_bits / group) / 8


FORMATS = {
    "bf16": 2.0,
    "8bit": bytes_per_weight(8, 64, 32),
    "5bit": bytes_per_weight(5, 64, 32),
    "4bit": bytes_per_weight(4, 64, 32),
    "nvfp4": bytes_per_weight(4, 16, 8),
}
EXPERTS = {
    "pairs": "MLX's gather_qmv: a weight matrix is read for every pair of a token and an expert",
    "cached": "the same, pairs sorted, and a cache that catches every repeat: bytes of the distinct experts",
    "grouped": "each distinct expert is read and decoded once a run of 8 rows",
}


@dataclass(frozen=True)
class Shape:
    """Parameters of a target and its drafter.

    dense: of all matrices that every token reads, in three parts that MLX treats differently: 'middle' has both sides
    up to 4,096, 'large' one above, 'head' is the vocabulary's. slot: one expert in every layer.
    """

    target: TargetConfig
    drafter: DrafterConfig
    dense: dict[str, int]
    slot: int
    draft_body: int

    @classmethod
    def of(cls, target: TargetConfig, drafter: DrafterConfig) -> Shape:
        hidden, small, moe = target.hidden_size, drafter.hidden_size, target.moe
        dense = {"middle": 0, "large": 0, "head": hidden * target.vocab_size}
        for layer in target.layers:
            query, key = layer.heads * layer.kv.head_dim, layer.kv.kv_heads * layer.kv.head_dim
            keys = [key] * (1 if layer.v_is_k else 2)
            for side in (query, query, *keys, *[layer.mlp_size] * 3, moe.num_experts):
                dense["large" if max(side, hidden) > 4096 else "middle"] += side * hidden
        queries = sum(2 * small * layer.heads * layer.kv.head_dim for layer in drafter.layers)  # and outputs; no K/V
        body = queries + sum(3 * small * layer.mlp_size for layer in drafter.layers)
        between = 2 * hidden * small + small * hidden  # [embedding, hidden state] -> drafter, and back
        return cls(target, drafter, dense, 3 * hidden * moe.size * len(target.layers), body + between)

    @property
    def total(self) -> int:
        return sum(self.dense.values()) + self.target.moe.num_experts * self.slot

    @property
    def active(self) -> int:
        """What one token reads."""
        return sum(self.dense.values()) + self.target.moe.top_k * self.slot


@dataclass(frozen=True)
class Setup:
    """A way to run a pair. fixed, draft_fixed, sync: seconds of a pass, a draft step, an exchange with the host.

    target, drafter: formats; head_rows: of the drafter's vocabulary head, None for all; experts: of EXPERTS;
    dense_tile: dense matrices of 6 to 32 rows in a kernel of 16-row tiles; context: tokens.
    """

    target: str = "4bit"
    drafter: str = "bf16"
    head_rows: int | None = None
    experts: str = "pairs"
    fixed: float = 8.5e-3
    draft_fixed: float = 1.0e-3
    sync: float = 0.6e-3
    dense_tile: bool = False
    context: int = 512


STOCK = Setup()
LIGHT = replace(STOCK, drafter="4bit", head_rows=32768)
STACK = {
    "stock: bf16 drafter, pairs": STOCK,
    "+ 4-bit drafter": replace(STOCK, drafter="4bit"),
    "+ 32k draft vocabulary": LIGHT,
    "+ sorted pairs, if a cache catches repeats": replace(LIGHT, experts="cached"),
    "+ grouped expert kernel": replace(LIGHT, experts="grouped"),
    "+ half the fixed time": replace(LIGHT, experts="grouped", fixed=4.5e-3, draft_fixed=0.6e-3, sync=0.2e-3),
}
# Chance that a draft is accepted, given that those before it were.
ACCEPTANCE = {"general": (0.80, 0.70, 0.66, 0.64, 0.62, 0.6, 0.6), "code": (0.90, 0.86, 0.84, 0.82, 0.80, 0.8, 0.8)}


def emitted(acceptance: Sequence[float], drafts: int) -> float:
    """Tokens a round: the drafts kept, and one."""
    return 1 + sum(math.prod(acceptance[: i + 1]) for i in range(drafts))


def wide_ops(rows: float) -> float:
    """Instructions for a weight and a row where `rows` rows share a decoded weight (qmv_wide)."""
    return (3.0 + 1.5 * rows) / rows if rows > 1 else QMV_OPS


def qmm_from(name: str, part: str) -> int:
    """Rows from which MLX leaves qmv and qmv_wide for 32-row tiles (get_qmv_batch_limit)."""
    middle, generation = part == "middle", CHIPS[name].generation
    if name.endswith("Ultra"):
        return 18 if middle else 12
    if generation >= 17:
        return 25 if middle else 13
    return (15 if middle else 13) if generation >= 15 else (10 if middle else 6)


def _kv_read(target: TargetConfig, context: int) -> int:
    """Bytes of bf16 keys and values that one token of one row attends to."""
    seen = ((min(context, spec.window or context), spec) for spec in target.kv)
    return sum(2 * 2 * positions * spec.kv_heads * spec.head_dim for positions, spec in seen)


@dataclass(frozen=True)
class Model:
    """The cost model. run(M): distinct experts, a layer, of M consecutive tokens of one row."""

    shape: Shape
    run: Callable[[int], float]

    def distinct(self, tokens: int, rows: int) -> float:
        """Of several rows, taken as independent."""
        count = self.shape.target.moe.num_experts
        return count * (1 - (1 - self.run(tokens) / count) ** rows)

    def forward(self, name: str, setup: Setup, tokens: int, rows: int = 1) -> float:
        """Seconds of a pass of the target."""
        chip, width = CHIPS[name], tokens * rows
        dense = sum(_dense(name, setup, part, weights, width) for part, weights in self.shape.dense.items())
        kv = rows * _kv_read(self.shape.target, setup.context) / chip.bytes_per_s
        return setup.fixed + dense + self._experts(chip, setup, tokens, rows) + kv

    def _experts(self, chip: Chip, setup: Setup, tokens: int, rows: int) -> float:
        pairs, distinct = self.shape.target.moe.top_k * tokens * rows, self.distinct(tokens, rows)
        run = min(pairs / distinct, RUN_ROWS)
        ops = (2.0 + run) / run if setup.experts == "grouped" else QMV_OPS
        reads = pairs if setup.experts == "pairs" else distinct
        seconds = reads * self.shape.slot * FORMATS[setup.target] / chip.bytes_per_s
        return max(seconds, pairs * self.shape.slot * ops / chip.instructions_per_s)

    def draft(self, name: str, setup: Setup, rows: int = 1) -> float:
        """Seconds of one draft step."""
        chip, drafter = CHIPS[name], self.shape.drafter
        head = drafter.vocab_size if setup.head_rows is None else setup.head_rows
        weights = self.shape.draft_body + head * drafter.hidden_size
        compute = weights * rows * wide_ops(min(rows, WIDE_ROWS)) / chip.instructions_per_s
        return setup.draft_fixed + max(weights * FORMATS[setup.drafter] / chip.bytes_per_s, compute)

    def round(self, name: str, setup: Setup, drafts: int, rows: int = 1) -> float:
        """Seconds of one round; a step of plain decoding where drafts is 0."""
        if not drafts:
            return self.forward(name, setup, 1, rows)
        return self.forward(name, setup, drafts + 1, rows) + drafts * self.draft(name, setup, rows) + setup.sync

    def best(self, name: str, setup: Setup, acceptance: Sequence[float], rows: int = 1) -> tuple[float, int, float]:
        """(speedup over plain decoding of the same setup, the draft length that gives it, tokens/s of all rows)."""
        plain = self.forward(name, setup, 1, rows)
        return max(
            (n * plain / seconds, drafts, rows * n / seconds)
            for drafts in range(LONGEST + 1)
            for n, seconds in [(emitted(acceptance, drafts), self.round(name, setup, drafts, rows))]
        )

    def limit(self, acceptance: float, setup: Setup) -> tuple[float, int]:
        """The most that bytes alone allow on any chip, one row: (speedup, draft length)."""
        draft = (self.shape.draft_body + setup.head_rows * self.shape.drafter.hidden_size) * FORMATS[setup.drafter]
        dense, weight = sum(self.shape.dense.values()), FORMATS[setup.target]
        return max(
            (emitted([acceptance] * k, k) * self.shape.active * weight / (read * weight + k * draft), k)
            for k in range(1, LONGEST + 1)
            for read in [dense + self.shape.slot * self.run(k + 1)]
        )


def _dense(name: str, setup: Setup, part: str, weights: int, rows: int) -> float:
    """Seconds of a part of the dense matrices, with MLX's choice of kernel."""
    chip, size = CHIPS[name], weights * FORMATS[setup.target]
    once, passes = size / chip.bytes_per_s, -(-rows // WIDE_ROWS)
    padded = weights * TILE_ROWS * -(-rows // TILE_ROWS)
    tiled = max(once, padded / chip.matrix_per_s(accelerated=part == "head"))  # elsewhere split-K, without accelerators
    if setup.target == "bf16":
        wide = rows == 1 or (chip.generation >= 15 and rows <= 15)
        seconds = max(once * passes, weights * rows * 2.0 / chip.instructions_per_s) if wide else tiled
    elif rows >= qmm_from(name, part):
        seconds = tiled
    elif chip.generation >= 15 or setup.target == "nvfp4":
        seconds = max(once * passes, weights * rows * wide_ops(-(-rows // passes)) / chip.instructions_per_s)
    else:  # affine qmv on M1 and M2: a threadgroup a row, a cache shares the read
        seconds = max(once, weights * rows * QMV_OPS / chip.instructions_per_s)
    if setup.dense_tile and rows >= 6:
        padded = weights * OWN_TILE_ROWS * -(-rows // OWN_TILE_ROWS)
        seconds = min(seconds, max(once, OWN_TILE_COST * padded / chip.matrix_per_s(accelerated=True)))
    return seconds

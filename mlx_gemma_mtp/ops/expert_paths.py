"""Which path computes the routed experts, and which every other product with weights: one table, by chip, dtype,
quantisation and number of pairs or of rows.

PAIRS reads an expert's weights once for each (token, expert) pair. SORTED orders the pairs by expert first: MLX then
reads each expert of floats once a tile of rows; of quantised weights it leaves repeats to the cache, and reads tiles in
prefill alone. GROUPED is our kernels: each expert is read once for 8 rows. TILED does that in plain MLX, for floats:
pairs of an expert fill matrices of 8 rows, so that a BLAS packs the expert once for them.

A verify must give a row the bits that a pass of one token gives it. So up to VERIFY pairs a rule may change path with
the number of pairs only among paths found bit-equal on its chip. More pairs come in prefill chunks alone, which do not
depend on drafts.

Products: STOCK is MLX's own, which on a GPU takes another kernel, with other bits, at another number of rows. FEW_ROWS
is our kernel: a row has the same bits in any company, those of MLX's product of it alone, and weights are read once for
16 rows. It is taken where it was measured to be faster, and, up to ROWS rows, by a model that is to be `row_invariant`.
Which is faster hangs on the matrix's size, for MLX changes kernels by it; see SIDES.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

import mlx.core as mx

ROWS = 128  # tokens of the widest verify: 8 requests of 16
VERIFY = 8 * ROWS  # pairs, of 8 experts


class ExpertPath(StrEnum):
    PAIRS = "pairs"
    SORTED = "sorted"
    GROUPED = "grouped"
    TILED = "tiled"


# The larger of a product's inputs and outputs, up to which one measured rule holds; 0: any. By its source, MLX on Metal
# computes a quantised matrix in tiles of 32 rows from a number of rows on that depends on whether both are at most
# 2048, at most 4096, or beyond: 14, 10 and 6 on M1 and M2; 13, 15 and 13 on M3 and M4; 33, 25 and 13 on M5; 32, 18 and
# 12 on an Ultra. Fewer rows read it once each, from M3 on once for five. So what few rows cost changes there. A head,
# beyond every layer's matrix, is most of a small model's bytes.
SIDES = (2048, 4096, 65536, 0)


class ProductPath(StrEnum):
    STOCK = "stock"
    FEW_ROWS = "few rows"


Path = ExpertPath | ProductPath


@dataclass(frozen=True)
class Rule:
    """Which path computes how many pairs, or a product of how many rows, for some chips, dtypes and formats of weights;
    "" stands for every one.

    chip: what the device's name begins with (see device.name). weights: the `form` of the linears, such as float or
    affine4. side: the larger of a product's inputs and outputs is at most that, 0 for any. steps: (number of pairs or
    rows from which on, path), ascending from 1. equal: the paths among which a verify may change with that number. They
    must give a row the same bits; only where no product of the device does so at two widths, the dense ones included,
    may others be named. Raises ValueError where steps change among other paths.
    """

    chip: str
    dtype: str
    weights: str
    steps: tuple[tuple[int, Path], ...]
    equal: frozenset[Path] = frozenset()
    side: int = 0

    def __post_init__(self):
        starts = [start for start, _ in self.steps]
        if starts[:1] != [1] or starts != sorted(set(starts)):
            raise ValueError(f"steps begin at {starts}; expected ascending numbers of pairs from 1")
        used = {path for start, path in self.steps if start <= VERIFY}
        if len(used) > 1 and not used <= self.equal:
            raise ValueError(f"{self.chip or 'any chip'}: {sorted(used)} alternate but are not known to be bit-equal")

    def __str__(self) -> str:
        """The rule as a line, in which all that decides is told."""
        steps = ", ".join(f"{start} {path}" for start, path in self.steps)
        side = f" to {self.side}" if self.side else ""
        return f"{self.chip or 'any chip'}, {self.dtype or 'any dtype'}, {self.weights or 'any weights'}{side}: {steps}"

    def covers(self, chip: str, dtype: str, weights: str, side: int = 0) -> bool:
        fits = self.side == 0 or 0 < side <= self.side
        return chip.startswith(self.chip) and self.dtype in ("", dtype) and self.weights in ("", weights) and fits

    @property
    def needs_kernels(self) -> bool:
        return any(path in (ExpertPath.GROUPED, ProductPath.FEW_ROWS) for _, path in self.steps)

    @property
    def kind(self) -> type[Path]:
        """Whose paths these are."""
        return type(self.steps[0][1])

    def path(self, number: int) -> Path:
        return next(path for start, path in reversed(self.steps) if start <= number)

    def paths(self, most: int) -> list[str]:
        """Returns the paths up to `most` pairs or rows, those of few first."""
        return [str(path) for start, path in self.steps if start <= most]


ON_METAL = (ExpertPath.PAIRS, ExpertPath.SORTED, ExpertPath.GROUPED)  # among which the doctor chooses
STOCK = ((1, ExpertPath.PAIRS), (64, ExpertPath.SORTED))  # mlx-lm's
EQUAL = frozenset((ExpertPath.PAIRS, ExpertPath.SORTED))
# With a fast BLAS on a CPU a row has other bits in another width in every product, dense ones first, so that there the
# law has nothing to keep; with MLX's own BLAS tiles are bit-equal, too, but cost what they have rows.
# The first rule that covers a case decides; one with GROUPED counts only where the kernels run. The rules for chips
# other than the CPU are by MLX's source, not measured: pairs of quantised weights go through one kernel, in any order.
RULES = (
    Rule("cpu, fast BLAS", "", "float", ((1, ExpertPath.PAIRS), (96, ExpertPath.TILED)), EQUAL | {ExpertPath.TILED}),
    Rule("cpu", "", "", STOCK, EQUAL),
    Rule("", "", "", ((1, ExpertPath.GROUPED), (VERIFY + 1, ExpertPath.SORTED))),
    Rule("", "", "float", ((1, ExpertPath.SORTED),)),
    Rule("", "", "", STOCK, EQUAL),
    Rule("", "", "", ((1, ProductPath.STOCK),)),  # nothing faster was measured
)
# MLX's product has no bits of its own to keep, so that a measured rule may change to it, and to FEW_ROWS, anywhere.
ANY_PRODUCT = frozenset(ProductPath)
INVARIANT = Rule("", "", "", ((1, ProductPath.FEW_ROWS), (ROWS + 1, ProductPath.STOCK)), ANY_PRODUCT)


_measured: tuple[Rule, ...] = ()


def adopt(rules: tuple[Rule, ...]) -> None:
    """Puts these rules, which were measured on this machine, before RULES from now on; () forgets them. Compiled graphs
    keep the paths that they were traced with, so a load adopts before its model runs.
    """
    global _measured
    _measured = rules
    choose.cache_clear()


def measured() -> tuple[Rule, ...]:
    """Returns the rules that were adopted last."""
    return _measured


@lru_cache(maxsize=4096)
def choose(chip: str, dtype: mx.Dtype, weights: str, pairs: int, grouped: bool) -> ExpertPath:
    """Returns the path of `pairs` pairs. grouped: whether our kernels run for this format of weights."""
    return _rule(ExpertPath, chip, dtype, weights, grouped).path(pairs)


def product_rule(chip: str, dtype: mx.Dtype, weights: str, side: int, few_rows: bool, invariant: bool) -> Rule:
    """Returns the rule of a matrix's products. side: the larger of its inputs and outputs. few_rows: whether our kernel
    runs for this format of weights. invariant: whether a row's bits must not depend on how many there are.
    """
    return INVARIANT if invariant and few_rows else _rule(ProductPath, chip, dtype, weights, few_rows, side)


def _rule(kind: type[Path], chip: str, dtype: mx.Dtype, weights: str, kernels: bool, side: int = 0) -> Rule:
    """The first that covers the case and that can be followed with our kernels, or without."""
    name = str(dtype).removeprefix("mlx.core.")
    fit = (rule for rule in (*_measured, *RULES) if rule.kind is kind and rule.covers(chip, name, weights, side))
    return next(rule for rule in fit if kernels or not rule.needs_kernels)

"""Which bits each tensor gets, how its rows are quantised, and how config.json records it (mlx-lm's convention)."""

import re
from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.models.quantization import MODES as MLX_MODES
from mlx_gemma_mtp.models.quantization import Format as Stored

from .names import Entry

GROUP_SIZES, AFFINE_BITS = MLX_MODES["affine"]


@dataclass(frozen=True)
class Format(Stored):
    """MLX quantisation that is also computed.

    on_q4_0: affine codes are put on the grid of llama.cpp's Q4_0 in the groups that it fits at least as well.
    """

    on_q4_0: bool = False

    def __str__(self) -> str:
        return super().__str__()

    def quantize(self, block: mx.array) -> tuple[mx.array, ...]:
        """Quantises rows, [rows, columns]; returns the arrays of `parts` for them. Rows do not depend on each other."""
        parts = mx.quantize(block, **self.setting)
        return _closer(block, tuple(parts), _q4_0(block), self) if self.on_q4_0 else tuple(parts)

    def tolerance(self, largest: mx.array) -> mx.array:
        """Returns how far rounding may move a weight in a group whose largest magnitude is given.

        Affine: at most a step (the smaller end may be clipped), and scale and bias rounded to bfloat16. FP4 and FP8
        clip or round by a share of the largest; nvfp4's smallest scale is 2 ** -9, which moves small groups by 3 of it.
        """
        if self.biased:
            return largest * (2.02 / (2**self.bits - 1) + 3 / 256)
        return largest / (4 if self.bits == 4 else 8) + (6 * 2**-10 if self.mode == "nvfp4" else 0)

    def dequantize(self, weight: mx.array, scales: mx.array, biases: mx.array | None = None) -> mx.array:
        """Returns the float32 values that the arrays of `parts` stand for, exactly."""
        if biases is None:
            return mx.dequantize(weight, scales, **self.setting, dtype=mx.float32)
        return mx.dequantize(weight, scales.astype(mx.float32), biases.astype(mx.float32), **self.setting)


def _q4_0(block: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Q4_0 as affine codes: d = (the value of largest magnitude) / -8, w = d (code - 8), code in 0..15.

    Source: quantize_row_q4_0_ref in llama.cpp's ggml-quants.c. -8 d has the digits of d, so scale and bias are exact.
    """
    groups = block.reshape(block.shape[0], -1, 32)
    extreme = mx.take_along_axis(groups, mx.argmax(mx.abs(groups), axis=-1, keepdims=True), axis=-1)
    scales = (extreme / -8).astype(mx.float32)
    steps = groups.astype(mx.float32) / mx.where(scales == 0, 1, scales)
    codes = mx.clip(mx.floor(steps + 8.5), 0, 15).astype(mx.uint32).reshape(block.shape[0], -1, 8)
    packed = mx.sum(codes << (4 * mx.arange(8, dtype=mx.uint32)), axis=-1)
    scales = scales.squeeze(-1).astype(block.dtype)
    return packed, scales, scales * -8


def _closer(block: mx.array, ours: tuple, other: tuple, form: Format) -> tuple[mx.array, ...]:
    """Group by group, `other` where its largest error is not above that of `ours`."""
    shape = (block.shape[0], -1, form.group_size)
    error, other_error = (
        mx.abs(form.dequantize(*parts) - block).reshape(shape).max(axis=-1, keepdims=True) for parts in (ours, other)
    )
    better = other_error <= error
    grouped = (*better.shape[:2], -1)
    return tuple(
        mx.where(better, its.reshape(grouped), mine.reshape(grouped)).reshape(mine.shape)
        for mine, its in zip(ours, other, strict=True)
    )


MODES = {mode: Format(*bits, *groups, mode) for mode, (groups, bits) in MLX_MODES.items() if mode != "affine"}
Q4_0 = Format(4, 32, on_q4_0=True)


@dataclass(frozen=True)
class Rule:
    """Matrices whose name matches `names` get affine `bits`, if the default format has at most `when_bits_up_to`.

    group_size None: the default's, or 64 where that is not affine; beside_experts: only in a mixture of experts.
    """

    names: str
    bits: int = 8
    group_size: int | None = None
    when_bits_up_to: int = 8
    beside_experts: bool = False

    def applies(self, entry: Entry, default: Format, moe: bool) -> bool:
        wanted = default.bits <= self.when_bits_up_to and (moe or not self.beside_experts)
        return wanted and re.search(self.names, entry.name) is not None

    def format(self, default: Format) -> Format:
        return Format(self.bits, self.group_size or (default.group_size if default.biased else 64))


# Every token passes the router, and the dense MLP beside experts: both as in the published mlx-community 26B.
ROUTER = Rule(r"\.router\.proj\.weight$", group_size=64)
DENSE_MLP = Rule(r"\.mlp\.", when_bits_up_to=4, beside_experts=True)
PER_LAYER_INPUTS = Rule(r"per_layer", when_bits_up_to=6)  # reports of garbage below 8 bits
DRAFT_HEAD = Rule(r"^model\.embed_tokens\.", bits=4)  # a drafter reads all of it for every token

# The first rule that applies decides; where none does, the default format.
RECIPES: dict[str, tuple[Rule, ...]] = {
    "default": (ROUTER, DENSE_MLP),
    "uniform": (ROUTER,),
    "ple-safe": (ROUTER, DENSE_MLP, PER_LAYER_INPUTS),
    "qat-q4_0": (ROUTER,),
    "drafter": (DRAFT_HEAD,),
}


@dataclass(frozen=True)
class Recipe:
    """The quantisation that the user asked for: a default format, and the name of the rules for exceptions.

    Without a name, the model's usual rules apply.
    """

    default: Format = Format(4, 64)
    name: str | None = None

    def rules(self, text: dict) -> tuple[Rule, ...]:
        usual = "ple-safe" if text["hidden_size_per_layer_input"] else "default"
        return RECIPES[self.name or usual]

    def choose_all(self, entries: list[Entry], text: dict) -> dict[str, Format | None]:
        """Returns tensor name -> format for the matrices that are quantised (linear, embedding and expert weights).

        Norms, scales and token_ordering have one axis and are not named: they stay as they are. So does a width that no
        group divides, and so do the centroids of a drafter: they pick its vocabulary and are small. With centroids, the
        drafter's recipe also leaves the table: a draft reads 64th parts of it, and mlx-vlm 0.7 reads it as floats only.
        """
        rules, moe = self.rules(text), text["enable_moe_block"]
        centroids = any(entry.name.startswith("masked_embedding.") for entry in entries)
        whole_table = centroids and self.name == "drafter"
        kept = ("masked_embedding.", "model.embed_tokens.") if whole_table else ("masked_embedding.",)
        chosen: dict[str, Format | None] = {}
        for entry in (e for e in entries if len(e.shape) >= 2):
            rule = next((rule for rule in rules if rule.applies(entry, self.default, moe)), None)
            form = rule.format(self.default) if rule else self.default
            fits = entry.shape[-1] % form.group_size == 0 and not entry.name.startswith(kept)
            chosen[entry.name] = form if fits else None
        return chosen


DRAFTER = Recipe(Format(8, 64), "drafter")


def recipe(mode: str | None, bits: int | None, group_size: int | None, name: str | None) -> Recipe:
    """Returns the recipe that the flags ask for; None stands for a flag that was not given.

    Raises UserError for a conflict.
    """
    if name == "qat-q4_0":
        _agree("--quant-predicate qat-q4_0", Q4_0, mode, bits, group_size)
        return Recipe(Q4_0, name)
    if mode in MODES:
        _agree(f"--q-mode {mode}", MODES[mode], mode, bits, group_size)
        return Recipe(MODES[mode], name)
    return Recipe(Format(bits or 4, group_size or 64), name)


def _agree(flag: str, form: Format, mode: str | None, bits: int | None, group_size: int | None) -> None:
    given = replace(form, mode=mode or form.mode, bits=bits or form.bits, group_size=group_size or form.group_size)
    if given != form:
        raise UserError(f"{flag} is {form}, but {given} was asked for; leave out the other --q flags")


def record(formats: dict[str, Format | None], default: Format) -> dict:
    """Returns config["quantization"]: the default, and an override for each path that differs from it.

    An override without a mode means affine to mlx-lm, and the default's mode to others: named unless both are affine.
    """
    quantization: dict = dict(default.setting)
    for name, chosen in formats.items():
        path = name.removesuffix(".weight")
        if chosen is None:
            quantization[path] = False
        elif chosen.setting != default.setting:
            quantization[path] = chosen.setting
            if default.biased and chosen.biased:
                quantization[path] = {"group_size": chosen.group_size, "bits": chosen.bits}
    return quantization

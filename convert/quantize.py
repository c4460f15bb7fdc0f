"""Which bits each tensor gets, and how config.json records it (mlx-lm's convention)."""

from dataclasses import dataclass

from .names import Entry


@dataclass(frozen=True)
class Affine:
    """MLX affine quantisation: `group_size` weights of a row share one scale and one bias."""

    bits: int
    group_size: int

    def packed_shapes(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """[..., columns] -> shape of the uint32 weight, shape of the scales and of the biases."""
        *rows, columns = shape
        return (*rows, columns * self.bits // 32), (*rows, columns // self.group_size)


ROUTER = Affine(8, 64)


def choose_all(entries: list[Entry], default: Affine, moe: bool) -> dict[str, Affine | None]:
    """tensor name -> format, for the matrices (linear, embedding, expert weights).

    Norms, scales and token_ordering have one axis and are not named: they stay as they are.
    """
    return {e.name: choose(e, default, moe) for e in entries if len(e.shape) >= 2}


def choose(entry: Entry, default: Affine, moe: bool) -> Affine | None:
    """The format of one matrix, or None for the float dtype.

    The router stays at 8 bits and, at 4 bits or less, so does the dense MLP beside experts (every
    token passes it); both as in the published mlx-community 26B. The centroids of a drafter pick
    its vocabulary and are small: never quantised.
    """
    chosen = default
    if entry.name.endswith(".router.proj.weight"):
        chosen = ROUTER
    elif moe and default.bits <= 4 and ".mlp." in entry.name:
        chosen = Affine(8, default.group_size)
    elif entry.name.startswith("masked_embedding."):
        return None
    return chosen if entry.shape[-1] % chosen.group_size == 0 else None


def record(formats: dict[str, Affine | None], default: Affine) -> dict:
    """config["quantization"]: the default, and an override for each path that differs from it."""
    quantization: dict = {
        "group_size": default.group_size,
        "bits": default.bits,
        "mode": "affine",
    }
    for name, chosen in formats.items():
        if chosen != default:
            path = name.removesuffix(".weight")
            quantization[path] = chosen is not None and {
                "group_size": chosen.group_size,
                "bits": chosen.bits,
            }
    return quantization

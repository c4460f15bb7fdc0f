"""Small JSON schemas by a seed."""

from __future__ import annotations

import numpy as np


def schema_of(seed: int) -> dict:
    """An object of two to four properties, of a few kinds; every string and list is bounded."""
    rng = np.random.default_rng(seed)

    def kind(depth: int) -> dict:
        makers = [
            lambda: {"type": "string", "maxLength": int(rng.integers(1, 8))},
            lambda: {"type": "integer", "minimum": 0, "maximum": int(rng.integers(1, 500))},
            lambda: {"type": "boolean"},
            lambda: {"enum": ["red", "green", int(rng.integers(10))]},
            lambda: {"const": f"c{rng.integers(100)}"},
            lambda: {"type": ["null", "integer"], "minimum": 5, "maximum": 9},
        ]
        if depth < 2:
            makers += [lambda: thing(depth + 1)]
            makers += [lambda: {"type": "array", "items": kind(depth + 1), "minItems": 1, "maxItems": 2}]
        return makers[rng.integers(len(makers))]()

    def thing(depth: int) -> dict:
        names = [f"{word}_{depth}" for word in ("name", "size", "args", "doc")][: rng.integers(2, 5)]
        properties = {name: kind(depth) for name in names}
        required = [name for name in names if rng.random() < 0.7]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    return thing(0)

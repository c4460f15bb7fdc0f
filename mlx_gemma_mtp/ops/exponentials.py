"""e^x of many numbers on a CPU. MLX calls the C library there for each of them; the chains below are plain arithmetic,
which the compiler vectorises, and take a third of the time. For few numbers the one chain of fused.py is faster.

MLX fuses chains of five operations at most, so there are three: x / log(2) = n + f with a whole n and |f| <= 1/2, a
polynomial for 2^f, and 2^n, which is added to the exponent of that. Nothing is summed, so that a number's bits do not
depend on where it stands.
"""

from __future__ import annotations

import math

import mlx.core as mx

from .fused import compiled

LOG2 = 1 / math.log(2)
WHOLE = 1.5 * 2**23  # added to a float32 it leaves no places behind the point: a whole number is in the last bits
# 2^f = 1 + c1 f + c2 f^2 + ... for f from -1/2 to 1/2: a fit of our own, 2e-9 of it off at most.
POWER = (0.693147203, 0.240226479, 0.0555033247, 0.00961843736, 0.00133988747, 0.000153533620)
LEAST = -87.0  # below it float32 has fewer bits, and then none
EXPONENT = 23  # a float32's first bit of the exponent
NAN = 0x7FC00000


def exponentials(scores: mx.array, largest: mx.array) -> mx.array:
    """Returns e^(scores - largest), which a softmax normalises. Both are float32, and no score is above the largest.

    With x = scores - largest it is right to (1 + |x|) 2^-23 of itself, about as x itself is rounded. e^0 is 1;
    below x = -87 it is 0; NaN stays NaN. A gate asks for x up to 80, too: that is right to twice as much.
    """
    x, whole, rest = _parts(scores, largest)
    return _scaled(x, whole.view(mx.int32), _power(rest).view(mx.int32)).view(mx.float32)


@compiled
def _parts(scores: mx.array, largest: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Returns x, WHOLE + n, and f."""
    x = scores - largest
    y = x * LOG2
    whole = y + WHOLE
    return x, whole, y - (whole - WHOLE)


@compiled
def _power(f: mx.array) -> mx.array:
    """Returns 2^f."""
    c1, c2, c3, c4, c5, c6 = POWER
    squared = mx.square(f)
    low, high = (1 + c1 * f) + (c2 + c3 * f) * squared, (c4 + c5 * f) + c6 * squared
    return low + high * mx.square(squared)


@compiled
def _scaled(x: mx.array, whole: mx.array, power: mx.array) -> mx.array:
    """Returns 2^n 2^f, as 0 or NaN where it is that. whole, power: the bits of WHOLE + n and of 2^f."""
    return mx.where(x >= LEAST, power + (whole << EXPONENT), mx.where(x < LEAST, 0, NAN))

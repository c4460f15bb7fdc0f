"""Hugging Face Gemma 4 checkpoints and MTP drafters -> the MLX folders that mlx_gemma_mtp reads.

A leaf: `mlx_gemma_mtp` never imports it. Reading order: source (what is there), dequantize (what others quantised, as
floats), config (what it means), names (what must be there), adapters (what is added), quantize (which bits), blocks and
writer (row by row), remote (what is not here yet), conversion (all of it, planned), stream (file by file), destination
and interruption (all or nothing), run, upload, check, inspect, cli.
"""

from .quantize import Format, Recipe
from .run import convert

__all__ = ["Format", "Recipe", "convert"]

"""Our kernels' Metal text on an NVIDIA GPU, through MLX's CUDA backend: README.md beside this file."""

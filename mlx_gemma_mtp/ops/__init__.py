"""Operations: fused chains, attention, the Metal kernels with their references."""

"""What computes: device, BLAS, memory."""

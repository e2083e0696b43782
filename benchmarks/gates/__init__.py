"""Measured without a GPU: registers, occupancy and memory traffic of the GPU kernels."""

"""The machine's own limits, and how near the CPU kernels come to them."""

"""Other libraries' models with their own operator and with this package's.

    python -m benchmarks.clients.environments results/clients   # or `make clients`
    python -m benchmarks.clients --environments results/clients

writes a table for this machine: agreement, gain, the operator's share, and which traces and exports
work before and after :func:`deform_attn.accelerate`.
"""

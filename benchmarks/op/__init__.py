"""The operator's benchmark: check every contestant, then time it. ``python -m benchmarks.op``."""

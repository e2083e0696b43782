"""The detectors compared: AP against steps. ``python -m benchmarks.detectors``."""

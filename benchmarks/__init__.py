"""Benchmarks in four subjects: the operator, static gates, the machine, the detectors."""

"""Benchmarks of deform_attn: named workloads, peers, whole models and the machine's own limits."""

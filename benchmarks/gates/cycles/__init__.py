"""Simulates the CUDA kernels on a model of one multiprocessor, without a GPU.

    python -m benchmarks.gates.cycles [--only encoder] [--json FILE] [--check FILE]

nvcc compiles the kernels of csrc for sm_90 and sm_80, nvdisasm prints their machine code, and a C++
program of this folder executes it: csrc's own code plans each call and launches its kernels. The
results are compared with float64. For the blocks of one of 132 multiprocessors a model of issue,
caches and atomics also counts cycles. The figures are simulated; they order designs and are not
times. `make cycles` compares them with the committed ones, in minutes.

    code.*             machine code as nvdisasm prints it, decoded
    execute.*          what instructions compute
    multiprocessor.*   the model and its constants: when instructions issue, how long accesses take
    inputs.*           the modelled calls, and their results in float64
    model.cpp          a call of csrc's entry points on the model
    build.py           compiles all of it
    cases.py           the calls whose figures docs/design-gpu.md states, and the bars
"""

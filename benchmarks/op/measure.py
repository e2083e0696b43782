"""Time and memory of ops, on a CPU or a GPU.

race    forward, backward and forward + backward of several ops, interleaved round by round, so
        that a disturbance of the machine affects all of them
peaks   peak memory of a call, in addition to its inputs
cost    overhead of a call: microseconds on a tiny problem
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.op.peers import Op
from benchmarks.op.workloads import WorkloadInputs

Cost = dict[str, list[float]]
PHASES = ("forward", "backward", "forward_backward")
AGAIN = (
    "forward_again"  # on a CPU: a second forward right after the first, with its inputs in cache
)


@dataclasses.dataclass
class Entrant:
    """An op in a race: its inputs, taken in turn, its threads, and its times in seconds.

    `busy` is CPU time over wall time: below 1 on one thread, another process used the core.
    """

    op: Op
    inputs: Sequence[WorkloadInputs]  # on a GPU several, larger than its L2 cache together
    threads: int = 1
    times: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    busy: list[float] = dataclasses.field(default_factory=list)


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Keep freed memory in the process for the next call, as PyTorch does on a GPU.

    Otherwise the system maps fresh pages for large tensors in each call, which takes a time that
    varies and does not depend on the op (docs/benchmarks.md has figures). Only with glibc's malloc;
    elsewhere this does nothing.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_max = -1, -4  # options of mallopt(3)
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, -1)
    try:
        yield
    finally:
        libc.mallopt(mmap_max, 65536)  # the defaults
        libc.mallopt(trim_threshold, 128 * 1024)
        libc.malloc_trim(0)


def page_faults() -> int:
    """Page faults of this process until now that needed no I/O."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def race(
    entrants: Sequence[Entrant],
    seconds: float,
    rounds: tuple[int, int] = (3, 100),
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Time every entrant once per round, in an order that changes from round to round.

    The first round is a warm-up and is dropped, unless it takes a third of `seconds`. Rounds
    continue for `seconds`, at least rounds[0] and at most rounds[1]. The times of one round belong
    together: a ratio of two entrants is taken round by round.
    """
    if not entrants:
        return
    threads_before = torch.get_num_threads()
    gc.collect()
    gc.disable()
    try:
        start, done = time.perf_counter(), 0
        while done < rounds[0] or (done < rounds[1] and time.perf_counter() - start < seconds):
            for i in range(len(entrants)):
                entrant = entrants[(i + done) % len(entrants)]
                _set_threads(entrant.threads)
                turn = 2 * (done * len(entrants) + i)
                x, y = (entrant.inputs[t % len(entrant.inputs)] for t in (turn, turn + 1))
                wall, cpu = time.perf_counter(), time.process_time()
                for phase, taken in _times(entrant.op, x, y).items():
                    entrant.times.setdefault(phase, []).append(taken)
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                entrant.busy.append(cpu / wall)
            done += 1
            if done == 1 and time.perf_counter() - start < seconds / 3:
                for entrant in entrants:
                    for kept in (entrant.busy, *entrant.times.values()):
                        kept.clear()
                rounds = (rounds[0] + 1, rounds[1] + 1)
            tick()
    finally:
        gc.enable()
        torch.set_num_threads(threads_before)


def summary(times: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(times), "min": min(times), "max": max(times)}


def ratios(slow: Sequence[float], fast: Sequence[float]) -> list[float]:
    """How many times as fast, from pairs of one round each."""
    return [a / b for a, b in zip(slow, fast)]


def ratio(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """The same in three numbers."""
    return summary(ratios(slow, fast))


def _times(op: Op, x: WorkloadInputs, y: WorkloadInputs) -> dict[str, float]:
    """Forward without gradients on x, then forward and backward on y.

    Forward is timed after other ops, whose work has pushed its inputs out of a CPU's caches; and
    again, as in a model, which calls it on what it has just written.
    """
    leaves = y.map(lambda tensor: tensor.detach().requires_grad_())
    clock = _cuda_clock if x.value.is_cuda else cpu_clock
    times = {}
    with torch.no_grad():
        for phase in ("forward",) if x.value.is_cuda else ("forward", AGAIN):
            times[phase], _ = clock(lambda: op(x))
    recorded, output = clock(lambda: op(leaves))
    backward, _ = clock(lambda: torch.autograd.grad(output, leaves.differentiable, y.grad_output))
    return times | {"backward": backward, "forward_backward": recorded + backward}


def cpu_clock(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call, and what it returned."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def _cuda_clock(call: Callable[[], Any]) -> tuple[float, Any]:
    """Time on the device: the queue is kept busy until the host has launched everything."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000)  # cycles: about a millisecond, longer than the launches take
    start.record()
    result = call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3, result


def _set_threads(count: int) -> None:
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)
        torch.ones(1 << 20).add_(1)  # wakes the threads


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch computes on one thread within, and on as many as before afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def cost(ops: Sequence[Op], x: WorkloadInputs, calls: int = 200, rounds: int = 9) -> list[Cost]:
    """Seconds of a call with almost no arithmetic, for each op in turn, on one thread.

    `x` has to be tiny. Three kinds of calls: under no_grad; forward with gradients for all three
    tensors; and forward and backward.
    """
    leaves = x.map(lambda tensor: tensor.detach().requires_grad_())
    tensors = leaves.differentiable

    def no_grad(op: Op) -> None:
        with torch.no_grad():
            for _ in range(calls):
                op(x)

    def grad(op: Op) -> None:
        for _ in range(calls):
            op(leaves)

    def grad_backward(op: Op) -> None:
        for _ in range(calls):
            torch.autograd.grad(op(leaves), tensors, x.grad_output)

    kinds = {"no_grad": no_grad, "grad": grad, "grad_backward": grad_backward}
    costs: list[Cost] = [{kind: [] for kind in kinds} for _ in ops]
    with one_thread():
        for _ in range(rounds):
            for op, taken in zip(ops, costs):
                for kind, run in kinds.items():
                    start = time.perf_counter()
                    run(op)
                    taken[kind].append((time.perf_counter() - start) / calls)
    return costs


# Memory ------------------------------------------------------------------------------------------


def peaks(op: Op, x: WorkloadInputs) -> dict[str, float | None]:
    """Peak memory in bytes above the inputs: of forward, and of forward + backward."""
    leaves = x.map(lambda tensor: tensor.detach().requires_grad_())

    def forward() -> None:
        with torch.no_grad():
            op(x)

    def forward_backward() -> None:
        torch.autograd.grad(op(leaves), leaves.differentiable, x.grad_output)

    peak = _cuda_peak if x.value.is_cuda else _cpu_peak
    return {"forward": peak(forward), "forward_backward": peak(forward_backward)}


def _cuda_peak(call: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _cpu_peak(call: Callable[[], None]) -> float | None:
    """The kernel's high-water mark of this process: it sees every allocator, not only PyTorch's.

    Freed memory is given back first, so that reuse counts as use. Right to a few hundred kB. None
    where the system has no such mark (it is Linux's /proc).
    """
    if not sys.platform.startswith("linux"):
        return None
    gc.collect()
    start = time.perf_counter()
    try:
        peak = _high_water_mark(call)
    except (AttributeError, OSError):
        return None
    # pages of libraries that the system evicts during the call lower the measured peak
    again = 0 if time.perf_counter() - start > 0.2 else 2
    return max([peak, *(_high_water_mark(call) for _ in range(again))])


def _high_water_mark(call: Callable[[], None]) -> float:
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets the mark to the present use
    before = _status("VmRSS")
    call()
    return max(0.0, _status("VmHWM") - before)


def _status(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return float(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def available_memory() -> float:
    """Bytes that a new allocation can have on the host; infinity if unknown."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return float(line.split()[1]) * 1024
    return float("inf")

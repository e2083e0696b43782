"""Where a measurement was taken: processor, threads, versions, commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

PEER_PACKAGES = ("torch-ms-deform-attn", "mmcv", "deformops", "msda-triton", "kernels")
PACKAGES = ("deform_attn", "transformers", "triton", *PEER_PACKAGES)


def environment() -> dict[str, Any]:
    """Facts about the machine and the software, without names of hosts, users or folders."""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "builds": _builds(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory": properties.total_memory,
            "l2_cache": properties.L2_cache_size,
            "cuda": torch.version.cuda,
        }
    return facts


def all_cores() -> int:
    """The number of threads that PyTorch uses by default."""
    return torch.get_num_threads()


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        facts: dict[str, str] = {}
        for line in cpuinfo.read_text().splitlines():
            key, _, fact = line.partition(":")
            facts.setdefault(key.strip(), fact.strip())
        name = facts.get("model name") or facts.get("CPU part", "")
        if "cpu family" in facts:  # a virtual machine may report only "AMD EPYC" as its name
            name += f" (family {facts['cpu family']}, model {facts.get('model')})"
        return name or platform.processor()
    return platform.processor()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--short") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _builds() -> dict[str, Any]:
    """Build facts of the compiled libraries, with the instruction set in use."""
    builds = {}
    for device in ("cpu", "cuda"):
        try:
            builds[device] = json.loads(getattr(torch.ops.deform_attn, f"{device}_build")())
        except (RuntimeError, AttributeError, NotImplementedError):
            continue
    return builds

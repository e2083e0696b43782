"""What is installed and what runs: ``python -m deform_attn.info [--json]``."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

import deform_attn
from deform_attn.backends import BACKENDS, choose_backend, compiled, unannounced
from deform_attn.console import command

__all__ = ["report"]

DEVICES = ("cpu", "cuda")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def report() -> dict[str, Any]:
    """Everything a bug report needs, as plain data.

    Returns:
        A dict with ``versions``, ``processor``, ``gpus``, ``forced`` (the value of
        ``DEFORM_ATTN_BACKEND``), ``libraries`` (device -> build facts, or why it is missing) and
        ``backends`` (device -> dtype -> the backend that is chosen and why others are not).

    Example:
        >>> from deform_attn.info import report
        >>> report()["backends"]["cpu"]["float32"]["chosen"] in ("compiled", "reference")
        True
    """
    return {
        "versions": {
            "deform_attn": deform_attn.__version__,
            "folder": str(Path(deform_attn.__file__).parent),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "CUDA of torch": torch.version.cuda,
            "HIP of torch": torch.version.hip,
            "triton": _version("triton"),
            "platform": platform.platform(),
        },
        "processor": {
            "machine": platform.machine(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        },
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())],
        "forced": os.environ.get("DEFORM_ATTN_BACKEND"),
        "libraries": {device: _library(device) for device in DEVICES},
        "backends": {
            device: {_name(dtype): _backends(device, dtype) for dtype in DTYPES}
            for device in DEVICES
        },
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _gpu(index: int) -> dict[str, Any]:
    facts = torch.cuda.get_device_properties(index)
    return {
        "name": facts.name,
        "architecture": f"{facts.major}.{facts.minor}",
        "memory_GiB": round(facts.total_memory / 2**30, 1),
    }


def _library(device: str) -> dict[str, Any]:
    facts = compiled.build_facts(device)
    if facts is None:
        return {"missing": compiled.why_not(device, torch.float32)}
    return facts


def _backends(device: str, dtype: torch.dtype) -> dict[str, Any]:
    why_not = {name: backend.why_not(device, dtype) for name, backend in BACKENDS.items()}
    try:
        chosen: str | None = choose_backend(device, dtype).name
    except RuntimeError:  # the forced one cannot run; why_not has the reason
        chosen = None
    return {"chosen": chosen, "why_not": {n: why for n, why in why_not.items() if why is not None}}


def _as_text(facts: dict[str, Any]) -> str:
    lines = [f"{name:14} {value or 'none'}" for name, value in facts["versions"].items()]
    lines.append(f"{'processor':14} {', '.join(f'{k} {v}' for k, v in facts['processor'].items())}")
    gpus = [f"{g['name']} ({g['architecture']}, {g['memory_GiB']} GiB)" for g in facts["gpus"]]
    lines.append(f"{'GPUs':14} {'; '.join(gpus) or 'none'}")
    if facts["forced"]:
        lines.append(f"{'forced':14} DEFORM_ATTN_BACKEND={facts['forced']}")
    lines += ["", "Compiled libraries"]
    for device, built in facts["libraries"].items():
        lines.append(f"  {device:12} {', '.join(f'{k}: {v}' for k, v in built.items())}")
    lines += ["", "Backend of each device" + ("" if gpus else " (of cuda: if a GPU were here)")]
    for device, by_dtype in facts["backends"].items():
        for choice, dtypes in _grouped(by_dtype):
            lines.append(f"  {device:12} {choice['chosen'] or 'NONE'}  ({', '.join(dtypes)})")
            lines += [f"  {'':12}   not {n}: {why}" for n, why in choice["why_not"].items()]
    return "\n".join(lines)


def _grouped(by_dtype: dict[str, Any]) -> list[tuple[Any, list[str]]]:
    """Dtypes that get the same answer, together."""
    groups: list[tuple[Any, list[str]]] = []
    for dtype, choice in by_dtype.items():
        same = [dtypes for other, dtypes in groups if other == choice]
        if same:
            same[0].append(dtype)
        else:
            groups.append((choice, [dtype]))
    return groups


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(prog="python -m deform_attn.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    with command():
        arguments = parser.parse_args()
        with unannounced():
            facts = report()
        print(json.dumps(facts, indent=2) if arguments.json else _as_text(facts))


if __name__ == "__main__":
    main()

"""A table of every accelerated model type of transformers, for several versions of it.

    python -m tests.transformers_matrix --transformers 5.17.0 5.24.0

Each version that is not installed is installed into a temporary folder at the front of the path,
with its dependencies and the version of `kernels` that it accepts. The table has, for each model,
the largest relative difference of its outputs (evaluation) and of the gradients of all parameters
(training, with the model's own loss if it has one), and whether torch.compile still makes one
graph of a model that it makes one graph of. float64 decides; float32 shows what a user gets, and
there rounding before a topk may choose another query. With ``--exports`` it has what the model can
be exported to before and after accelerate(), see benchmarks/clients/exports.py; a type fails where
the accelerated model lacks an export that the stock model has.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

EXPORTS = ("trace", "torch.export", "ONNX 17", "ONNX dynamo")
ROOT = Path(__file__).resolve().parent.parent
LIMIT = 1e-9  # of a relative difference in float64
NEGLIGIBLE = 1e-4  # smaller gradients, relative to the largest, are compared as if this large
RATE = 1e-3


@dataclass(frozen=True)
class Result:
    """Outputs in evaluation mode, then loss, gradients and parameters of a training step."""

    outputs: list[Tensor]
    loss: Tensor  # in training
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]  # after the step


def result_of(model: nn.Module, inputs: dict[str, Any], training: bool = True) -> Result:
    from tests.transformers_models import loss_of, tensors_of

    model = copy.deepcopy(model)  # it may cache results, and its parameters change
    torch.manual_seed(3)
    with torch.no_grad():
        outputs = tensors_of(model.eval()(**inputs))
    torch.manual_seed(4)
    loss = loss_of(model.train(training)(**inputs))
    loss.backward()
    given = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    torch.optim.SGD(model.parameters(), lr=RATE).step()
    return Result(outputs, loss.detach(), given, dict(model.named_parameters()))


def values_differ(found: Result, expected: Result) -> float:
    """The largest difference of an output or of the loss, relative to its maximum."""
    assert len(found.outputs) == len(expected.outputs) > 0
    pairs = [*zip(found.outputs, expected.outputs), (found.loss, expected.loss)]
    return max(difference(a, b) for a, b in pairs)


def gradients_differ(found: Result, expected: Result) -> float:
    """The same for the gradient of every parameter and for the parameter after the step."""
    assert found.gradients.keys() == expected.gradients.keys()
    least = NEGLIGIBLE * max(float(g.abs().max()) for g in expected.gradients.values())
    return max(
        max(
            difference(found.gradients[name], expected.gradients[name], least),
            difference(found.parameters[name], expected.parameters[name], RATE * least),
        )
        for name in expected.gradients
    )


def difference(found: Tensor, expected: Tensor, least: float = 0.0) -> float:
    assert found.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    apart = float((found - expected).detach().abs().nan_to_num(float("inf")).max())
    return apart / max(float(expected.detach().abs().max()), least) if apart else 0.0


class OneGraph:
    """A model compiled with torch.compile(fullgraph=True), and the operators of its graphs."""

    def __init__(self, model: nn.Module, backend: str) -> None:
        self.operators: list[str] = []

        def record(graph: torch.fx.GraphModule, example: list[Any]) -> Any:
            self.operators += [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
            return make_boxed_func(graph.forward)

        torch._dynamo.reset()
        chosen: Any = backend
        if backend == "aot_eager":
            chosen = aot_autograd(fw_compiler=record, bw_compiler=record)
        self.call = torch.compile(model, fullgraph=True, backend=chosen)

    def count(self, name: str) -> int:
        return self.operators.count(f"deform_attn.{name}.default")


def sum_of_gradients(
    call: Any, model: nn.Module, inputs: dict[str, Any]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs of a call and the gradients of their sum with respect to the parameters."""
    from tests.transformers_models import tensors_of

    outputs = tensors_of(call(**inputs))
    model.zero_grad()
    sum(output.sum() for output in outputs).backward()
    given = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return [output.detach() for output in outputs], given


def compiles(small: Any, dtype: torch.dtype, backend: str = "aot_eager", stock: bool = True) -> str:
    """The word "one graph", or the reason why not (the stock model may fail as well)."""
    from deform_attn.integrations.transformers import accelerate
    from tests.transformers_models import build, inputs_of, without_labels

    inputs, model = without_labels(inputs_of(small, dtype)), build(small, dtype)
    if stock:
        try:
            OneGraph(copy.deepcopy(model), "eager").call(**inputs)
        except Exception as error:
            return f"stock model fails: {type(error).__name__}"
    model, report = accelerate(model)
    expected, expected_gradients = sum_of_gradients(model, model, inputs)
    graph = OneGraph(model, backend)
    found, gradients = sum_of_gradients(graph.call, model, inputs)
    if backend == "aot_eager" and "discrete" not in small.name:  # discrete is composed
        counts = graph.count("ms_deform_attn"), graph.count("ms_deform_attn_backward")
        if counts != (len(report.replaced),) * 2:
            return f"FAIL: {counts} operators for {len(report.replaced)} layers"
    least = NEGLIGIBLE * max(float(g.abs().max()) for g in expected_gradients.values())
    differ = max(
        *(difference(a, b) for a, b in zip(found, expected, strict=True)),
        *(difference(gradients[name], g, least) for name, g in expected_gradients.items()),
    )
    return "one graph" if differ <= LIMIT else f"FAIL: differs by {differ:.0e}"


class OfTensors(nn.Module):
    """A model as a function of its tensors that returns its floating tensors."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        from tests.transformers_models import tensors_of

        return tuple(tensors_of(self.model(**dict(zip(self.names, inputs)))))


def exports(small: Any, kinds: list[str]) -> dict[str, list[str]]:
    """What the stock and the accelerated model can be exported to, in float32."""
    from benchmarks.clients.exports import compare
    from tests.transformers_models import build, inputs_of, without_labels

    inputs = without_labels(inputs_of(small, torch.float32))
    model = OfTensors(build(small, torch.float32), list(inputs)).eval()
    return compare(model, tuple(inputs.values()), kinds)


def lacks_an_export(row: dict[str, Any]) -> bool:
    from benchmarks.clients.__main__ import fails

    return any(fails(*results) for results in row.get("exports", {}).values())


def compare(small: Any, dtype: torch.dtype) -> tuple[float, float, Any]:
    """(values, gradients, report): an accelerated model compared with the stock model."""
    from deform_attn.integrations.transformers import accelerate
    from tests.transformers_models import build, default_dtype, inputs_of

    with default_dtype(dtype):
        inputs, model = inputs_of(small, dtype), build(small, dtype)
        training = dtype is torch.float32 or not small.float32_training
        expected = result_of(model, inputs, training)
        model, report = accelerate(model)
        found = result_of(model, inputs, training)
    return values_differ(found, expected), gradients_differ(found, expected), report


# ------------------------------------------------------------------------------------------ command


def kernelized(small: Any) -> tuple[float, float]:
    """(values, gradients) of a model after ``from_pretrained(..., use_kernels=True)``."""
    from unittest import mock

    import deform_attn
    from deform_attn.integrations import transformers as integration
    from tests.transformers_models import build, default_dtype, inputs_of

    dtype = torch.float64
    with default_dtype(dtype):
        inputs, model = inputs_of(small, dtype), build(small, dtype)
        expected = result_of(model, inputs)
        integration.register_kernels()
        integration.register_kernels()  # a second call changes nothing
        model.use_kernels = True
        spy = mock.Mock(wraps=deform_attn.ms_deform_attn)
        with mock.patch.object(integration, "ms_deform_attn", spy):
            found = result_of(model, inputs)
    assert spy.call_count > 0, "`kernels` did not call deform_attn"
    return values_differ(found, expected), gradients_differ(found, expected)


def kernels_row() -> dict[str, Any]:
    from tests.transformers_models import SMALL

    try:
        values, gradients = kernelized(SMALL["rt_detr"])
    except ImportError as error:
        return {"status": "absent", "error": str(error)}
    status = "ok" if max(values, gradients) <= LIMIT else "FAIL"
    return {"status": status, "error": f"values {values:.0e}, gradients {gradients:.0e}"}


def rows(names: list[str], backend: str, kinds: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of the importable version of transformers."""
    import transformers

    from tests.transformers_models import SMALL, default_dtype

    for small in [SMALL[name] for name in names or SMALL]:
        start = time.perf_counter()
        row: dict[str, Any] = {"transformers": transformers.__version__, "model": small.name}
        try:
            if not hasattr(transformers.models, small.model_type):
                yield row | {"status": "absent"}
                continue
            values, gradients, report = compare(small, torch.float64)
            values32, gradients32, _ = compare(small, torch.float32)
            compiled = "not tried"
            if backend != "none":
                with default_dtype(torch.float64):
                    compiled = compiles(small, torch.float64, backend)
            right = max(values, gradients) <= LIMIT and not report.left and report.replaced
            row |= {
                "status": "ok" if right and "FAIL" not in compiled else "FAIL",
                "replaced": len(report.replaced),
                "values": values,
                "gradients": gradients,
                "values_f32": values32,
                "gradients_f32": gradients32,
                "compile": compiled,
                "exports": exports(small, kinds),
            }
            if lacks_an_export(row):
                row["status"] = "FAIL"
        except Exception as error:
            row |= {"status": "FAIL", "error": f"{type(error).__name__}: {error}"}
            traceback.print_exc()
        yield row | {"seconds": round(time.perf_counter() - start, 1)}
    version = transformers.__version__
    yield {"transformers": version, "model": "register_kernels, rt_detr"} | kernels_row()


COLUMNS = ("values", "gradients", "values_f32", "gradients_f32")


def line(row: dict[str, Any], kinds: list[str]) -> str:
    if "values" not in row:
        cells = [row.get("error", row["status"]), "", "", "", "", *("" for _ in kinds)]
    else:
        cells = [*(f"{row[name]:.0e}" for name in COLUMNS), row["compile"]]
        for kind in kinds:
            stock, ours = (result.split(":")[0] for result in row["exports"][kind])
            cells.append(f"{stock} -> {ours}")
    return f"| {row['transformers']} | {row['model']} | " + " | ".join(cells) + " |"


def install(version: str, folder: Path) -> None:
    """Install transformers, unless present, and the `kernels` it accepts into a folder."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--target", str(folder)]
    package = importlib.util.find_spec("transformers")
    assert package is not None
    assert package.origin is not None
    where = Path(package.origin).parent
    if version != importlib.metadata.version("transformers"):
        subprocess.run([*command, f"transformers=={version}"], check=True)
        where = folder / "transformers"
    bounds = (where / "utils" / "import_utils.py").read_text()
    lowest, end = re.findall(r'^KERNELS_M(?:IN|AX)_VERSION = "(.*)"', bounds, re.MULTILINE)
    # together with transformers, so that its other requirements hold; if no such version of kernels
    # can be installed, the row of register_kernels reports it
    both = ["--upgrade", f"transformers=={version}", f"kernels>={lowest},<{end}"]
    subprocess.run([*command, *both], check=False, capture_output=True)


def main() -> int:
    """Exit status 1 where any model of any version fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--transformers", nargs="+", default=["5.17.0", "5.24.0"])
    parser.add_argument("--models", nargs="+", default=[], help="names of models, default: all")
    parser.add_argument(
        "--backend",
        default="aot_eager",
        help="of torch.compile; none: do not compile",
    )
    parser.add_argument("--exports", nargs="*", choices=EXPORTS, help="without a name: all of them")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the results")
    parser.add_argument("--here", action="store_true", help="print the rows of this environment")
    arguments = parser.parse_args()
    if arguments.exports is None:
        arguments.exports = []
    elif not arguments.exports:
        arguments.exports = [*EXPORTS]
    if arguments.here:
        for row in rows(arguments.models, arguments.backend, arguments.exports):
            print(json.dumps(row), flush=True)
        return 0

    found = []
    header = ("transformers", "model", "values", "gradients", "values f32", "gradients f32")
    header += ("compile", *arguments.exports)
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header), flush=True)
    command = [
        sys.executable,
        "-m",
        "tests.transformers_matrix",
        "--here",
        "--backend",
        arguments.backend,
    ]
    if arguments.exports:
        command += ["--exports", *arguments.exports]
    if arguments.models:
        command += ["--models", *arguments.models]
    for version in arguments.transformers:
        with tempfile.TemporaryDirectory(prefix="transformers-") as folder:
            paths = [folder, str(ROOT), os.environ.get("PYTHONPATH", "")]
            install(version, Path(folder))
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
            process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
            assert process.stdout is not None
            for printed in process.stdout:
                if not printed.startswith("{"):  # of an exporter
                    print(printed, end="", file=sys.stderr)
                    continue
                row = json.loads(printed)
                assert row["transformers"] == version, f"imported {row['transformers']}"
                found.append(row)
                print(line(row, arguments.exports), flush=True)
            if process.wait() != 0:
                raise SystemExit(f"transformers {version}: exit status {process.returncode}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "transformers.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0 if all(row["status"] in ("ok", "absent") for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())

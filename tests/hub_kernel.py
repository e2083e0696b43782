"""Runs a model of transformers on the kernel that `make hub` lays out, from its local folder.

    python tests/hub_kernel.py dist/hub --transformers 5.17.0 newest

For each version of transformers an environment of its own is made, with the version of `kernels`
that it accepts and without an installed deform_attn; torch comes from this environment. The
kernel's layer replaces that of a Deformable DETR with random weights, and its outputs are compared
with those of the model as shipped. Exit status 1 where a version fails; a version whose `kernels`
cannot be installed is named and is no failure.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

TOLERANCE = 1e-5  # of float32 outputs, of their largest magnitude

# Runs in the new environment: argv is the kernel's folder.
MODEL = """
import importlib.util, sys
from pathlib import Path
import kernels, torch, transformers
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

assert importlib.util.find_spec("deform_attn") is None, "deform_attn is installed here"
layer = "MultiScaleDeformableAttention"
backbone = ResNetConfig(
    embedding_size=8, hidden_sizes=[8, 16, 16, 16], depths=[1] * 4,
    out_features=["stage2", "stage3", "stage4"],
)
config = DeformableDetrConfig(
    use_timm_backbone=False, backbone=None, use_pretrained_backbone=False,
    backbone_config=backbone, d_model=64, encoder_layers=1, decoder_layers=2, num_queries=10,
    encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32,
)
torch.manual_seed(0)
model = DeformableDetrForObjectDetection(config).eval()
for name, parameter in model.named_parameters():
    if "sampling_offsets" in name or "attention_weights" in name:
        torch.nn.init.normal_(parameter, std=0.3)  # offsets are not whole pixels
image = torch.randn(1, 3, 96, 128)
with torch.no_grad():
    before = model(image)
repository = kernels.LocalLayerRepository(Path(sys.argv[1]), layer_name=layer)
kernels.register_kernel_mapping({layer: {"cpu": repository}})
model.use_kernels = True
with torch.no_grad():
    after = model(image)
replaced = [module for module in model.modules() if type(module).__name__ == layer]
assert replaced
for module in replaced:
    assert module.forward.__func__.__module__ == "deform_attn.integrations.transformers", module
worst = max(
    float((a - b).abs().max() / a.abs().max())
    for a, b in ((before.logits, after.logits), (before.pred_boxes, after.pred_boxes))
)
print(transformers.__version__, kernels.__version__, len(replaced), worst)
"""


def accepted(python: str) -> str:
    """The requirement on `kernels` of the transformers that is installed there."""
    code = "from transformers.dependency_versions_table import deps; print(deps.get('kernels', ''))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def tried(version: str, kernel: Path, scratch: Path) -> bool:
    """Whether the kernel serves this version of transformers; prints what was found."""
    venv.create(scratch, with_pip=True)
    (site,) = scratch.glob("lib/python*/site-packages")
    # A path file there is not read, so an editable installation stays out.
    import torch

    (site / "torch_of_the_caller.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    python = str(scratch / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pinned = "transformers" if version == "newest" else f"transformers=={version}"
    subprocess.run([*install, pinned], check=True)
    requirement = accepted(python)
    done = subprocess.run([*install, requirement], capture_output=True, text=True)
    if done.returncode != 0:
        print(f"transformers {version}: not tried, {requirement} cannot be installed")
        return True
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", MODEL, str(kernel)],
        capture_output=True,
        text=True,
        cwd=scratch,
        env=environment,
    )
    if done.returncode != 0:
        print(f"transformers {version}: FAILED\n{done.stderr}")
        return False
    transformers, kernels, layers, worst = done.stdout.split()[-4:]
    right = float(worst) <= TOLERANCE
    print(
        f"transformers {transformers}, kernels {kernels}: {layers} layers replaced, outputs differ "
        f"by {float(worst):.1e} of their largest: {'right' if right else 'WRONG'}"
    )
    return right


def main() -> int:
    """Exit status 1 where a version fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kernel", type=Path, help="the folder that `make hub` wrote")
    parser.add_argument("--transformers", nargs="+", default=["5.17.0", "newest"])
    arguments = parser.parse_args()
    if not (arguments.kernel / "build").is_dir():
        parser.error(f"{arguments.kernel} holds no kernel; `make wheels hub` writes one")
    status = 0
    for version in arguments.transformers:
        with tempfile.TemporaryDirectory() as scratch:
            if not tried(version, arguments.kernel.resolve(), Path(scratch)):
                status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())

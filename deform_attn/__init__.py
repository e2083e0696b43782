"""Multi-scale deformable attention for PyTorch: compiled kernels, Triton and a reference."""

from deform_attn import console  # noqa: F401 (before torch is imported)
from deform_attn.backends import BACKENDS, choose_backend, use_backend
from deform_attn.functional import ms_deform_attn, ms_deform_attn_fused
from deform_attn.integrations import accelerate, restore
from deform_attn.modules import MSDeformableAttention, MSDeformAttn, MultiScaleDeformableAttention

__all__ = [
    "BACKENDS",
    "MSDeformAttn",
    "MSDeformableAttention",
    "MultiScaleDeformableAttention",
    "accelerate",
    "choose_backend",
    "ms_deform_attn",
    "ms_deform_attn_fused",
    "restore",
    "use_backend",
]

__version__ = "0.1.0"

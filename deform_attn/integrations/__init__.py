"""Adapters that make other libraries' models call this package; a module per framework."""

from deform_attn.integrations.acceleration import Measurement, Report, accelerate, restore
from deform_attn.integrations.shims import install_shims

__all__ = ["Measurement", "Report", "accelerate", "install_shims", "restore"]

"""What makes other people's models call this package; a module for each framework."""

from deform_attn.integrations.shims import install_shims

__all__ = ["install_shims"]

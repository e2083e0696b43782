"""Adapters that make other libraries' models call this package; a module per framework."""

from deform_attn.integrations.shims import install_shims

__all__ = ["install_shims"]

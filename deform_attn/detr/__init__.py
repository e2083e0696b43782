"""DETR and its line."""

from deform_attn.detr.predict import Predictor, load

__all__ = ["Predictor", "load"]

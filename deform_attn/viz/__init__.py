"""Sampling points and attention weights: recorded while a model runs, drawn over the image."""

from deform_attn.viz.draw import choose_query, draw, figure
from deform_attn.viz.record import Recording, Recordings, record

__all__ = ["Recording", "Recordings", "choose_query", "draw", "figure", "record"]

"""DETR and its line."""

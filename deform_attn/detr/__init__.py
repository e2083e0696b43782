"""Detection transformers on deformable attention: the line from Stewart's LSTM to DEIM.

One :class:`~deform_attn.detr.decoder.Decoder` and one
:class:`~deform_attn.detr.losses.Criterion`; a system is the options that its function in
:mod:`~deform_attn.detr.models` gives them. Needs the extra ``detr``.

Example:
    >>> import torch
    >>> from deform_attn.detr import models
    >>> size = models.Size(d=32, heads=4, levels=3, queries=10, encoder_layers=1, decoder_layers=2)
    >>> model, criterion, postprocess = models.dino(models.SmallBackbone(), 3, size)
    >>> targets = [{"labels": torch.tensor([2]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.4]])}]
    >>> losses = criterion(model(torch.rand(1, 3, 64, 64), None, targets), targets)
    >>> sorted(losses)[:3]
    ['class/dn0', 'class/dn1', 'class/encoder']
    >>> results = postprocess(model.eval()(torch.rand(1, 3, 64, 64)), torch.tensor([[64, 64]]))
    >>> results[0]["boxes"].shape
    torch.Size([30, 4])
"""

from deform_attn.detr.predict import Predictor, load

__all__ = ["Predictor", "load"]

"""Detection transformers with deformable attention, from Stewart's LSTM to DEIM.

All systems share one :class:`~deform_attn.detr.decoder.Decoder` and one
:class:`~deform_attn.detr.losses.Criterion`; :mod:`~deform_attn.detr.models` has a function for each
system, which builds it from parts. Needs the extra ``detr``.

Example:
    >>> import torch
    >>> from deform_attn.detr import models
    >>> from deform_attn.detr.backbones import SmallBackbone
    >>> layers = {"encoder_layers": 1, "decoder_layers": 2}
    >>> size = models.Size(d_model=32, num_heads=4, num_levels=3, num_queries=10, **layers)
    >>> model, criterion, postprocess = models.dino(SmallBackbone(), 3, size)
    >>> targets = [{"labels": torch.tensor([2]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.4]])}]
    >>> losses = criterion(model(torch.rand(1, 3, 64, 64), None, targets), targets)
    >>> sorted(losses)[:3]
    ['class/dn0', 'class/dn1', 'class/encoder']
    >>> results = postprocess(model.eval()(torch.rand(1, 3, 64, 64)), torch.tensor([[64, 64]]))
    >>> results[0]["boxes"].shape
    torch.Size([30, 4])
"""

from deform_attn.extras import needs

with needs("detr"):
    from deform_attn.detr.predict import Predictor, load
    from deform_attn.detr.zoo import create

__all__ = ["Predictor", "create", "load"]

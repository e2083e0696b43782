"""Each recorded system, run with our code: all that came out, by its recorded name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deform_attn.detr import losses, models
from deform_attn.detr.boxes import overlap
from deform_attn.detr.checkpoints import load_official, renamed
from deform_attn.detr.denoising import Noised
from deform_attn.detr.dfine import EdgeBins
from deform_attn.detr.encoder import DeformableEncoder
from deform_attn.detr.hybrid import HybridEncoder
from deform_attn.detr.matching import Hungarian, Lexicographic, OneToMany, Pairs, assign, union
from deform_attn.detr.memory import Memory, pixel_centres

from .recorded import Golden

Found = dict[str, Tensor]


class Maps(nn.Module):
    """In place of a backbone: the channels of its maps, and maps that are given to it."""

    def __init__(self, *channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.given: list[Tensor] = []

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.given


def size_of(golden: Golden) -> models.Size:
    config = golden.config
    points = config.get("points", 4)
    return models.Size(
        d_model=config["d_model"],
        num_heads=config["heads"],
        num_levels=config.get("levels", 1),
        num_points=tuple(points) if isinstance(points, list) else points,
        encoder_layers=config.get("encoder_layers", 1),
        decoder_layers=config["decoder_layers"],
        dim_feedforward=config["ffn"],
        num_queries=config["queries"],
    )


class Run:
    """A model with recorded weights, loaded strictly, and what is found of it.

    Args:
        golden: the recorded system.
        system: our function for it.
        channels: of a backbone's maps.
        variant: of the recorded weights.
        prefix: of the recorded names in a whole checkpoint.
        under: of the recorded outputs.
        others: weights that are recorded as inputs, or not at all.
        options: of the system.
    """

    def __init__(
        self,
        golden: Golden,
        system: Callable[..., models.System],
        *channels: int,
        variant: str | None = None,
        prefix: str = "",
        under: str = "",
        others: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> None:
        self.golden, self.prefix, self.under = golden, prefix, under
        self.model, self.criterion, _ = system(
            Maps(*channels), golden.config["classes"], size_of(golden), **options
        )
        self.model.double()
        self.names = {}
        state = dict(others or {})
        for name, weight in golden.state(variant).items():
            state[prefix + name] = weight
            layers = golden.config["decoder_layers"]
            self.names[name] = renamed(system.__name__, prefix + name, layers)
        load_official(self.model, system.__name__, state)
        self.model.train()
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        self.inputs: dict[str, Tensor] = {}
        self.found: Found = {}

    def input(self, *names: str) -> list[Tensor]:
        """Inputs whose gradients are recorded."""
        for name in names:
            self.inputs[name] = self.golden[f"in/{name}"].requires_grad_()
        return [self.inputs[name] for name in names]

    def maps(self, name: str) -> list[Tensor]:
        return self.input(*(f"{name}{i}" for i in range(len(self.golden.maps(name)))))

    def found_as(self, **found: Tensor) -> None:
        self.found |= {self.under + name.replace("__", "/"): x for name, x in found.items()}

    def gradients(self, name: str, scalar: Tensor) -> None:
        """Gradients of a scalar by inputs and parameters, all that are recorded."""
        name = self.under + name
        named = self.model.named_parameters(remove_duplicate=False)
        ours = {own: p for own, p in named if p.requires_grad}  # discrete: no offsets
        variables = {f"in/{n}": x for n, x in self.inputs.items()}
        variables |= {f"param/{n}": ours[own] for n, own in self.names.items() if own in ours}
        recorded = self.golden.outputs()
        unreached = (self.golden.meta.get("no_gradient") or {}).get(name, ())
        gradients = torch.autograd.grad(
            scalar, list(variables.values()), retain_graph=True, allow_unused=True
        )
        for key, gradient in zip(variables, gradients):
            if f"{name}/{key}" in recorded:
                assert gradient is not None, f"{self.golden.name}: no gradient {name}/{key}"
                self.found[f"{name}/{key}"] = gradient
            elif key.removeprefix("param/") in unreached:
                assert gradient is None or not gradient.any(), f"a gradient {name}/{key}"

    def losses(
        self,
        outputs: Mapping[str, Any],
        official: Callable[[str, str], str],
        *,
        weighted: bool = False,
        gradients: bool = True,
    ) -> None:
        """All losses by official names, and the gradients of their sum."""
        if not weighted:
            self.criterion.weights = dict.fromkeys(self.criterion.weights, 1.0)
            self.criterion.encoder_weight = 1.0
        found = self.criterion(outputs, self.golden.targets())
        names = {name: official(*name.split("/")) for name in found}
        self.found |= {f"{self.under}loss/{names[name]}": x for name, x in found.items()}
        if gradients:
            self.gradients("lossgrad", torch.stack(list(found.values())).sum())

    def matches(self, prefix: str, prediction: Mapping[str, Tensor], assign: Any = None) -> None:
        pairs = (assign or self.criterion.match)(prediction, self.golden.targets())
        self.found |= of_pairs(f"{self.under}match/{prefix}", pairs)

    def layers(self, outputs: Mapping[str, Tensor]) -> None:
        """Predictions of all layers, and the pairs of their matching."""
        self.found_as(logits=outputs["logits"], boxes=outputs["boxes"])
        for i, (logits, boxes) in enumerate(zip(outputs["logits"], outputs["boxes"])):
            self.matches(f"layer{i}", {"logits": logits, "boxes": boxes})

    def deformable_memory(self) -> Memory:
        encoder: Any = self.model.encoder
        memory: Memory = encoder.encode(
            self.maps("src"), self.golden.maps("pos"), self.golden.maps("mask")
        )
        return memory

    def noised(self) -> Noised:
        """The recorded draw of a denoising generator."""
        golden = self.golden
        labels, boxes = golden["in/dn/labels"], golden["in/dn/boxes_unact"]
        slots, groups = labels.shape[1], golden.config["dn_groups"]
        labels = labels.where(labels < golden.config["classes"], -1)  # RT-DETR's padding
        boxes = boxes[:, :slots]
        pairs = []
        for target in golden.targets():
            n = len(target["labels"])
            starts = torch.arange(groups)[:, None] * (slots // groups)
            pairs.append(((starts + torch.arange(n)).flatten(), torch.arange(n).repeat(groups)))
        noised = Noised(labels, boxes, pairs, groups)
        queries = golden.config["queries"]
        assert torch.equal(noised.attn_mask(queries), golden["in/dn/attn_mask"])
        for i, (queries_of, _) in enumerate(pairs):
            if f"in/dn/positive_idx/{i}" in golden.arrays:
                assert torch.equal(queries_of, golden[f"in/dn/positive_idx/{i}"])
        return noised


def of_pairs(prefix: str, pairs: Pairs) -> Found:
    return {f"{prefix}/{i}": torch.stack(both) for i, both in enumerate(pairs)}


def waves(*outputs: Mapping[str, Tensor]) -> Tensor:
    """The scalar whose gradients are recorded."""
    return sum((o["logits"].sin().sum() + o["boxes"].cos().sum() for o in outputs), torch.zeros(()))


def joined(outputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Denoising queries first, as they are recorded."""
    return {k: torch.cat([outputs["dn"][k], outputs[k]], 2) for k in ("logits", "boxes")}


LOSSES = {"class": "loss_ce", "l1": "loss_bbox", "giou": "loss_giou"}


def suffixed(loss: str, of: str) -> str:
    """``loss_ce`` of the last layer, ``loss_ce_i`` of layer i."""
    i = of.removeprefix("layer")
    return LOSSES[loss] if i == "2" else f"{LOSSES[loss]}_{i}"


def deformable(golden: Golden) -> Found:
    found: Found = {}
    for variant in ("one_stage", "refine", "two_stage"):
        run = Run(
            golden,
            models.deformable_detr,
            *(8, 16, 32),
            variant=variant,
            under=f"{variant}/",
            refine=variant == "refine",
            two_stage=variant == "two_stage",
        )
        memory = run.deformable_memory()
        outputs = run.model.detect(memory)
        queries, _ = run.model.queries(memory)
        run.layers(outputs)
        run.found_as(init_reference=queries.reference_points)
        if variant == "refine":
            run.found_as(memory=memory.features[:, ::7])
        if variant == "two_stage":
            proposed = outputs["encoder"]
            run.found_as(enc_logits=proposed["logits"], enc_boxes=proposed["boxes"])
        run.gradients("grad", waves(outputs))
        run.losses(outputs, lambda loss, of: suffixed(loss, "enc" if of == "encoder" else of))
        found |= run.found
    return found


def dab_deformable(golden: Golden) -> Found:
    run = Run(golden, models.dab_deformable_detr, 8, 16, 32)
    outputs = run.model.detect(run.deformable_memory())
    run.layers(outputs)
    run.gradients("grad", waves(outputs))
    run.losses(outputs, suffixed, gradients=False)
    return run.found


def dn_dab_deformable(golden: Golden) -> Found:
    run = Run(golden, models.dn_deformable_detr, 8, 16, 32)
    outputs = run.model.detect(run.deformable_memory(), run.noised())
    restored(run, outputs)
    return run.found


def restored(run: Run, outputs: dict[str, Any]) -> None:
    """Predictions of DN-DETR's matched and denoising queries, and the losses of both."""
    run.layers(outputs)
    run.found_as(**joined(outputs))
    run.gradients("grad", waves(joined(outputs)))

    def official(loss: str, of: str) -> str:
        if of.startswith("dn"):
            return "tgt_" + suffixed(loss, "layer" + of[2:])
        return suffixed(loss, of)

    run.losses(outputs, official)


def dino(golden: Golden) -> Found:
    run = Run(golden, models.dino, 8, 16, 32)
    memory = run.deformable_memory()
    outputs = run.model.detect(memory, run.noised())
    run.layers(outputs)
    proposed = outputs["encoder"]
    run.matches("interm", proposed)
    run.found_as(
        memory=memory.features[:, ::7],
        interm_logits=proposed["logits"],
        interm_boxes=proposed["boxes"],
        init_boxes=proposed["anchors"],
        **joined(outputs),
    )
    run.gradients("grad", waves(joined(outputs)))

    def official(loss: str, of: str) -> str:
        if of.startswith("dn"):
            return suffixed(loss, "layer" + of[2:]).replace(LOSSES[loss], LOSSES[loss] + "_dn")
        return suffixed(loss, "interm" if of == "encoder" else of)

    run.losses(outputs, official)
    return run.found


def hybrid_weights(system: Callable[..., models.System], golden: Golden) -> dict[str, Tensor]:
    """Of the encoder, which is recorded apart from the transformer: any will do."""
    model = system(Maps(8, 8, 8), 1, size_of(golden)).model
    names = ("encoder.output_proj.", "decoder.", "queries.", "denoising.")
    return {n: w for n, w in model.state_dict().items() if not n.startswith(names)}


def transformer(run: Run) -> tuple[Memory, dict[str, Any]]:
    """RT-DETR from its fused maps on."""
    encoder: Any = run.model.encoder
    memory = encoder.memory(run.maps("feat"))
    outputs = run.model.detect(memory, run.noised())
    run.layers(outputs)
    run.found_as(dn_logits=outputs["dn"]["logits"], dn_boxes=outputs["dn"]["boxes"])
    proposed = outputs["encoder"]
    run.found_as(enc_logits=proposed["logits"], enc_boxes=proposed["boxes"])
    run.matches("enc", proposed)
    run.model.eval()
    with torch.no_grad():
        evaluated = run.model.detect(memory)
    run.found_as(eval__logits=evaluated["logits"][-1], eval__boxes=evaluated["boxes"][-1])
    run.model.train()
    return memory, outputs


def rtdetr(golden: Golden) -> Found:
    first = golden.name == "rtdetr_v1"
    system = models.rtdetr if first else models.rtdetrv2
    options = {} if first else {"method": golden.config["sampling"]}
    others = hybrid_weights(system, golden)
    run = Run(golden, system, *(8, 8, 8), prefix="decoder.", others=others, **options)
    memory, outputs = transformer(run)
    run.found_as(memory=memory.features[:, ::7])
    run.gradients("grad", waves(outputs, outputs["encoder"]))

    def official(loss: str, of: str) -> str:
        name = {"class": "loss_vfl", "l1": "loss_bbox", "giou": "loss_giou"}[loss]
        last = "aux_2" if first else "enc_0"
        sets = {"layer0": "aux_0", "layer1": "aux_1", "layer2": "", "encoder": last}
        return "_".join(filter(None, [name, sets.get(of, f"dn_{of[2:]}")]))

    run.losses(outputs, official, weighted=True)
    return run.found


def deim(golden: Golden) -> Found:
    run = Run(
        golden,
        models.deim,
        *(8, 8, 8),
        prefix="decoder.",
        others=hybrid_weights(models.deim, golden),
    )
    _, outputs = transformer(run)
    noised = outputs["dn"]
    last = {"logits": -outputs["logits"][-1], "boxes": outputs["boxes"][-1]}
    run.matches("pre", dict(losses.layers_of(outputs, "layer"))["layer_pre"])
    sets = run.criterion.matched(outputs, golden.targets(), torch.ones(()))
    run.found |= of_pairs("match/union", union([one.pairs for one in sets]))
    run.found_as(
        weighting_function=run.criterion.bins(),
        corners=outputs["corners"],
        dn_corners=noised["corners"],
        ref_points=outputs["initial"][0],
        pre_logits=outputs["pre_logits"][0],
        pre_boxes=outputs["pre_boxes"][0],
        dn_pre_logits=noised["pre_logits"][0],
        dn_pre_boxes=noised["pre_boxes"][0],
    )
    run.gradients("grad", last["logits"].cos().sum() + last["boxes"].sin().sum())

    def official(loss: str, of: str) -> str:
        name = {"class": "mal", "l1": "bbox"}.get(loss, loss)
        sets = {"layer0": "aux_0", "layer1": "aux_1", "layer2": "", "encoder": "enc_0"}
        of = sets.get(of, f"dn_{of[2:]}" if of[2:].isdigit() else of.removeprefix("layer_"))
        return "_".join(filter(None, ["loss", name, of]))

    run.losses(outputs, official, weighted=True)
    return run.found


def deim_rtdetr(golden: Golden) -> Found:
    run = Run(
        golden,
        models.deim_rtdetrv2,
        *(8, 8, 8),
        variant="main",
        prefix="decoder.",
        others=hybrid_weights(models.rtdetr, golden),
    )
    encoder: Any = run.model.encoder
    outputs = run.model.detect(encoder.memory(run.maps("feat")))
    proposed = outputs["encoder"]
    run.found_as(logits=outputs["logits"], boxes=outputs["boxes"])
    run.found_as(enc_logits=proposed["logits"], enc_boxes=proposed["boxes"])
    run.gradients("grad", waves(outputs, proposed))
    return run.found


def mrdetr(golden: Golden) -> Found:
    # The projections of a backbone's maps are not recorded.
    others = models.mr_detr(Maps(8, 16, 32), 5, size_of(golden)).model.state_dict()
    others = {n: w for n, w in others.items() if n.startswith("encoder.input_proj.")}
    run = Run(golden, models.mr_detr, 8, 16, 32, others=others)
    assign = replace(run.criterion.one_to_many, max_choices=golden.config["o2m"]["sample_size"])
    run.criterion.one_to_many = assign
    memory = run.deformable_memory()
    outputs = run.model.detect(memory)
    many: Any = run.model.o2m_queries
    starts = {"o2o": run.model.queries, "sep": run.model.queries, "o2m": many}
    for route, queries in starts.items():
        predictions = outputs if route == "o2o" else outputs[route]
        start = queries(memory)[0].reference_points
        run.found_as(
            **{f"{route}/logits": predictions["logits"], f"{route}/boxes": predictions["boxes"]}
        )
        run.found_as(**{f"{route}/init_reference": start})
        for i, (logits, boxes) in enumerate(zip(predictions["logits"], predictions["boxes"])):
            prediction = {"logits": logits, "boxes": boxes}
            run.matches(f"{route}/layer{i}", prediction, None if route == "o2o" else assign)
        run.gradients(f"grad/{route}", waves(predictions))
    one, o2m = outputs["encoder"], outputs["encoder_o2m"]
    run.found_as(memory=memory.features[:, ::7], anchors=one["anchors"])
    run.found_as(enc_logits=one["logits"], enc_boxes=one["boxes"])
    run.found_as(enc_o2m_logits=o2m["logits"], enc_o2m_boxes=o2m["boxes"])

    def official(loss: str, of: str) -> str:
        name = {"class": "loss_class", "l1": "loss_bbox", "giou": "loss_giou"}[loss]
        sets = {"layer2": "", "encoder": "_enc", "encoder_o2m": "_enc_o2m"}
        routed = of.replace("layer", "_").replace("o2m", "_group_").replace("sep", "_sep_")
        return name + sets.get(of, routed)

    run.losses(outputs, official)
    return run.found


def dense_memory(run: Run) -> Memory:
    encoder: Any = run.model.encoder
    memory: Memory = encoder.encode(*run.input("src"), run.golden["in/pos"], run.golden["in/mask"])
    return memory


def projection(golden: Golden) -> dict[str, Tensor]:
    """Of a backbone's map, which is not recorded."""
    d = golden.config["d_model"]
    return {"input_proj.weight": torch.zeros(d, 8, 1, 1), "input_proj.bias": torch.zeros(d)}


def hidden_of(run: Run, memory: Memory) -> tuple[Tensor, list[Tensor]]:
    """What heads see, and the references of all layers."""
    heads: Any = run.model.decoder.heads
    seen: list[Tensor] = []
    references: list[Tensor] = []
    hooks = [
        heads.norm.register_forward_hook(lambda _m, _x, y: seen.append(y)),
        heads.register_forward_hook(
            lambda _m, args, _y: references.append(args[2].get("reference_points"))
        ),
    ]
    with torch.no_grad():
        run.model.detect(memory)
    for hook in hooks:
        hook.remove()
    return torch.stack(seen), references


def detr(golden: Golden) -> Found:
    others = projection(golden) | {"query_embed.weight": golden["in/query_pos"]}
    run = Run(golden, models.detr, 8, others=others)
    memory = dense_memory(run)
    outputs = run.model.detect(memory)
    run.layers(outputs)
    run.found_as(
        memory=memory.features.transpose(1, 2).unflatten(2, memory.spatial_shapes[0]),
        hidden=hidden_of(run, memory)[0],
    )
    embed: Any = run.model.queries
    run.inputs["query_pos"] = embed.query_embed.weight
    run.gradients("grad", waves(outputs))
    run.losses(outputs, suffixed, gradients=False)
    return run.found


def dense(golden: Golden, system: Callable[..., models.System]) -> tuple[Run, Memory]:
    """A dense model of DAB-DETR's line, and its memory."""
    others = projection(golden) | {"refpoint_embed.weight": golden["in/refpoint_unact"]}
    run = Run(golden, system, 8, others=others)
    memory = dense_memory(run)
    queries: Any = run.model.queries
    run.inputs["refpoint_unact"] = queries.refpoint_embed.weight
    return run, memory


def dab_detr_dense(golden: Golden) -> Found:
    run, memory = dense(golden, models.dab_detr)
    outputs = run.model.detect(memory)
    hidden, references = hidden_of(run, memory)
    run.found_as(
        logits=outputs["logits"],
        boxes=outputs["boxes"],
        memory=memory.features,
        hidden=hidden,
        references=torch.stack(references),
    )
    run.gradients("grad", waves(outputs))
    return run.found


def dab_detr_losses(golden: Golden) -> Found:
    run, memory = dense(golden, models.dab_detr)
    outputs = run.model.detect(memory)
    run.layers(outputs)
    run.losses(outputs, suffixed)
    return run.found


def dn_detr_dense(golden: Golden) -> Found:
    run, memory = dense(golden, models.dn_detr)
    restored(run, run.model.detect(memory, run.noised()))
    return run.found


def load_part(
    part: nn.Module, golden: Golden, case: str, system: str, prefix: str, others: tuple[str, ...]
) -> dict[str, nn.Parameter]:
    """Weights that are recorded in full, into a part of a model; parameters by official name."""
    state = golden.state(case)
    names = {n: renamed(system, prefix + n, 6).removeprefix("encoder.") for n in state}
    own = part.state_dict()
    assert {n for n in own if not n.startswith(others)} == set(names.values())
    part.load_state_dict(own | {ours: state[n] for n, ours in names.items()})
    parameters = dict(part.named_parameters())
    return {n: parameters[ours] for n, ours in names.items() if ours in parameters}


def gradients_of_part(
    found: Found, case: str, scalar: Tensor, inputs: Found, parameters: Mapping[str, Tensor]
) -> None:
    variables = {f"in/{n}": x for n, x in inputs.items()}
    variables |= {f"param/{n}": x for n, x in parameters.items()}
    gradients = torch.autograd.grad(scalar, list(variables.values()))
    found |= {f"{case}/grad/{n}": g for n, g in zip(variables, gradients)}


def encoder(golden: Golden) -> Found:
    found: Found = {}
    config = golden.config
    size = models.Size(
        d_model=config["d_model"], num_heads=config["heads"], dim_feedforward=config["ffn"]
    )
    deform = DeformableEncoder((8, 16, 32), replace(size, encoder_layers=2)).double()
    others = ("input_proj.", "level_embed")
    parameters = load_part(
        deform, golden, "deformable", "deformable_detr", "transformer.encoder.", others
    )
    nn.init.zeros_(deform.level_embed)  # the recorded positions have it
    source, position, padding, shapes = (
        golden[f"in/deformable/{name}"] for name in ("src", "pos", "padding_mask", "shapes")
    )

    def of_levels(x: Tensor) -> list[Tensor]:
        levels = x.split(shapes.prod(1).tolist(), 1)
        return [y.unflatten(1, tuple(shape)) for y, shape in zip(levels, shapes.tolist())]

    maps, positions = (
        [x.movedim(-1, 1) for x in of_levels(flat)] for flat in (source.requires_grad_(), position)
    )
    memory = deform.encode(maps, positions, of_levels(padding))
    torch.testing.assert_close(memory.valid_ratios, golden["in/deformable/valid_ratios"])
    output = memory.features
    found["deformable/output"] = output
    found["deformable/reference"] = memory.on_every_level(pixel_centres(memory))
    gradients_of_part(found, "deformable", output.sin().sum(), {"src": source}, parameters)

    return found | hybrid(golden, size)


def hybrid(golden: Golden, size: models.Size) -> Found:
    """RT-DETR's encoders, and D-FINE's."""
    found: Found = {}
    for case, options in golden.config["cases"].items():
        if case == "deformable":
            continue
        same = {"d_model": "hidden_dim", "dim_feedforward": "ffn"}
        same |= {"expansion": "expansion", "depth": "depth_mult"}
        its = replace(size, **{ours: options[theirs] for ours, theirs in same.items()})
        fine = options.get("fine", False)
        part = HybridEncoder(options["in_channels"], its, fine=fine).double().eval()
        system = "dfine" if fine else "rtdetr"
        parameters = load_part(part, golden, case, system, "encoder.", ("output_proj.",))
        levels = range(len(options["in_channels"]))
        maps = {f"feat{i}": golden[f"in/{case}/feat{i}"].requires_grad_() for i in levels}
        fused = part.fuse(list(maps.values()))
        found |= {f"{case}/output{i}": x for i, x in enumerate(fused)}
        scalar = torch.stack([x.sin().sum() for x in fused]).sum()
        gradients_of_part(found, case, scalar, maps, parameters)
    return found


def dfine_encoder(golden: Golden) -> Found:
    return hybrid(golden, models.Size(num_heads=golden.config["heads"]))


def matcher_losses(golden: Golden) -> Found:
    found: Found = {}
    recorded = golden.outputs()
    bins = EdgeBins().double()
    for i in range(golden.config["problems"]):
        given = {
            key: golden[f"in/{i}/{key}"].requires_grad_() for key in ("logits", "boxes", "corners")
        }
        logits, boxes, corners = given.values()
        targets = golden.targets(f"in/{i}")
        for name in ("deformable", "rtdetr_v2", "deim"):
            match = Hungarian()
            found |= of_pairs(f"{i}/match/{name}", match(given, targets))
            for b, target in enumerate(targets):
                found[f"{i}/cost/{name}/{b}"] = match.cost(logits[b], boxes[b], target)
        pairs: Pairs = [tuple(golden[f"in/{i}/indices/{b}"]) for b in range(2)]
        where, target_boxes = losses.query_indices(pairs), losses.paired(targets, pairs, "boxes")
        n = losses.averaged(sum(len(t["labels"]) for t in targets), logits.device)
        iou = overlap(boxes[where], target_boxes)[0].detach()
        initial = golden[f"in/{i}/ref_points"][where]
        left, right_weight = bins.targets(initial, target_boxes)
        found[f"{i}/iou_matched"] = iou
        found[f"{i}/fgl_target_left_bin"] = left.flatten()
        found[f"{i}/fgl_target_weight_right"] = right_weight.flatten()
        found[f"{i}/fgl_target_weight_left"] = 1 - right_weight.flatten()
        prediction = {
            "corners": corners,
            "teacher_corners": golden[f"in/{i}/teacher_corners"],
            "teacher_logits": golden[f"in/{i}/teacher_logits"],
        }
        balance = (len(iou), logits[..., 0].numel() - len(iou))
        of = {
            "fgl": (
                bins.localisation(corners[where], initial, target_boxes, iou).sum() / n,
                "corners",
            ),
            "ddf": (bins.distillation(prediction, where, iou, balance), "corners"),
        }
        for name, kind in CLASSIFICATIONS.items():
            criterion = losses.Criterion({"class": 1, "l1": 1, "giou": 1}, classification=kind)
            one = losses.LossInput(name, given, targets, pairs, n)
            of[name] = (criterion.class_loss(one), "logits")
            for box_loss, value in criterion.box_losses(one, balance).items():
                of[{"l1": "bbox"}.get(box_loss, box_loss)] = (value, "boxes")
        for name, (loss, key) in of.items():
            found[f"{i}/loss/{name}"] = loss
            if f"{i}/grad_{name}/{key}" in recorded:
                [gradient] = torch.autograd.grad(loss, given[key], retain_graph=True)
                found[f"{i}/grad_{name}/{key}"] = gradient

        start = f"in/o2m/{i}"
        many = OneToMany(max_choices=golden.config["o2m"]["sample_size"])
        prediction = {key: golden[f"{start}/{key}"] for key in ("logits", "boxes")}
        found |= of_pairs(f"o2m/{i}/match", many(prediction, golden.targets(start)))

        given_cell = golden[f"in/stewart/{i}/pred"], golden[f"in/stewart/{i}/gt"]
        found[f"stewart/{i}/cost"], found[f"stewart/{i}/match"] = lexicographic(*given_cell)
    return found


def stewart(golden: Golden) -> Found:
    """Recorded are boxes in pixels about a cell's centre, "no object" as the first class, and
    losses divided by the number of cells; the confidences', by that of steps as well, which the
    paper's equation does not have.
    """
    found: Found = {}
    for variant in ("tied", "free"):
        found |= {f"{variant}/{name}": x for name, x in in_sequence(golden, variant).items()}
    distances = []
    for k in range(golden.config["cells"]):
        triple, answer = lexicographic(golden[f"in/cell/{k}/pred"], golden[f"in/cell/{k}/gt"])
        found[f"cell/{k}/cost"] = triple
        distances.append(triple[2])
        if k not in golden.config["ties"]:
            found[f"cell/{k}/match"] = answer
    found["cell/loss"] = torch.stack(distances).mean()
    return found


def in_sequence(golden: Golden, variant: str) -> Found:
    """All of Stewart's system from a map on."""
    config, state, targets = golden.config, golden.state(variant), golden.targets()
    steps, tied = config["steps"], variant == "tied"
    backbone, size = Maps(config["channels"]), models.Size(d_model=config["hidden"], dropout=0)
    model, criterion, _ = models.stewart(backbone, config["classes"], size, steps=steps)
    decoder: Any = model.double().decoder
    heads: dict[str, nn.Parameter] = {}  # official names
    for k in range(steps):
        for i, kind in enumerate(("weight", "bias")):
            heads[f"ip_conf{k}.p{i}"] = getattr(decoder.class_heads[k], kind)
            heads[f"ip_bbox_unscaled{k}.p{i}"] = getattr(decoder.box_heads[k], kind)

    def reordered(name: str, x: Tensor) -> Tensor:
        return x.flip(0) if "conf" in name else x

    with torch.no_grad():
        # A tied forget gate is the output gate, negated.
        keep = -state["output_gate"] if tied else state["forget_gate"]
        rows = [state["input_value"], state["input_gate"], keep, state["output_gate"]]
        decoder.gates.weight.copy_(torch.cat(rows, 1)[0, :, 0])
        for name, parameter in heads.items():
            parameter.copy_(reordered(name, state[name]))

    states: list[Tensor] = []
    hook = decoder.dropout.register_forward_hook(lambda _m, _x, y: states.append(y))
    backbone.given = golden.maps("map")
    image_map = backbone.given[0].requires_grad_()
    outputs = model(torch.zeros(len(targets), 3, *config["image_HW"], dtype=torch.double))
    hook.remove()
    centres = F.pad(pixel_centres(Memory.of(backbone.given)), (0, 2))
    offsets = outputs["boxes"][0].unflatten(1, (-1, steps)) - centres[:, :, None]
    logits = outputs["logits"][0].unflatten(1, (-1, steps)).flatten(0, 1).flip(-1)
    found = {
        "hidden": torch.stack(states, 1),
        "logits": logits,
        "scores": logits.softmax(-1),
        "boxes": (offsets * outputs["pixels"][:, None, None]).flatten(0, 1),
    }
    _, prediction = next(losses.layers_of(outputs, "layer"))
    found |= of_pairs("match", criterion.match(prediction, targets))

    of_objects = criterion(outputs, targets)
    share = sum(len(target["labels"]) for target in targets) / len(logits)
    box, confidence = of_objects["l1/layer0"] * share, of_objects["class/layer0"] * share / steps
    found |= {"loss/hungarian": box / criterion.weights["l1"], "loss/box_loss": confidence}
    by = [image_map, decoder.gates.weight, *heads.values()]
    grad_map, grad_gates, *grad_heads = torch.autograd.grad(box + confidence, by)
    candidate, write, keep, output = grad_gates[None, :, None].chunk(4, 1)
    gradients = {"input_value": candidate, "input_gate": write}
    gradients |= (
        {"output_gate": output - keep} if tied else {"output_gate": output, "forget_gate": keep}
    )
    gradients |= {name: reordered(name, x) for name, x in zip(heads, grad_heads)}
    found |= {f"lossgrad/param/{name}": x for name, x in gradients.items()}
    return found | {"lossgrad/in/map0": grad_map}


def lexicographic(predicted: Tensor, objects: Tensor) -> tuple[Tensor, Tensor]:
    """Misses, ranks and distances of Stewart's matching in one cell; the object of each
    prediction, or -1.
    """
    rows, which = assign(Lexicographic.cost(predicted, objects))
    offset = (predicted[rows, :2] - objects[which, :2]).abs() / objects[which, 2:]
    missed, distance = (offset > 0.5).any(-1).sum(), (predicted[rows] - objects[which]).abs()
    triple = torch.stack([missed.float(), rows.sum().float(), distance.sum()])
    objects_of_rows = torch.full((len(predicted),), -1).index_put((rows,), which)
    return triple, torch.stack([torch.arange(len(predicted)), objects_of_rows])


CLASSIFICATIONS = {
    "focal": losses.FocalLoss(),
    "vfl": losses.VarifocalLoss(),
    "mal": losses.MatchabilityAwareLoss(),
}
SYSTEMS: dict[str, Callable[[Golden], Found]] = {
    "matcher_losses": matcher_losses,
    "encoder": encoder,
    "dfine_encoder": dfine_encoder,
    "stewart": stewart,
    "detr": detr,
    "dab_detr_dense": dab_detr_dense,
    "dab_detr_losses": dab_detr_losses,
    "deformable": deformable,
    "dab_deformable": dab_deformable,
    "dn_dab_deformable": dn_dab_deformable,
    "dn_detr_dense": dn_detr_dense,
    "dino": dino,
    "rtdetr_v1": rtdetr,
    "rtdetr_v2": rtdetr,
    "rtdetr_v2_points_list": rtdetr,
    "rtdetr_v2_discrete": rtdetr,
    "deim": deim,
    "deim_rtdetr": deim_rtdetr,
    "mrdetr": mrdetr,
}

"""Triton kernels of MSDA; importing this imports triton.

forward                  output
backward                 gradients of locations and weights; of value by atomic additions, or
                         (deterministic) the list of what each point adds to which row of value
add_up_rows              the gradient of value from that list, sorted by row

Each takes sampling locations and attention weights, or computes them by itself from what a layer
projects: reference points and offsets (REFERENCE coordinates, 2 or 4), and the softmax of logits.

A program serves BLOCK_Q queries of one head. Its tensors are [BLOCK_Q], one number a query, or
[BLOCK_Q, BLOCK_D], with the channels side by side: a thread loads 16 bytes of neighbouring
channels, and the threads of a query share its location and weight.

Offsets within one batch element are of type INDEX: int32 where value fits, else int64.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

# Sizes that differ from image to image must not compile a kernel anew.
SIZES = ("rows", "queries", "heads", "sizes", "starts_at", "first_batch", "offset_scale")

INTERPRETED = tl.constexpr(knobs.runtime.interpret)
LARGEST_SIDE = tl.constexpr(2**31 - 1)


@triton.jit
def _fma(a, b, c):
    """a * b + c, rounded once."""
    if INTERPRETED:  # numpy has no fma, but float64 holds a product of two float32 exactly
        fused = (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    else:
        fused = tl.fma(a, b, c)
    return fused


@triton.jit
def _pixel(location, size):
    """Pixel left of (or at) a location, the way from it to the point in [0, 1], and whether it or
    its neighbour is on the map: no for NaN and infinity.

    Exact at pixel knots: location * size - 1/2 rounds onto a pixel that the point lies left of,
    and the slope would be taken from the wrong side. The second fma has the true sign.
    """
    extent = tl.zeros_like(location) + size.to(tl.float32)
    left = tl.floor(_fma(location, extent, tl.zeros_like(location) - 0.5))
    past = _fma(location, extent, -(left + 0.5))
    before = past < 0.0
    left = tl.where(before, left - 1.0, left)
    past = tl.where(before, past + 1.0, past)
    hit = (left >= -1.0) & (left < extent)
    return tl.where(hit, left, 0.0).to(tl.int32), tl.where(hit, past, 0.0), hit


@triton.jit
def _level(shapes, starts, sizes, starts_at, level, behind, rows, LEVELS: tl.constexpr):
    """Height, width and first row of a level, and the row where the next one starts by default.

    From device tensors, or from numbers n passed by value, as 2 n + 3 (sizes, starts_at); without
    a start it is `behind` the levels before. A level that does not fit into the rows is empty:
    nobody checked what lies on the device, and a lie must give zeros, never a stray read.
    """
    if shapes is None:
        height = tl.zeros([], tl.int64)
        width = tl.zeros([], tl.int64)
        for i in tl.static_range(LEVELS):
            height = tl.where(level == i, sizes[2 * i], height)
            width = tl.where(level == i, sizes[2 * i + 1], width)
        height = (height >> 1) - 1
        width = (width >> 1) - 1
    else:
        height = tl.load(shapes + 2 * level).to(tl.int64)
        width = tl.load(shapes + 2 * level + 1).to(tl.int64)
    start = behind
    if starts is not None:
        start = tl.load(starts + level).to(tl.int64)
    elif starts_at is not None:
        for i in tl.static_range(LEVELS):
            start = tl.where(level == i, starts_at[i], start)
        start = (start >> 1) - 1
    sides = (height > 0) & (width > 0) & (height <= LARGEST_SIDE) & (width <= LARGEST_SIDE)
    area = tl.where(sides & (height * width <= rows), height * width, 0)
    fits = (area > 0) & (start >= 0) & (start <= rows - area)
    height = tl.where(fits, height, 0).to(tl.int32)
    width = tl.where(fits, width, 0).to(tl.int32)
    return height, width, tl.where(fits, start, 0), behind + area


@triton.jit
def _first_point(level, COUNTS: tl.constexpr):
    """How many points sample the levels before this one."""
    first = tl.zeros([], tl.int32)
    for i in tl.static_range(len(COUNTS)):
        first += tl.where(level > i, COUNTS[i], 0)
    return first


@triton.jit
def _footprint(x_location, y_location, height, width, on_query):
    """Pixel (x, y), the fractions towards x + 1 and y + 1, and which of its pixels are on the map.

    The pixels are (y, x), (y, x + 1), (y + 1, x), (y + 1, x + 1), here and everywhere.
    """
    x, right, hit_x = _pixel(x_location, width)
    y, down, hit_y = _pixel(y_location, height)
    hit = hit_x & hit_y & on_query
    up_on = hit & (y >= 0)
    down_on = hit & (y + 1 < height)
    left_on = x >= 0
    right_on = x + 1 < width
    on = (up_on & left_on, up_on & right_on, down_on & left_on, down_on & right_on)
    return x, y, right, down, hit, on


@triton.jit
def _rows(x, y, width, start, INDEX: tl.constexpr):
    """Rows of value of the four pixels."""
    up = start.to(INDEX) + y.to(INDEX) * width.to(INDEX) + x.to(INDEX)
    down = up + width.to(INDEX)
    return up, up + 1, down, down + 1


@triton.jit
def _channels(chunk, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Channels of a chunk, and which of them exist."""
    channel = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    exists = channel < HEAD_DIM if HEAD_DIM % BLOCK_D else tl.full([BLOCK_D], True, tl.int1)
    return channel, exists


@triton.jit
def _tile(pointer, offset, on, channel, exists):
    """[BLOCK_Q, BLOCK_D] in float32, zero where there is nothing to read."""
    return tl.load(
        pointer + offset[:, None] + channel[None, :],
        mask=on[:, None] & exists[None, :],
        other=0.0,
    ).to(tl.float32)


@triton.jit
def _place_of_program(queries, heads, CHUNKS: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Queries, chunk of channels, head and batch element of this program.

    Programs that run at the same time share a head, so that its slice of value stays in cache.
    """
    blocks = tl.cdiv(queries, BLOCK_Q)
    program = tl.program_id(0)
    query = (program % blocks).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    chunk = program // blocks % CHUNKS
    head = program // blocks // CHUNKS % heads
    batch = (program // blocks // CHUNKS // heads).to(tl.int64)
    return query, chunk, head, batch


@triton.jit
def _softmax(logits, vector, on_query, POINTS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Each query's largest logit, and one over the sum of exp(logit - largest)."""
    slot = tl.arange(0, BLOCK_K)
    tile = tl.load(
        logits + vector[:, None] * POINTS + slot[None, :],
        mask=on_query[:, None] & (slot < POINTS)[None, :],
        other=float("-inf"),
    ).to(tl.float32)
    largest = tl.max(tile, 1)
    largest = tl.where(on_query, largest, 0.0)
    return largest, 1.0 / tl.sum(tl.exp(tile - largest[:, None]), 1)


@triton.jit
def _anchor(
    reference,
    vector,
    level,
    count,
    height,
    width,
    offset_scale,
    on_query,
    REFERENCE: tl.constexpr,
    ANCHORS: tl.constexpr,
):
    """Reference point (x, y) of a level, and how far an offset of 1 leads from it in x and y.

    That is a pixel where it has two coordinates. Where it is a box (x, y, width, height), it is
    this part of the box: offset_scale / points of the level, the last number returned.
    """
    at = vector * ANCHORS * REFERENCE
    if ANCHORS > 1:
        at += level * REFERENCE
    x = tl.load(reference + at, mask=on_query, other=0.0)
    y = tl.load(reference + at + 1, mask=on_query, other=0.0)
    part = tl.div_rn(offset_scale, count.to(tl.float32))
    if REFERENCE == 2:
        x_step = tl.zeros_like(x) + tl.div_rn(1.0, width.to(tl.float32))
        y_step = tl.zeros_like(y) + tl.div_rn(1.0, height.to(tl.float32))
    else:
        x_step = tl.load(reference + at + 2, mask=on_query, other=0.0) * part
        y_step = tl.load(reference + at + 3, mask=on_query, other=0.0) * part
    return x, y, x_step, y_step, part


@triton.jit
def _way(offset, step, size, REFERENCE: tl.constexpr):
    """How far an offset leads.

    offset / size is rounded as a division rounds it, so that the point lies on the same side of a
    knot as it does where PyTorch computes the locations.
    """
    way = offset * step
    if REFERENCE == 2:
        divisor = tl.zeros_like(offset) + size.to(tl.float32)
        way = _fma(_fma(-way, divisor, offset), step, way)
    return way


@triton.jit
def _open_level(
    shapes,
    starts,
    sizes,
    starts_at,
    level,
    behind,
    rows,
    reference,
    anchored,  # the query's number among those of all batch elements
    offset_scale,
    on_query,
    COUNTS: tl.constexpr,
    REFERENCE: tl.constexpr,
    ANCHORS: tl.constexpr,
):
    """A level as (height, width, first row), its anchor, its first point and that of the next one,
    and `behind` for the next one.
    """
    height, width, start, behind = _level(
        shapes, starts, sizes, starts_at, level, behind, rows, len(COUNTS)
    )
    first_point = _first_point(level, COUNTS)
    last_point = _first_point(level + 1, COUNTS)
    anchor = ()
    if REFERENCE > 0:
        anchor = _anchor(
            reference,
            anchored,
            level,
            last_point - first_point,
            height,
            width,
            offset_scale,
            on_query,
            REFERENCE,
            ANCHORS,
        )
    return (height, width, start), anchor, first_point, last_point, behind


@triton.jit
def _sample(
    locations,
    weights,
    point,
    on_query,
    level,
    anchor,
    softmax,
    REFERENCE: tl.constexpr,
    INDEX: tl.constexpr,
):
    """What a point samples: its four pixels' rows of value, which of them are on the map, and what
    each counts; then weight, offset (location without a reference), fractions, and whether any hit.
    """
    height, width, start = level
    x_offset = tl.load(locations + 2 * point, mask=on_query, other=0.0).to(tl.float32)
    y_offset = tl.load(locations + 2 * point + 1, mask=on_query, other=0.0).to(tl.float32)
    weight = tl.load(weights + point, mask=on_query, other=0.0).to(tl.float32)
    if REFERENCE > 0:
        weight = tl.exp(weight - softmax[0]) * softmax[1]
        x_location = anchor[0] + _way(x_offset, anchor[2], width, REFERENCE)
        y_location = anchor[1] + _way(y_offset, anchor[3], height, REFERENCE)
    else:
        x_location, y_location = x_offset, y_offset
    x, y, right, down, hit, on = _footprint(x_location, y_location, height, width, on_query)
    row = _rows(x, y, width, start, INDEX)
    weight = tl.where(hit, weight, 0.0)  # no pixel: not even a NaN weight counts
    up_share = weight * (1.0 - down)
    down_share = weight * down
    share = (
        up_share * (1.0 - right),
        up_share * right,
        down_share * (1.0 - right),
        down_share * right,
    )
    return row, on, share, weight, x_offset, y_offset, right, down, hit


@triton.jit(do_not_specialize=SIZES)
def forward(
    value,  # [B, rows, heads, HEAD_DIM]
    shapes,  # [LEVELS, 2] on the device, or None: see sizes
    starts,  # [LEVELS] on the device, or None: see starts_at
    sizes,  # (h0, w0, h1, w1, ...), each n as 2 n + 3
    starts_at,  # (start0, start1, ...) likewise, or None: each level follows the one before
    reference,  # [B, queries, ANCHORS, REFERENCE], or None
    offset_scale,
    locations,  # [B, queries, heads, POINTS, 2]; with a reference, the offsets from it
    weights,  # [B, queries, heads, POINTS]; with a reference, the logits
    output,  # [B, queries, heads, HEAD_DIM]
    rows,
    queries,
    heads,
    HEAD_DIM: tl.constexpr,
    COUNTS: tl.constexpr,  # points in each level
    POINTS: tl.constexpr,  # their sum
    REFERENCE: tl.constexpr,
    ANCHORS: tl.constexpr,
    UNROLL: tl.constexpr,  # divides every count
    INDEX: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    query, chunk, head, batch = _place_of_program(
        queries, heads, (HEAD_DIM + BLOCK_D - 1) // BLOCK_D, BLOCK_Q
    )
    on_query = query < queries
    channel, exists = _channels(chunk, HEAD_DIM, BLOCK_D)
    row_stride = heads.to(INDEX) * HEAD_DIM
    value += batch * rows * row_stride + head * HEAD_DIM
    vector = (batch * queries + query) * heads + head

    softmax = ()
    if REFERENCE > 0:
        softmax = _softmax(weights, vector, on_query, POINTS, BLOCK_K)
    locations += 2 * POINTS * vector
    weights += POINTS * vector
    total = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    behind = tl.zeros([], tl.int64)
    for number in range(len(COUNTS)):
        level, anchor, first_point, last_point, behind = _open_level(
            shapes,
            starts,
            sizes,
            starts_at,
            number,
            behind,
            rows,
            reference,
            batch * queries + query,
            offset_scale,
            on_query,
            COUNTS,
            REFERENCE,
            ANCHORS,
        )
        for first in range(first_point, last_point, UNROLL):
            for step in tl.static_range(UNROLL):
                point = first + step
                row, on, share, weight, x_offset, y_offset, right, down, hit = _sample(
                    locations, weights, point, on_query, level, anchor, softmax, REFERENCE, INDEX
                )
                for i in tl.static_range(4):
                    pixel = _tile(value, row[i] * row_stride, on[i], channel, exists)
                    total += share[i][:, None] * pixel

    tl.store(
        output + vector[:, None] * HEAD_DIM + channel[None, :],
        total.to(output.dtype.element_ty),
        mask=on_query[:, None] & exists[None, :],
    )


@triton.jit(do_not_specialize=SIZES)
def backward(
    grad_output,  # [B, queries, heads, HEAD_DIM]
    value,  # as in forward, down to weights
    shapes,
    starts,
    sizes,
    starts_at,
    reference,
    offset_scale,
    locations,
    weights,
    grad_value,  # [B, rows, heads, HEAD_DIM] float32, zeros; or None
    targets,  # [queries, heads, POINTS, 4] head * rows + row of value; heads * rows: none; or None
    shares,  # [queries, heads, POINTS, 4] what to multiply with the gradient of the output; or None
    grad_reference,  # [B, queries, heads, ANCHORS, REFERENCE] float32, or None
    grad_locations,  # of the offsets where there is a reference
    grad_weights,  # of the logits where there is a reference
    first_batch,  # batch element of the first program
    rows,
    queries,
    heads,
    HEAD_DIM: tl.constexpr,
    COUNTS: tl.constexpr,
    POINTS: tl.constexpr,
    REFERENCE: tl.constexpr,
    ANCHORS: tl.constexpr,
    UNROLL: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    CHUNKS: tl.constexpr = (HEAD_DIM + BLOCK_D - 1) // BLOCK_D
    query, _, head, batch = _place_of_program(queries, heads, 1, BLOCK_Q)
    batch += first_batch
    on_query = query < queries
    row_stride = heads.to(INDEX) * HEAD_DIM
    image = batch * rows * row_stride + head * HEAD_DIM
    vector = (batch * queries + query) * heads + head
    channel, exists = _channels(0, HEAD_DIM, BLOCK_D)
    grad = _tile(grad_output, vector * HEAD_DIM, on_query, channel, exists)
    nothing = tl.zeros([BLOCK_Q], tl.float32)

    softmax = ()
    if REFERENCE > 0:
        softmax = _softmax(weights, vector, on_query, POINTS, BLOCK_K)
        slot = tl.arange(0, BLOCK_K)
        of_weights = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
        of_reference = (nothing, nothing, nothing, nothing)
    behind = tl.zeros([], tl.int64)
    for number in range(len(COUNTS)):
        level, anchor, first_point, last_point, behind = _open_level(
            shapes,
            starts,
            sizes,
            starts_at,
            number,
            behind,
            rows,
            reference,
            batch * queries + query,
            offset_scale,
            on_query,
            COUNTS,
            REFERENCE,
            ANCHORS,
        )
        for first in range(first_point, last_point, UNROLL):
            for step in tl.static_range(UNROLL):
                point = vector * POINTS + first + step
                row, on, share, weight, x_offset, y_offset, right, down, hit = _sample(
                    locations, weights, point, on_query, level, anchor, softmax, REFERENCE, INDEX
                )

                # the gradient of the output times each pixel: all that the small gradients need
                dots = (nothing, nothing, nothing, nothing)
                for chunk in range(CHUNKS):
                    if CHUNKS > 1:
                        channel, exists = _channels(chunk, HEAD_DIM, BLOCK_D)
                        grad = _tile(grad_output, vector * HEAD_DIM, on_query, channel, exists)
                    dots = _add_dots(
                        dots, grad, value + image, row, row_stride, on, channel, exists
                    )
                    if grad_value is not None:
                        for i in tl.static_range(4):
                            at = row[i] * row_stride
                            tl.atomic_add(
                                grad_value + image + at[:, None] + channel[None, :],
                                share[i][:, None] * grad,
                                mask=on[i][:, None] & exists[None, :],
                                sem="relaxed",
                            )
                if targets is not None:
                    entry = 4 * ((query * heads + head) * POINTS + first + step)
                    nowhere = heads.to(INDEX) * rows
                    for i in tl.static_range(4):
                        target = tl.where(on[i], head.to(INDEX) * rows + row[i], nowhere)
                        tl.store(targets + entry + i, target, mask=on_query)
                        tl.store(shares + entry + i, share[i], mask=on_query)

                # off the map there is nothing, whatever the gradient of the output is
                a = tl.where(on[0], dots[0], 0.0)
                b = tl.where(on[1], dots[1], 0.0)
                c = tl.where(on[2], dots[2], 0.0)
                d = tl.where(on[3], dots[3], 0.0)
                of_weight = (a * (1.0 - right) + b * right) * (1.0 - down)
                of_weight += (c * (1.0 - right) + d * right) * down
                of_x = ((b - a) * (1.0 - down) + (d - c) * down) * (weight * level[1])
                of_y = ((c - a) * (1.0 - right) + (d - b) * right) * (weight * level[0])
                if REFERENCE > 0:
                    of_weights = tl.where(
                        slot[None, :] == first + step, of_weight[:, None], of_weights
                    )
                    of_reference = (
                        of_reference[0] + of_x,
                        of_reference[1] + of_y,
                        of_reference[2] + tl.where(hit, of_x * x_offset * anchor[4], 0.0),
                        of_reference[3] + tl.where(hit, of_y * y_offset * anchor[4], 0.0),
                    )
                    of_x = tl.where(hit, of_x * anchor[2], 0.0)
                    of_y = tl.where(hit, of_y * anchor[3], 0.0)
                else:
                    tl.store(
                        grad_weights + point,
                        of_weight.to(grad_weights.dtype.element_ty),
                        mask=on_query,
                    )
                place = grad_locations + 2 * point
                tl.store(place, of_x.to(grad_locations.dtype.element_ty), mask=on_query)
                tl.store(place + 1, of_y.to(grad_locations.dtype.element_ty), mask=on_query)

        if grad_reference is not None and ANCHORS > 1:
            anchor_at = (vector * ANCHORS + number) * REFERENCE
            _store_reference(grad_reference + anchor_at, of_reference, on_query, REFERENCE)
            of_reference = (nothing, nothing, nothing, nothing)
    if grad_reference is not None and ANCHORS == 1:
        _store_reference(grad_reference + vector * REFERENCE, of_reference, on_query, REFERENCE)
    if REFERENCE > 0:
        at_slot = vector[:, None] * POINTS + slot[None, :]
        on_slot = on_query[:, None] & (slot < POINTS)[None, :]
        logit = tl.load(weights + at_slot, mask=on_slot, other=float("-inf")).to(tl.float32)
        weight = tl.exp(logit - softmax[0][:, None]) * softmax[1][:, None]
        of_logit = weight * (of_weights - tl.sum(weight * of_weights, 1)[:, None])
        tl.store(grad_weights + at_slot, of_logit.to(grad_weights.dtype.element_ty), mask=on_slot)


@triton.jit
def _store_reference(place, of_reference, on_query, REFERENCE: tl.constexpr):
    for i in tl.static_range(REFERENCE):
        tl.store(place + i, of_reference[i], mask=on_query)


@triton.jit
def _add_dots(dots, grad, value, row, row_stride, on, channel, exists):
    """dots + the sums over channels of grad times each of the four pixels."""
    return (
        dots[0] + tl.sum(grad * _tile(value, row[0] * row_stride, on[0], channel, exists), 1),
        dots[1] + tl.sum(grad * _tile(value, row[1] * row_stride, on[1], channel, exists), 1),
        dots[2] + tl.sum(grad * _tile(value, row[2] * row_stride, on[2], channel, exists), 1),
        dots[3] + tl.sum(grad * _tile(value, row[3] * row_stride, on[3], channel, exists), 1),
    )


@triton.jit(do_not_specialize=("rows", "heads", "points"))
def add_up_rows(
    grad_output,  # [queries, heads, HEAD_DIM] of one batch element
    order,  # entries of targets, sorted by target
    begins,  # [heads * rows + 1] where each target's entries begin in order
    shares,  # [queries, heads, points, 4]
    grad_value,  # [rows, heads, HEAD_DIM]
    rows,
    heads,
    points,
    HEAD_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    CHUNKS: tl.constexpr = (HEAD_DIM + BLOCK_D - 1) // BLOCK_D
    target = (tl.program_id(0) // CHUNKS).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    channel, exists = _channels(tl.program_id(0) % CHUNKS, HEAD_DIM, BLOCK_D)
    on_target = target < rows.to(tl.int64) * heads
    begin = tl.load(begins + target, mask=on_target, other=0)
    count = tl.load(begins + target + 1, mask=on_target, other=0) - begin
    head = target // rows

    total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for i in range(tl.max(count, 0)):
        on = i < count
        entry = tl.load(order + begin + i, mask=on, other=0)
        share = tl.load(shares + entry, mask=on, other=0.0)
        vector = entry // 4 // points
        total += share[:, None] * _tile(grad_output, vector * HEAD_DIM, on, channel, exists)

    at = (target % rows * heads + head) * HEAD_DIM
    tl.store(
        grad_value + at[:, None] + channel[None, :],
        total.to(grad_value.dtype.element_ty),
        mask=on_target[:, None] & exists[None, :],
    )

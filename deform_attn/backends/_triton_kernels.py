"""Triton kernels of MSDA; importing this imports triton.

forward                  output
backward                 gradients of locations and weights; of value by atomic additions, or
                         (deterministic) the list of what each point adds to which row of value
add_up_rows              the gradient of value from that list, sorted by row

Each takes sampling locations and attention weights, or (fused) computes them: locations from
reference points (REFERENCE numbers: 2, 4 or 6) and offsets, weights by a softmax of logits.

A reference of 6 numbers is the frame of a rotated box, which the launcher computes: a sine takes
float64 and memory of its own. With a, b the sides of the box as vectors, (w cos, w sin) and
(-h sin, h cos), it is (cx, cy, a.x, b.y, b.x, a.y).

A program computes BLOCK_Q queries of one head. Its tensors are [BLOCK_Q], one number per query, or
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
    """Pixel left of (or at) a location, the distance from it to the point in [0, 1], and whether it
    or its neighbour is on the map: false for NaN and infinity.

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

    From device tensors, or from numbers n passed by value as 2 n + 3 (sizes, starts_at). Without
    a start the level follows the levels before it, at row `behind`. Levels on the device are not
    checked: one that does not fit into the rows is empty, so nothing is read out of bounds.
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
def _pixel_at(sample, width, i: tl.constexpr):
    """Row of value of one of a sample's four pixels, and what it counts for.

    Computed where they are needed: all at once, they would take registers all the time.
    """
    row, _, weight, right, down = sample
    if i >= 2:
        row += width.to(row.dtype)
    share = weight * (down if i >= 2 else 1.0 - down)
    return row + i % 2, share * (right if i % 2 == 1 else 1.0 - right)


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
    anchors,  # as _open_level takes them
    level,
    count,
    on_query,
    REFERENCE: tl.constexpr,
    ANCHORS: tl.constexpr,
):
    """Reference point (x, y) of a level; of a box also how far an offset of 1 leads in x and y, and
    which part of the box that is: offset_scale / points of the level; of a rotated box also how far
    an offset of 1 in y leads in x, and one in x leads in y.
    """
    reference, vector, offset_scale = anchors
    at = vector * ANCHORS * REFERENCE
    if ANCHORS > 1:
        at += level * REFERENCE
    x = tl.load(reference + at, mask=on_query, other=0.0)
    y = tl.load(reference + at + 1, mask=on_query, other=0.0)
    anchor = (x, y)
    if REFERENCE >= 4:
        part = tl.div_rn(offset_scale, count.to(tl.float32))
        x_step = tl.load(reference + at + 2, mask=on_query, other=0.0) * part
        y_step = tl.load(reference + at + 3, mask=on_query, other=0.0) * part
        anchor = (x, y, x_step, y_step, part)
    if REFERENCE == 6:
        x_across = tl.load(reference + at + 4, mask=on_query, other=0.0) * part
        y_across = tl.load(reference + at + 5, mask=on_query, other=0.0) * part
        anchor = (x, y, x_step, y_step, part, x_across, y_across)
    return anchor


@triton.jit
def _open_level(
    levels,  # (shapes, starts, sizes, starts_at, rows)
    level,
    behind,
    anchors,  # (reference, the query's number among those of all batch elements, offset_scale)
    on_query,
    COUNTS: tl.constexpr,
    REFERENCE: tl.constexpr,
    ANCHORS: tl.constexpr,
):
    """A level as (height, width, first row), its anchor, its first point and that of the next one,
    and `behind` for the next one.
    """
    shapes, starts, sizes, starts_at, rows = levels
    height, width, start, behind = _level(
        shapes, starts, sizes, starts_at, level, behind, rows, len(COUNTS)
    )
    first = _first_point(level, COUNTS)
    last = _first_point(level + 1, COUNTS)
    anchor = ()
    if REFERENCE > 0:
        anchor = _anchor(anchors, level, last - first, on_query, REFERENCE, ANCHORS)
    return (height, width, start), anchor, first, last, behind


@triton.jit
def _unmasked(value_mask, row, width, on):
    """Which of a sample's four pixels are on the map and not masked."""
    below = row + width.to(row.dtype)
    return (
        on[0] & (tl.load(value_mask + row, mask=on[0], other=0) == 0),
        on[1] & (tl.load(value_mask + row + 1, mask=on[1], other=0) == 0),
        on[2] & (tl.load(value_mask + below, mask=on[2], other=0) == 0),
        on[3] & (tl.load(value_mask + below + 1, mask=on[3], other=0) == 0),
    )


@triton.jit
def _sample(
    locations,
    weights,
    value_mask,  # of the batch element, or None
    point,
    on_query,
    level,
    anchor,
    softmax,
    REFERENCE: tl.constexpr,
    INDEX: tl.constexpr,
):
    """What a point samples: the first of its four pixels as a row of value, which of the four are
    on the map, weight, and fractions; then its offset (location without a reference), and whether
    any pixel is hit.
    """
    height, width, start = level
    x_offset = tl.load(locations + 2 * point, mask=on_query, other=0.0).to(tl.float32)
    y_offset = tl.load(locations + 2 * point + 1, mask=on_query, other=0.0).to(tl.float32)
    weight = tl.load(weights + point, mask=on_query, other=0.0).to(tl.float32)
    if REFERENCE > 0:
        weight = tl.exp(weight - softmax[0]) * softmax[1]
    if REFERENCE == 4:
        x_location = anchor[0] + x_offset * anchor[2]
        y_location = anchor[1] + y_offset * anchor[3]
    elif REFERENCE == 6:
        x_location = anchor[0] + x_offset * anchor[2] + y_offset * anchor[5]
        y_location = anchor[1] + y_offset * anchor[3] + x_offset * anchor[6]
    elif REFERENCE == 2:
        # divided, not multiplied by the inverse, so that the point lies on the same side of a knot
        # as it does where PyTorch computes the locations
        nothing = tl.zeros_like(x_offset)
        x_location = anchor[0] + tl.div_rn(x_offset, nothing + width.to(tl.float32))
        y_location = anchor[1] + tl.div_rn(y_offset, nothing + height.to(tl.float32))
    else:
        x_location, y_location = x_offset, y_offset
    x, y, right, down, hit, on = _footprint(x_location, y_location, height, width, on_query)
    row = start.to(INDEX) + y.to(INDEX) * width.to(INDEX) + x.to(INDEX)
    if value_mask is not None:
        on = _unmasked(value_mask, row, width, on)
        hit = on[0] | on[1] | on[2] | on[3]
    weight = tl.where(hit, weight, 0.0)  # no pixel: not even a NaN weight counts
    return (row, on, weight, right, down), x_offset, y_offset, hit


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
    value_mask,  # [B, rows] in uint8: 1 for rows that read as zero; or None
    output,  # [B, queries, heads, HEAD_DIM]
    rows,
    queries,
    heads,
    HEAD_DIM: tl.constexpr,
    COUNTS: tl.constexpr,  # points in each level
    POINTS: tl.constexpr,  # their sum
    REFERENCE: tl.constexpr,
    ANCHORS: tl.constexpr,
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
    if value_mask is not None:
        value_mask += batch * rows
    vector = (batch * queries + query) * heads + head

    softmax = ()
    if REFERENCE > 0:
        softmax = _softmax(weights, vector, on_query, POINTS, BLOCK_K)
    locations += 2 * POINTS * vector
    weights += POINTS * vector
    total = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    levels = shapes, starts, sizes, starts_at, rows
    anchors = reference, batch * queries + query, offset_scale
    behind = tl.zeros([], tl.int64)
    for number in range(len(COUNTS)):
        level, anchor, first, last, behind = _open_level(
            levels, number, behind, anchors, on_query, COUNTS, REFERENCE, ANCHORS
        )
        for k in range(first, last):
            sample, x_offset, y_offset, hit = _sample(
                *(locations, weights, value_mask, k, on_query, level, anchor, softmax),
                *(REFERENCE, INDEX),
            )
            for i in tl.static_range(4):
                row, share = _pixel_at(sample, level[1], i)
                pixel = _tile(value, row * row_stride, sample[1][i], channel, exists)
                total += share[:, None] * pixel

    tl.store(
        output + vector[:, None] * HEAD_DIM + channel[None, :],
        total.to(output.dtype.element_ty),
        mask=on_query[:, None] & exists[None, :],
    )


@triton.jit(do_not_specialize=SIZES)
def backward(
    grad_output,  # [B, queries, heads, HEAD_DIM]
    value,  # as in forward, down to value_mask
    shapes,
    starts,
    sizes,
    starts_at,
    reference,
    offset_scale,
    locations,
    weights,
    value_mask,
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
    INDEX: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    CHUNKS: tl.constexpr = (HEAD_DIM + BLOCK_D - 1) // BLOCK_D
    QUAD: tl.constexpr = max(BLOCK_D, 4)
    corner = tl.arange(0, QUAD)
    query, _, head, batch = _place_of_program(queries, heads, 1, BLOCK_Q)
    batch += first_batch
    on_query = query < queries
    row_stride = heads.to(INDEX) * HEAD_DIM
    image = batch * rows * row_stride + head * HEAD_DIM
    if value_mask is not None:
        value_mask += batch * rows
    if targets is not None:  # which are those of one batch element
        targets -= 4 * POINTS * batch * queries * heads
        shares -= 4 * POINTS * batch * queries * heads
    vector = (batch * queries + query) * heads + head
    channel, exists = _channels(0, HEAD_DIM, BLOCK_D)
    grad = _tile(grad_output, vector * HEAD_DIM, on_query, channel, exists)
    nothing = tl.zeros([BLOCK_Q], tl.float32)

    # Stored when all are there: as tiles, their threads are those of the channels, and nothing has
    # to be carried from warp to warp.
    SIDE_BY_SIDE: tl.constexpr = min(BLOCK_D, 64)
    SLOTS: tl.constexpr = max(triton.next_power_of_2(BLOCK_K + ANCHORS * REFERENCE), SIDE_BY_SIDE)
    SIDES: tl.constexpr = max(2 * BLOCK_K, SIDE_BY_SIDE)
    slot = tl.arange(0, SLOTS)  # the weights', and from BLOCK_K on the reference points'
    side = tl.arange(0, SIDES)  # x and y by turns
    slot_grads = tl.zeros([BLOCK_Q, SLOTS], tl.float32)
    side_grads = tl.zeros([BLOCK_Q, SIDES], tl.float32)
    softmax = ()
    if REFERENCE > 0:
        softmax = _softmax(weights, vector, on_query, POINTS, SLOTS)
    levels = shapes, starts, sizes, starts_at, rows
    anchors = reference, batch * queries + query, offset_scale
    behind = tl.zeros([], tl.int64)
    for number in range(len(COUNTS)):
        level, anchor, first, last, behind = _open_level(
            levels, number, behind, anchors, on_query, COUNTS, REFERENCE, ANCHORS
        )
        for k in range(first, last):
            point = vector * POINTS + k
            sample, x_offset, y_offset, hit = _sample(
                *(locations, weights, value_mask, point, on_query, level, anchor, softmax),
                *(REFERENCE, INDEX),
            )
            first_row, on, weight, right, down = sample

            # the gradient of the output times each pixel: all that the small gradients need
            a, b, c, d = nothing, nothing, nothing, nothing
            for chunk in range(CHUNKS):
                if CHUNKS > 1:
                    channel, exists = _channels(chunk, HEAD_DIM, BLOCK_D)
                    grad = _tile(grad_output, vector * HEAD_DIM, on_query, channel, exists)
                tiles = grad, value, grad_value, image, channel, exists
                a += _visit(tiles, sample, level[1], row_stride, 0)
                b += _visit(tiles, sample, level[1], row_stride, 1)
                c += _visit(tiles, sample, level[1], row_stride, 2)
                d += _visit(tiles, sample, level[1], row_stride, 3)
            if targets is not None:
                target = tl.zeros([BLOCK_Q, QUAD], INDEX)  # row + 1
                part = tl.zeros([BLOCK_Q, QUAD], tl.float32)
                for i in tl.static_range(4):
                    here = corner[None, :] == i
                    row, share = _pixel_at(sample, level[1], i)
                    target = tl.where(here & on[i][:, None], row[:, None] + 1, target)
                    part = tl.where(here, share[:, None], part)
                nowhere = heads.to(INDEX) * rows
                target = tl.where(target > 0, head.to(INDEX) * rows + target - 1, nowhere)
                at = 4 * point[:, None] + corner[None, :]
                on_corner = on_query[:, None] & (corner < 4)[None, :]
                tl.store(targets + at, target, mask=on_corner)
                tl.store(shares + at, part, mask=on_corner)

            grad_weight = (a * (1.0 - right) + b * right) * (1.0 - down)
            grad_weight += (c * (1.0 - right) + d * right) * down
            # of the pixel, which is the offset where a reference point has two coordinates
            grad_x = ((b - a) * (1.0 - down) + (d - c) * down) * weight
            grad_y = ((c - a) * (1.0 - right) + (d - b) * right) * weight
            place = BLOCK_K + (number * REFERENCE if ANCHORS > 1 else 0)
            if grad_reference is not None:
                slot_grads = _put(slot_grads, slot, place, grad_x * level[1])
                slot_grads = _put(slot_grads, slot, place + 1, grad_y * level[0])
            if REFERENCE != 2:
                grad_x *= level[1]
                grad_y *= level[0]
            if grad_reference is not None and REFERENCE >= 4:
                grad_width = grad_x * x_offset * anchor[4]
                grad_height = grad_y * y_offset * anchor[4]
                slot_grads = _put(slot_grads, slot, place + 2, tl.where(hit, grad_width, 0.0))
                slot_grads = _put(slot_grads, slot, place + 3, tl.where(hit, grad_height, 0.0))
                if REFERENCE == 6:
                    grad_x_across = grad_x * y_offset * anchor[4]
                    grad_y_across = grad_y * x_offset * anchor[4]
                    slot_grads = _put(
                        slot_grads, slot, place + 4, tl.where(hit, grad_x_across, 0.0)
                    )
                    slot_grads = _put(
                        slot_grads, slot, place + 5, tl.where(hit, grad_y_across, 0.0)
                    )
            if REFERENCE == 4:
                grad_x = tl.where(hit, grad_x * anchor[2], 0.0)
                grad_y = tl.where(hit, grad_y * anchor[3], 0.0)
            elif REFERENCE == 6:
                grad_x_offset = grad_x * anchor[2] + grad_y * anchor[6]
                grad_y_offset = grad_y * anchor[3] + grad_x * anchor[5]
                grad_x = tl.where(hit, grad_x_offset, 0.0)
                grad_y = tl.where(hit, grad_y_offset, 0.0)
            slot_grads = _put(slot_grads, slot, k, grad_weight)
            side_grads = _put(side_grads, side, 2 * k, grad_x)
            side_grads = _put(side_grads, side, 2 * k + 1, grad_y)

    if grad_reference is not None:
        at = (slot - BLOCK_K)[None, :]
        tl.store(
            grad_reference + ANCHORS * REFERENCE * vector[:, None] + at,
            slot_grads,
            mask=on_query[:, None] & (at >= 0) & (at < ANCHORS * REFERENCE),
        )
    at_slot = vector[:, None] * POINTS + slot[None, :]
    on_slot = on_query[:, None] & (slot < POINTS)[None, :]
    if REFERENCE > 0:
        logit = tl.load(weights + at_slot, mask=on_slot, other=float("-inf")).to(tl.float32)
        weight = tl.exp(logit - softmax[0][:, None]) * softmax[1][:, None]
        mean = tl.sum(tl.where(slot[None, :] < POINTS, weight * slot_grads, 0.0), 1)
        slot_grads = weight * (slot_grads - mean[:, None])
    tl.store(grad_weights + at_slot, slot_grads.to(grad_weights.dtype.element_ty), mask=on_slot)
    tl.store(
        grad_locations + 2 * POINTS * vector[:, None] + side[None, :],
        side_grads.to(grad_locations.dtype.element_ty),
        mask=on_query[:, None] & (side < 2 * POINTS)[None, :],
    )


@triton.jit
def _put(tile, column, at, numbers):
    """tile + numbers in one of its columns."""
    return tile + tl.where(column[None, :] == at, numbers[:, None], 0.0)


@triton.jit
def _visit(tiles, sample, width, row_stride, i: tl.constexpr):
    """The sum over channels of the output's gradient times a pixel, whose own it adds to."""
    grad, value, grad_value, image, channel, exists = tiles
    on = sample[1][i]
    row, share = _pixel_at(sample, width, i)
    at = row * row_stride
    dot = tl.sum(grad * _tile(value + image, at, on, channel, exists), 1)
    if grad_value is not None:
        tl.atomic_add(
            grad_value + image + at[:, None] + channel[None, :],
            share[:, None] * grad,
            mask=on[:, None] & exists[None, :],
            sem="relaxed",
        )
    # off the map there is nothing, whatever the gradient of the output is
    return tl.where(on, dot, 0.0)


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
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    CHUNKS: tl.constexpr = (HEAD_DIM + BLOCK_D - 1) // BLOCK_D
    target = (tl.program_id(0) // CHUNKS).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    channel, exists = _channels(tl.program_id(0) % CHUNKS, HEAD_DIM, BLOCK_D)
    on_target = target < rows.to(tl.int64) * heads
    begin = tl.load(begins + target, mask=on_target, other=0)
    count = tl.load(begins + target + 1, mask=on_target, other=0) - begin
    head = target // rows

    total = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
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

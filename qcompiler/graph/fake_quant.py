"""Bodies of the model-local functions that quantize and dequantize.

Fake-quant (placed by ``insert``), each x -> dequantize(quantize(x)):

- ``FakeQuant(x, scale, zero_point) {axis}``: static; scale and zero_point are scalars or vectors along ``axis``.
- ``FakeQuantBlocks(w, scale, zero_point) {block_size, low, high}``: static, of a weight [in, out]; scale and
  zero_point [ceil(in / block_size), out], q clipped to [low, high].
- ``FakeQuantRows(w, scale, zero_point) {block_size, low, high}``: the same of an embedding table [rows, features],
  scale and zero_point [rows, ceil(features / block_size)].
- ``FakeQuantCodebook(w, values, scale) {block_size}``: static, of a weight [in, out]: the nearest of values [16]
  times the scale of its block; see ``numerics.codebooks`` for the blocks.
- ``FakeQuantFloat(w) {to}``: to another float type and back.
- ``FakeQuantPerTensor(x)``: dynamic asymmetric uint8, one scale a tensor (ONNX DynamicQuantizeLinear).
- ``FakeQuantPerToken(x) {zero_point = 128}``: dynamic, for each row along the last axis the least scale whose integers
  fit [1, 255] about the zero point: max|row| / 127 where that is 128.
- ``FakeQuantPerGroup(x) {block_size}``: dynamic symmetric, max|x| / 127 for each ``block_size`` channels of a row; the
  last group may be short.

What ``fold`` leaves of a weight that is no integer:

- ``DequantizeCodebook(q, values, scale) {block_size}``: values[q] · scale of the block; q uint4 [in, out].
- ``DequantizeFloat(w)``: w in float32.
- ``DequantizeScales(q, step, mean) {count}``: q · step + mean, the first ``count``; q int8 [rows, n], step [rows].
"""

from __future__ import annotations

_TO_BLOCKS = """
        whole = Transpose<perm: ints = [1, 0]>(w)
        turned = Shape(whole)
        last = Constant<value_ints: ints = [-1]>()
        start = Constant<value_ints: ints = [0]>()
        number = Constant<value_int: int = @block_size>()
        size = Unsqueeze(number, start)
        elements = Size(whole)
        count = Unsqueeze(elements, start)
        over = Mod(count, size)
        short = Sub(size, over)
        missing = Mod(short, size)
        pads = Concat<axis: int = 0>(start, missing)
        flat = Reshape(whole, last)
        padded = Pad(flat, pads)
        split = Concat<axis: int = 0>(last, size)
        blocks = Reshape(padded, split)
        columns = Unsqueeze(scale, last)"""
"""From w [in, out] to blocks [blocks, block_size] and the scale of each [blocks, 1]."""

_FROM_BLOCKS = """
        back = Mul(numbers, columns)
        joined = Reshape(back, last)
        kept = Slice(joined, start, count)
        restored = Reshape(kept, turned)
        y = Transpose<perm: ints = [1, 0]>(restored)"""
"""From numbers [blocks, block_size] to y [in, out]."""


def _descend(step: int, place: str) -> str:
    """One step of a binary search: as ``place``, but ``step`` further where the middle before that is exceeded."""
    return f"""
        ahead{step} = Constant<value: tensor = int32 {{{step - 1}}}>()
        seen{step} = Add({place}, ahead{step})
        middle{step} = Gather(middles, seen{step})
        above{step} = Greater(grid, middle{step})
        further{step} = Cast<to: int = 6>(above{step})
        far{step} = Constant<value: tensor = int32 {{{step}}}>()
        gain{step} = Mul(further{step}, far{step})
        place{step} = Add({place}, gain{step})"""


def _in_blocks(axis: int) -> str:
    """Static fake-quant with one scale and zero point for each ``block_size`` numbers along an axis of two."""
    return f"""<block_size, low, high>(x, scale, zero_point) => (y) {{
        long = Shape<start: int = {axis}, end: int = {axis + 1}>(x)
        zero = Constant<value_int: int = 0>()
        one = Constant<value_int: int = 1>()
        end = Squeeze(long)
        place = Range(zero, end, one)
        size = Constant<value_int: int = @block_size>()
        block = Div(place, size)
        scales = Gather<axis: int = {axis}>(scale, block)
        zeros = CastLike(zero_point, x)
        zero_points = Gather<axis: int = {axis}>(zeros, block)
        bottom = Constant<value_float: float = @low>()
        top = Constant<value_float: float = @high>()
        grid = Div(x, scales)
        nearest = Round(grid)
        moved = Add(nearest, zero_points)
        bottom_like = CastLike(bottom, x)
        top_like = CastLike(top, x)
        q = Clip(moved, bottom_like, top_like)
        back = Sub(q, zero_points)
        y = Mul(back, scales)
    }}"""


BODIES = {
    "FakeQuant": """<axis>(x, scale, zero_point) => (y) {
        q = QuantizeLinear<axis: int = @axis>(x, scale, zero_point)
        y = DequantizeLinear<axis: int = @axis>(q, scale, zero_point)
    }""",
    "FakeQuantBlocks": _in_blocks(0),
    "FakeQuantRows": _in_blocks(1),
    "FakeQuantCodebook": f"""<block_size>(w, values, scale) => (y) {{{_TO_BLOCKS}
        none = Constant<value_float: float = 0.0>()
        unit = Constant<value_float: float = 1.0>()
        zero = CastLike(none, w)
        one = CastLike(unit, w)
        empty = Equal(columns, zero)
        divisor = Where(empty, one, columns)
        grid = Div(blocks, divisor)
        second = Constant<value_ints: ints = [1]>()
        entries = Shape(values)
        upper = Slice(values, second, entries)
        lower = Slice(values, start, last)
        sums = Add(upper, lower)
        half = Constant<value_float: float = 0.5>()
        half_like = CastLike(half, w)
        middles = Mul(sums, half_like)
        place16 = Constant<value: tensor = int32 {{0}}>()
        {_descend(8, "place16")}{_descend(4, "place8")}{_descend(2, "place4")}{_descend(1, "place2")}
        numbers = Gather(values, place1){_FROM_BLOCKS}
    }}""",
    "DequantizeCodebook": f"""<block_size>(q, values, scale) => (y) {{
        places = Cast<to: int = 6>(q)
        w = Gather(values, places){_TO_BLOCKS}
        numbers = Identity(blocks){_FROM_BLOCKS}
    }}""",
    "FakeQuantFloat": """<to>(w) => (y) {
        stored = Cast<to: int = @to>(w)
        y = Cast<to: int = 1>(stored)
    }""",
    "DequantizeFloat": """(w) => (y) {
        y = Cast<to: int = 1>(w)
    }""",
    "DequantizeScales": """<count>(q, step, mean) => (y) {
        numbers = Cast<to: int = 1>(q)
        last = Constant<value_ints: ints = [-1]>()
        steps = Unsqueeze(step, last)
        stretched = Mul(numbers, steps)
        moved = Add(stretched, mean)
        flat = Reshape(moved, last)
        start = Constant<value_ints: ints = [0]>()
        number = Constant<value_int: int = @count>()
        end = Unsqueeze(number, start)
        y = Slice(flat, start, end)
    }""",
    "FakeQuantPerTensor": """(x) => (y) {
        q, scale, zero_point = DynamicQuantizeLinear(x)
        y = DequantizeLinear(q, scale, zero_point)
    }""",
    "FakeQuantPerToken": """<zero_point: float = 128.0>(x) => (y) {
        axes = Constant<value_ints: ints = [-1]>()
        highest = ReduceMax<keepdims: int = 1>(x, axes)
        lowest = ReduceMin<keepdims: int = 1>(x, axes)
        middle = Constant<value_float: float = @zero_point>()
        first = Constant<value_float: float = 1.0>()
        last = Constant<value_float: float = 255.0>()
        room_above = Sub(last, middle)
        room_below = Sub(first, middle)
        above = Div(highest, room_above)
        below = Div(lowest, room_below)
        tiny = Constant<value_float: float = 1e-30>()
        scale = Max(above, below, tiny)
        grid = Div(x, scale)
        q = Round(grid)
        y = Mul(q, scale)
    }""",
    "FakeQuantPerGroup": """<block_size>(x) => (y) {
        last = Constant<value_ints: ints = [-1]>()
        start = Constant<value_ints: ints = [0]>()
        number = Constant<value_int: int = @block_size>()
        size = Unsqueeze(number, start)
        lead = Shape<end: int = -1>(x)
        channels = Shape<start: int = -1>(x)
        over = Mod(channels, size)
        short = Sub(size, over)
        missing = Mod(short, size)
        pads = Concat<axis: int = 0>(start, missing)
        padded = Pad(x, pads, , last)
        filled = Add(channels, missing)
        count = Div(filled, size)
        split = Concat<axis: int = 0>(lead, count, size)
        groups = Reshape(padded, split)
        magnitude = Abs(groups)
        largest = ReduceMax<keepdims: int = 1>(magnitude, last)
        tiny = Constant<value_float: float = 1e-30>()
        steps = Constant<value_float: float = 127.0>()
        tiny_like = CastLike(tiny, x)
        steps_like = CastLike(steps, x)
        positive = Max(largest, tiny_like)
        scale = Div(positive, steps_like)
        grid = Div(groups, scale)
        q = Round(grid)
        back = Mul(q, scale)
        joined = Concat<axis: int = 0>(lead, filled)
        flat = Reshape(back, joined)
        y = Slice(flat, start, channels, last)
    }""",
}

"""The kernels of `fused`, in Triton: imported by it alone, where Triton is installed.

A table says where what is read lies: of all tensors the addresses, then the sizes, then the number
of the first block of each and of all blocks, then each block's tensor. Every block, of CHUNK
entries of one tensor, writes its moments into `parts`, quantity by quantity; they are then added up
in a fixed order: the result is the same to the bit, however the blocks were scheduled.
"""

import triton
import triton.language as tl


@triton.jit
def moments_of_blocks(
    table, tensors, parts, blocks, DTYPE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """The moments of one block."""
    block = tl.program_id(0)
    owner = tl.load(table + 3 * tensors + 1 + block)
    entries = tl.load(table + owner).to(tl.pointer_type(DTYPE))
    size = tl.load(table + tensors + owner)
    start = (block - tl.load(table + 2 * tensors + owner)) * CHUNK
    zero = tl.zeros([BLOCK], tl.float64)
    total, square, low, high = zero, zero, zero + float("inf"), zero - float("inf")
    count, zeros, nonfinite = zero.to(tl.int32), zero.to(tl.int32), zero.to(tl.int32)
    if DTYPE != tl.float64:
        low, high = low.to(tl.float32), high.to(tl.float32)
    for offset in range(0, CHUNK, BLOCK):
        at = start + offset + tl.arange(0, BLOCK)
        inside = at < size
        x = tl.load(entries + at, mask=inside, other=0.0)
        # By their bits: comparisons may take subnormal numbers for zeros.
        if DTYPE == tl.float64:
            bits = x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
            finite = inside & (bits < 0x7FF0000000000000)
        else:
            x = x.to(tl.float32)
            bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
            finite = inside & (bits < 0x7F800000)
        kept = tl.where(finite, x, 0.0).to(tl.float64)
        total += kept
        square += kept * kept
        low = tl.minimum(low, tl.where(finite, x, float("inf")))
        high = tl.maximum(high, tl.where(finite, x, -float("inf")))
        count += finite.to(tl.int32)
        zeros += (inside & (bits == 0)).to(tl.int32)
        nonfinite += (inside & (finite == 0)).to(tl.int32)
    mine = parts + block
    tl.store(mine, tl.sum(count, 0).to(tl.float64))
    tl.store(mine + blocks, tl.sum(total, 0))
    tl.store(mine + 2 * blocks, tl.sum(square, 0))
    tl.store(mine + 3 * blocks, tl.min(low, 0).to(tl.float64))
    tl.store(mine + 4 * blocks, tl.max(high, 0).to(tl.float64))
    tl.store(mine + 5 * blocks, tl.sum(zeros, 0).to(tl.float64))
    tl.store(mine + 6 * blocks, tl.sum(nonfinite, 0).to(tl.float64))


@triton.jit
def moments_of_tensors(table, tensors, parts, blocks, rows, BLOCK: tl.constexpr):
    """The moments of one tensor, from those of its blocks."""
    tensor = tl.program_id(0)
    first = tl.load(table + 2 * tensors + tensor)
    last = tl.load(table + 2 * tensors + tensor + 1)
    for quantity in tl.static_range(7):
        nothing = 0.0
        if quantity == 3:
            nothing = float("inf")
        if quantity == 4:
            nothing = -float("inf")
        known = tl.zeros([BLOCK], tl.float64) + nothing
        for start in range(first, last, BLOCK):
            at = start + tl.arange(0, BLOCK)
            part = tl.load(parts + quantity * blocks + at, mask=at < last, other=nothing)
            if quantity == 3:
                known = tl.minimum(known, part)
            elif quantity == 4:
                known = tl.maximum(known, part)
            else:
                known += part
        if quantity == 3:
            tl.store(rows + tensor * 7 + quantity, tl.min(known, 0))
        elif quantity == 4:
            tl.store(rows + tensor * 7 + quantity, tl.max(known, 0))
        else:
            tl.store(rows + tensor * 7 + quantity, tl.sum(known, 0))

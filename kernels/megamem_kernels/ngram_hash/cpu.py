"""The n-gram hash on the CPU: positions in blocks that stay in the first-level cache, eight heads per vector operation.

The remainder by a prime takes most of the time. For ``0 <= x < 2**63`` and a prime ``p >= 2**14`` it is exact in doubles
and 64-bit integers. With ``u = 2**-53``, the reciprocal that :func:`reciprocals` makes is ``(1 + e) / p`` with
``5.9u <= e <= 10.1u`` (8u were added, and two roundings lose or add u each). Turning ``x`` into a double and multiplying add
two more relative errors of at most ``u``. So what is truncated to ``q`` lies between ``x / p`` and
``x / p * (1 + 12.2u) < x / p + 2**63 * 12.2 * 2**-53 / 2**14 < x / p + 1``, and ``q`` is the true quotient or one more:
``x - q p`` lies in ``[-p, p)``, and ``p`` is added where it is negative. Overflow of ``q p`` past ``2**63`` is undone by the
subtraction, since both are modulo ``2**64``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from megamem_kernels.jit import njit

LEAST_PRIME = 1 << 14
"""Smaller primes take the integer remainder."""

_LANES = 8
_BLOCK = 256


def reciprocals(primes: np.ndarray) -> np.ndarray:
    """``1 / primes`` in float64, a little too large; see the module."""
    return (1.0 / primes) * (1.0 + 2.0**-50)


@intrinsic
def _store_remainders(
    typing_context: Any, mix: Any, primes: Any, inverse: Any, offsets: Any, column: Any, rows: Any, start: Any
) -> tuple[Any, Any]:
    """``rows[start + j] = mix % primes[column + j] + offsets[column + j]`` for eight ``j``; all arrays are flat.

    Written in vector operations because the compiler's own vectoriser leaves loops of eight alone.
    """
    signature = types.void(mix, primes, inverse, offsets, column, rows, start)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        integers, doubles = ir.VectorType(ir.IntType(64), _LANES), ir.VectorType(ir.DoubleType(), _LANES)

        def pointer(argument: int, index: Any, vector: Any) -> Any:
            array = context.make_array(signature.args[argument])(context, builder, arguments[argument])
            return builder.bitcast(builder.gep(array.data, [index]), vector.as_pointer())

        mix, column, start = arguments[0], arguments[4], arguments[6]
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), _LANES), [0] * _LANES)
        undefined = ir.Constant(integers, ir.Undefined)
        x = builder.insert_element(undefined, mix, ir.Constant(ir.IntType(32), 0))
        x = builder.shuffle_vector(x, undefined, zeros)
        prime = builder.load(pointer(1, column, integers), align=8)
        inverse = builder.load(pointer(2, column, doubles), align=8)
        quotient = builder.fptosi(builder.fmul(builder.sitofp(x, doubles), inverse), integers)
        remainder = builder.sub(x, builder.mul(quotient, prime))
        negative = builder.ashr(remainder, ir.Constant(integers, [63] * _LANES))
        remainder = builder.add(remainder, builder.and_(negative, prime))
        offset = builder.load(pointer(3, column, integers), align=8)
        builder.store(builder.add(remainder, offset), pointer(5, start, integers), align=8)
        return context.get_dummy_value()

    return signature, generate


@njit(nogil=True, cache=True, error_model="numpy")
def hash_positions(
    tokens: np.ndarray,
    documents: np.ndarray,
    multipliers: np.ndarray,
    primes: np.ndarray,
    inverse: np.ndarray,
    offsets: np.ndarray,
    vectors: int,
    pad_id: int,
    context: int,
    heads: int,
    rows: np.ndarray,
    low: int,
    high: int,
) -> None:
    """Hash positions ``[low, high)``, counted through all sequences without their context.

    Args:
        tokens: ``[b, s]`` int64.
        documents: ``[b, s]`` int32 or int64.
        multipliers: ``[orders + 1]`` int64.
        primes: ``[orders * heads]`` int64.
        inverse: ``[orders * heads]`` float64 :func:`reciprocals`.
        offsets: ``[orders * heads]`` int64.
        vectors: Heads of each order that are taken eight at a time, a multiple of eight; their primes are at least
            ``LEAST_PRIME``.
        pad_id: As in the op.
        context: As in the op.
        heads: Heads per order.
        rows: ``[b * (s - context) * orders * heads]`` int64, written.
        low: First position.
        high: Position after the last.
    """
    hashed = tokens.shape[1] - context
    orders = len(multipliers) - 1
    width = len(primes)
    mixes = np.empty((orders + 1, _BLOCK), np.int64)  # of order 1, 2, ...
    at = low
    while at < high:
        sequence = at // hashed
        first = at - sequence * hashed + context
        count = min(_BLOCK, high - at, tokens.shape[1] - first)
        token, document = tokens[sequence], documents[sequence]
        here, own_document = token[first : first + count], document[first : first + count]
        for i in range(count):
            mixes[0, i] = here[i] * multipliers[0]
        for back in range(1, orders + 1):
            multiplier = multipliers[back]
            padding = pad_id * multiplier
            outside = max(0, min(count, back - first))
            shorter, mix = mixes[back - 1], mixes[back]
            for i in range(outside):
                mix[i] = shorter[i] ^ padding
            # Slices with indices from 0 and a product that is always computed: so the loop compiles to vector code.
            shorter, mix, own = shorter[outside:count], mix[outside:count], own_document[outside:]
            earlier = token[first + outside - back : first + count - back]
            earlier_document = document[first + outside - back : first + count - back]
            for i in range(count - outside):
                product = earlier[i] * multiplier
                mix[i] = shorter[i] ^ (product if earlier_document[i] == own[i] else padding)
        # Rows in the order of memory: caches fetch ahead what a stream is about to write, but not what a stride is.
        for part in range(0, vectors, _LANES):
            for i in range(count):
                for order in range(orders):
                    column = order * heads + part
                    _store_remainders(
                        mixes[order + 1, i], primes, inverse, offsets, column, rows, (at + i) * width + column
                    )
        if vectors < heads:
            for i in range(count):
                for order in range(orders):
                    for column in range(order * heads + vectors, (order + 1) * heads):
                        remainder = mixes[order + 1, i] % primes[column]
                        rows[(at + i) * width + column] = remainder + offsets[column]
        at += count

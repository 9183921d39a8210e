"""Context parallelism: the tokens of a row on several devices (docs/parallelism.md).

For the C devices of the mesh axis `context` a row is cut in 2C chunks, and device c holds chunks c
and 2C - 1 - c: an early one, whose tokens see little, and a late one, whose tokens see much. So
every device has as much causal work as any other. With C = 4:

    device    0     1     2     3
    chunks    0 7   1 6   2 5   3 4

A batch is put on the devices in this order, once; everything but attention treats tokens one by
one and takes them in any order. Attention runs under `sharding.sharded`, and there a device's part
of a row is [B, 2t, ...], its two chunks of t tokens in turn. The functions that take parts do
nothing where no mesh is in context, or none with a context axis: a part is then the row.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from asa_jax.sharding import sharded

AXIS = "context"

# Logical axes of what attention takes.
QUERY = ("batch", "sequence", "heads", "head_dim")
KEY = ("batch", "sequence", "kv_heads", "head_dim")
KEY_ROW = ("batch", "row", "kv_heads", "head_dim")
SEGMENT_IDS = ("batch", "row")


def placement(length: int, context: int) -> np.ndarray:
    """Positions in the row of the tokens in the order in which devices hold them.

    Args:
        length: tokens of a row, a multiple of 2 * context if context is more than 1.
        context: devices that share a row.

    Returns:
        int [length].
    """
    if context == 1:
        return np.arange(length)
    early, late = np.split(np.arange(length).reshape(2 * context, -1), 2)
    return np.stack([early, late[::-1]], axis=1).reshape(-1)


def row_order(length: int, context: int) -> np.ndarray:
    """The inverse of `placement`: where devices hold the tokens of a row, int [length]."""
    return np.argsort(placement(length, context))


def place_rows(rows: np.ndarray, context: int) -> np.ndarray:
    """Brings the tokens of rows [B, T, ...] to the order of `placement`."""
    return rows[:, placement(rows.shape[1], context)]


def row_multiple(alignment: int, context: int) -> int:
    """What the length of a row must be a multiple of, so that chunks hold whole blocks.

    Args:
        alignment: tokens of a block.
        context: devices that share a row.
    """
    return alignment if context == 1 else 2 * context * alignment


def context_size() -> int:
    """Devices that share a row on the mesh in context."""
    return jax.sharding.get_abstract_mesh().shape.get(AXIS, 1)


def in_row_order(x: jax.Array, *axes: str) -> jax.Array:
    """Brings an array to the order of the row, whole on every device of the context axis.

    Args:
        x: [B, T, ...] in the order of `placement`.
        *axes: its logical axes, the first two 'batch' and 'sequence'.

    Returns:
        [B, T, ...]; `x` itself where rows are not shared.
    """
    if context_size() == 1:
        return x
    gather = sharded(lambda part: gather_rows(part)[0], (axes,), ("batch", "row", *axes[2:]))
    return gather(x)


def gather_rows(*parts: jax.Array, skip: int = 0) -> tuple[jax.Array, ...]:
    """Gathers the parts of all devices by one collective, and brings rows into order.

    Args:
        *parts: [B, 2t, ...] of one type each.
        skip: elements at the start of the row to leave out, which belong to no complete block.

    Returns:
        [B, T - skip, ...] each; `parts` themselves where rows are not shared.
    """
    context = context_size()
    if context == 1:
        return parts

    def gather(part: jax.Array) -> jax.Array:
        placed = jax.lax.all_gather(part, AXIS, axis=1, tiled=True)
        chunks = placed.reshape(part.shape[0], context, 2, -1, part.shape[2])
        # Early chunks ascend with the device, late ones descend.
        ordered = jnp.concatenate([chunks[:, :, 0], chunks[:, ::-1, 1]], axis=1)
        return ordered.reshape(placed.shape)[:, skip:]

    return _as_one(gather, parts)


def map_queries(
    function: Callable[..., Any], *queries: jax.Array, offset: jax.Array | int | None = None
) -> Any:
    """Applies a function to each chunk of queries.

    Args:
        function: of (*queries, query_offset), the position in the row of the first query, or None
            if the queries are the row; returns arrays with the queries on axis 1.
        *queries: parts [B, 2t, ...] that go together.
        offset: position in the row of the first query of all; None: they are the row.

    Returns:
        What `function` returns, as parts.
    """
    if context_size() == 1:
        return function(*queries, offset)
    size, first = queries[0].shape[1] // 2, 0 if offset is None else offset
    chunks = zip(*(jnp.split(part, 2, axis=1) for part in queries), strict=True)
    results = [
        function(*chunk, first + index * size)
        for chunk, index in zip(chunks, _own_chunks(), strict=True)
    ]
    return jax.tree.map(lambda *halves: jnp.concatenate(halves, axis=1), *results)


def map_windows(
    function: Callable[..., jax.Array],
    halo: int,
    queries: tuple[jax.Array, ...],
    keys: tuple[jax.Array, ...],
    segment_ids: jax.Array,
) -> jax.Array:
    """Applies a function to chunks, each with the keys of the `halo` tokens before it.

    Args:
        function: of (*queries, *keys, segment_ids), alike in length, to [B, T, ...]; the first
            `halo` queries are zeros, and their results are left out.
        halo: tokens before a chunk that its queries can see.
        queries: parts [B, 2t, ...].
        keys: parts of one type.
        segment_ids: int [B, T] of whole rows.

    Returns:
        What `function` returns, as a part.
    """
    if context_size() == 1:
        return function(*queries, *keys, segment_ids)

    def attend(*keys: jax.Array) -> jax.Array:
        padded = (_pad_front(_fold(part), halo) for part in queries)
        size = queries[0].shape[1] // 2
        return function(*padded, *keys, _slices(segment_ids, size, halo))[:, halo:]

    return map_chunks(attend, halo, keys)


def map_chunks(
    function: Callable[..., jax.Array], halo: int, parts: tuple[jax.Array, ...]
) -> jax.Array:
    """Applies a function to chunks, each with the `halo` tokens before it in the row.

    Args:
        function: of arrays [2B, halo + t, ...] to [2B, n, ...]; there are zeros before the row.
        halo: tokens to fetch from the devices that hold them.
        parts: [B, 2t, ...] of one type.

    Returns:
        [B, 2n, ...]; `function(*parts)` where rows are not shared.
    """
    if context_size() == 1:
        return function(*parts)
    result = function(*_as_one(lambda part: _with_halo(part, halo), parts))
    return result.reshape(parts[0].shape[0], -1, *result.shape[2:])


def _own_chunks() -> tuple[jax.Array, jax.Array]:
    index = jax.lax.axis_index(AXIS)
    return index, 2 * context_size() - 1 - index


def _fold(part: jax.Array) -> jax.Array:
    """[B, 2t, ...] -> [2B, t, ...]: chunks become rows."""
    return part.reshape(2 * part.shape[0], -1, *part.shape[2:])


def _with_halo(part: jax.Array, halo: int) -> jax.Array:
    """[B, 2t, F] -> [2B, halo + t, F]."""
    if halo == 0:
        return _fold(part)
    size = part.shape[1] // 2
    if halo > size:  # of several chunks: rows so short are gathered quickly
        return _slices(gather_rows(part)[0], size, halo)
    early, late = (chunk[:, size - halo :] for chunk in jnp.split(part, 2, axis=1))
    pairs = [(c, c + 1) for c in range(context_size() - 1)]
    before_early = jax.lax.ppermute(early, AXIS, pairs)
    before_late = jax.lax.ppermute(late, AXIS, [pair[::-1] for pair in pairs])
    # The last device holds the two chunks in the middle of the row.
    is_last = jax.lax.axis_index(AXIS) == context_size() - 1
    before_late = jnp.where(is_last, early, before_late)
    before = jnp.stack([before_early, before_late], axis=1)
    return jnp.concatenate([before.reshape(-1, *early.shape[1:]), _fold(part)], axis=1)


def _slices(row: jax.Array, size: int, halo: int) -> jax.Array:
    """The device's chunks of a row [B, T, ...], and what is before them: [2B, halo + size, ...]."""
    padded = _pad_front(row, halo)
    chunks = [
        jax.lax.dynamic_slice_in_dim(padded, index * size, halo + size, axis=1)
        for index in _own_chunks()
    ]
    return jnp.stack(chunks, axis=1).reshape(-1, *chunks[0].shape[1:])


def _pad_front(x: jax.Array, count: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (count, 0), *((0, 0) for _ in x.shape[2:])))


def _as_one(
    function: Callable[[jax.Array], jax.Array], parts: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
    """Applies a function of [B, T, F] that keeps features apart to several arrays as one."""
    flat = [part.reshape(*part.shape[:2], -1) for part in parts]
    sizes = [part.shape[2] for part in flat]
    joined = function(jnp.concatenate(flat, axis=2))
    split = jnp.split(joined, np.cumsum(sizes)[:-1], axis=2)
    return tuple(
        piece.reshape(*piece.shape[:2], *part.shape[2:])
        for piece, part in zip(split, parts, strict=True)
    )

"""selected_attention in Pallas Mosaic GPU, for Hopper.

The work is bound by what leaves the L2 cache: a block of keys serves the few rows of the groups
that chose it. So the forward pass and the query's gradient walk the union of the lists of
neighbouring groups (`tile_walk`), which fetches a block once for all of them; and the gradient of
the keys walks the inverse lists range by range of queries (`key_gradient`), so that what runs
together shares queries in the cache. `lists` builds both. Queries, outputs and their gradients stay
as the caller has them where 8 heads or more share a key head.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import blocks
from pallas_kernels.masked_attention import RESIDUAL_NAMES, from_rows, to_rows
from pallas_kernels.mosaic import tiles
from pallas_kernels.selected_attention import (
    forward,
    key_gradient,
    query_gradient,
    row_statistics,
)
from pallas_kernels.selected_attention.lists import Cells, clean_lists, inverse_lists, union_lists
from pallas_kernels.selected_attention.tile_walk import KEYS, Problem

MIN_ROWS_OF_GROUP = 8  # the rows of a tile of shared memory
GROUPS_PER_ITEM = 256  # bounds the serial work on a block that every group chose
# So many bytes of queries and output gradients of one key head are swept together: what is read
# again comes from the L2 cache. Measured: 38 MB is best for latents, 67 MB for other heads. But
# each range makes partial sums for every block before it, so there are not more than 16.
RANGE_BYTES, MAX_RANGES = 2**26, 16
ROPE_WIDTHS = (0, 32, 64)


def selected_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array | None,
    block_indices: jax.Array,
    block_size: int,
    queries_per_selection: int,
    value_dim: int | None,
    segment_ids: jax.Array | None,
    scale: float,
    query_offset: jax.Array | int | None = None,
    *,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """See `api.selected_attention`; `interpret` runs the kernels on a CPU, for tests.

    Raises:
      NotImplementedError: The kernels cannot take the call.
    """
    batch, length, num_heads, _ = query.shape
    num_kv_heads = key.shape[2]
    heads = num_heads // num_kv_heads
    padded_heads = _power_of_two(max(heads, MIN_ROWS_OF_GROUP // queries_per_selection))
    tail = -length % KEYS
    value_dim = value_dim or key.shape[3] if value is None else value.shape[3]
    problem = Problem(
        num_tokens=length + tail,
        num_kv_heads=num_kv_heads,
        heads=padded_heads,
        block_size=block_size,
        queries_per_selection=queries_per_selection,
        scale=scale,
        is_wide=value_dim == tiles.MAX_COLUMNS,
        interpret=interpret,
    )
    _check(problem, query, key, value, value_dim)
    key_tail = -key.shape[1] % KEYS
    query, key, value = _pad(query, 1, tail), _pad(key, 1, key_tail), _pad(value, 1, key_tail)
    num_groups = query.shape[1] // queries_per_selection
    # The padding of queries that are a part of the row may be behind that of the row.
    row_tail = key_tail if query_offset is None else key_tail + KEYS
    lists = clean_lists(
        _pad(block_indices, 1, num_groups - block_indices.shape[1], fill=-1),
        _pad(segment_ids, 1, row_tail),
        block_size,
        queries_per_selection,
        query_offset,
    )
    split = query.reshape(batch, length + tail, num_kv_heads, heads, -1)
    query = _pad(split, 3, padded_heads - heads).reshape(*query.shape[:2], -1, query.shape[3])
    offset = None if query_offset is None else jnp.asarray(query_offset, jnp.int32)[None]
    results = _attention(problem, value_dim, query, key, value, lists, offset)
    output, lse = (_drop_heads(x[:, :length], num_kv_heads, heads) for x in results)
    if segment_ids is not None:
        is_token = blocks.of_queries(segment_ids, length, query_offset)[..., None] > 0
        output = jnp.where(is_token[..., None], output, 0)
        lse = jnp.where(is_token, lse, -jnp.inf)
    return output, lse


def _check(
    problem: Problem, query: jax.Array, key: jax.Array, value: jax.Array | None, value_dim: int
) -> None:
    """Raises NotImplementedError, naming the value, for what the kernels do not take."""
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"query: {query.dtype}, the kernels take bfloat16 and float16")
    if any(x is not None and x.dtype != query.dtype for x in (key, value)):
        raise NotImplementedError("key, value: not of the type of query")
    if problem.block_size not in (16, 32, 64):
        raise NotImplementedError(f"block_size: {problem.block_size} is not 16, 32 or 64")
    if problem.block_size > problem.keys_per_step:
        raise NotImplementedError(f"block_size: {problem.block_size} with a value of {value_dim}")
    if problem.rows_per_group > tiles.ROWS:
        raise NotImplementedError(
            f"queries_per_selection: {problem.queries_per_selection} queries of {problem.heads} "
            f"heads of one key head are over {tiles.ROWS} rows"
        )
    head_dim = query.shape[3]
    if value is not None and (head_dim not in (64, 128) or value_dim not in (64, 128)):
        raise NotImplementedError(f"value: head dims {head_dim}/{value_dim} are not 64 or 128")
    if value is None and (
        value_dim not in (64, 128, 256, 512) or head_dim - value_dim not in ROPE_WIDTHS
    ):
        raise NotImplementedError(f"value_dim: {value_dim} of {head_dim} as one buffer")


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _pad[Array: (jax.Array, jax.Array | None)](
    array: Array, axis: int, number: int, fill: int = 0
) -> Array:
    """Pads an axis at its end; None stays None."""
    if array is None or number == 0:
        return array
    padding = [(0, 0)] * array.ndim
    padding[axis] = (0, number)
    return jnp.pad(array, padding, constant_values=fill)


def _drop_heads(array: jax.Array, num_kv_heads: int, heads: int) -> jax.Array:
    """Undoes the padding of the heads: [B, T, K * padded, ...] -> [B, T, K * heads, ...]."""
    batch, length, _, *rest = array.shape
    split = array.reshape(batch, length, num_kv_heads, -1, *rest)[:, :, :, :heads]
    return split.reshape(batch, length, num_kv_heads * heads, *rest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    problem: Problem,
    value_dim: int,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array | None,
    lists: jax.Array,
    query_offset: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Attends to the blocks of `lists.clean_lists`; T and S multiples of 64."""
    return _forward(problem, value_dim, query, key, value, lists, query_offset)[0]


def _forward(  # type: ignore[no-untyped-def]
    problem, value_dim, query, key, value, lists, query_offset
):
    rows = problem.to_rows(query)
    entries, counts = union_lists(lists, problem.groups_per_tile)
    outputs = []
    for start in range(0, value_dim, tiles.MAX_COLUMNS):
        columns = slice(start, min(start + tiles.MAX_COLUMNS, value_dim))
        output, lse = forward.forward(
            problem, rows, key, value, entries, counts, query_offset,
            value_columns=columns, num_stages=1 if value_dim > tiles.MAX_COLUMNS else 2,
        )  # fmt: skip
        outputs.append(output)
    output = outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=-1)
    output = checkpoint_name(problem.from_rows(output), RESIDUAL_NAMES[0])
    lse = checkpoint_name(lse, RESIDUAL_NAMES[1])
    residuals = rows, key, value, lists, query_offset, entries, counts, output, lse
    return (output, from_rows(lse / tiles.LOG2E, problem.num_tokens)), residuals


def _backward(problem, value_dim, residuals, cotangents):  # type: ignore[no-untyped-def]
    query, key, value, lists, query_offset, entries, counts, output, lse = residuals
    doutput, dlse = cotangents
    if value_dim > tiles.MAX_COLUMNS:
        raise NotImplementedError(f"value_dim: no gradient kernel for {value_dim}")
    delta = (doutput.astype(jnp.float32) * output).sum(-1)
    sees_any = lse > -jnp.inf
    delta, dlse = (to_rows(x, problem.num_kv_heads) for x in (delta, dlse))
    delta -= jnp.where(sees_any, dlse, 0)
    lse = jnp.where(sees_any, lse, 0)
    doutput = problem.to_rows(doutput)
    dquery = query_gradient.query_gradient(
        problem, query, key, value, doutput, lse, delta, entries, counts, query_offset,
        num_stages=4 if problem.is_wide else 2,
    )  # fmt: skip
    statistics = row_statistics.lay_out(problem, lse, delta)
    dkey, *dvalue = _key_gradients(
        problem, query, key, value, doutput, statistics, lists, query_offset
    )
    return problem.from_rows(dquery), dkey, *(dvalue or [None]), None, None


def _key_gradients(  # type: ignore[no-untyped-def]
    problem, query, key, value, doutput, statistics, lists, query_offset
) -> list[jax.Array]:
    """Gradients of the key and of the value if there is one."""
    batch, length, num_kv_heads, _ = key.shape
    numbers = problem.heads * (query.shape[-1] + doutput.shape[-1])
    in_cache = RANGE_BYTES // (numbers * doutput.dtype.itemsize)
    range_tokens = _power_of_two(max(in_cache // 2 + 1, -(-length // MAX_RANGES)))
    cells = Cells(
        num_heads=batch * num_kv_heads,
        num_groups=problem.num_tokens // problem.queries_per_selection,
        num_blocks=length // problem.block_size,
        groups_per_range=range_tokens // problem.queries_per_selection,
        blocks_per_range=range_tokens // problem.block_size if query_offset is None else None,
    )
    inverse = inverse_lists(lists, cells, GROUPS_PER_ITEM)
    items = key_gradient.key_gradient_items(
        problem, query, key, value, doutput, statistics, inverse, query_offset,
        num_stages=1 if problem.is_wide else 2,
    )  # fmt: skip
    arrays = (key,) if value is None else (key, value)
    return [
        key_gradient.sum_items(problem, part, inverse, cells, array)
        for part, array in zip(items, arrays, strict=True)
    ]


_attention.defvjp(_forward, _backward)

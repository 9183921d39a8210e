"""selected_attention in Pallas Mosaic GPU, for Hopper.

The work is bound by what leaves the L2 cache: a block of keys serves the few rows of the groups
that chose it. So the forward pass and the query's gradient walk the union of the lists of
neighbouring groups (`forward`), which fetches a block once for all of them; and the gradient of the
keys walks the inverse lists range by range of queries (`backward`), so that what runs together
shares queries in the cache. `lists` builds both. Heads are laid out as rows [B, K, T *
heads, width], which makes the rows of a tile one copy.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.masked_attention import RESIDUAL_NAMES, from_rows, to_rows
from pallas_kernels.mosaic import tiles
from pallas_kernels.selected_attention import backward, forward
from pallas_kernels.selected_attention.forward import KEYS, Problem
from pallas_kernels.selected_attention.lists import Cells, clean_lists, inverse_lists, union_lists

MIN_ROWS_OF_GROUP = 8  # the rows of a tile of shared memory
MAX_COLUMNS = 256  # float32 sums [64, 256] are half the registers of a warpgroup
GROUPS_PER_ITEM = 256  # bounds the serial work on a block that every group chose
# So many bytes of queries and output gradients of one key head are swept together: what is read
# again comes from the L2 cache. Measured: 38 MB is best for latents, 67 MB for heads of 64. But
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
    problem = Problem(block_size, queries_per_selection, padded_heads, scale, interpret)
    value_dim = value_dim or key.shape[3] if value is None else value.shape[3]
    _check(problem, query, key, value, value_dim)
    tail = -length % KEYS
    query, key = _pad(query, 1, tail), _pad(key, 1, tail)
    value = _pad(value, 1, tail)
    num_groups = query.shape[1] // queries_per_selection
    lists = clean_lists(
        _pad(block_indices, 1, num_groups - block_indices.shape[1], fill=-1),
        _pad(segment_ids, 1, tail),
        block_size,
        queries_per_selection,
    )
    split = query.reshape(batch, length + tail, num_kv_heads, heads, -1)
    query = _pad(split, 3, padded_heads - heads).reshape(*query.shape[:2], -1, query.shape[3])
    results = _attention(problem, value_dim, query, key, value, lists)
    output, lse = (_drop_heads(x[:, :length], num_kv_heads, heads) for x in results)
    if segment_ids is not None:
        is_token = segment_ids[..., None] > 0
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
    if problem.rows_per_group > tiles.ROWS:
        raise NotImplementedError(
            f"queries_per_selection: {problem.queries_per_selection} queries of {problem.heads} "
            f"heads of one key head are over {tiles.ROWS} rows"
        )
    head_dim = query.shape[3]
    if value is not None and (head_dim not in (64, 128) or value_dim not in (64, 128)):
        raise NotImplementedError(f"value: head dims {head_dim}/{value_dim} are not 64 or 128")
    if value is None and (
        value_dim not in (64, 128, 512) or head_dim - value_dim not in ROPE_WIDTHS
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


def _parts(array: jax.Array, value: jax.Array | None, value_dim: int) -> tuple[jax.Array, ...]:
    """Splits queries or keys where the value is a part of the key: copies cannot be 160 wide."""
    if value is not None or value_dim == array.shape[-1]:
        return (array,)
    return array[..., :value_dim], array[..., value_dim:]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    problem: Problem,
    value_dim: int,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array | None,
    lists: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Attends to the blocks of `lists.clean_lists`; T a multiple of 64."""
    return _forward(problem, value_dim, query, key, value, lists)[0]


def _forward(problem, value_dim, query, key, value, lists):  # type: ignore[no-untyped-def]
    length, num_kv_heads = key.shape[1:3]
    query_rows = _parts(to_rows(query, num_kv_heads), value, value_dim)
    keys = _parts(key, value, value_dim)
    entries, counts = union_lists(lists, problem.groups_per_tile)
    outputs = []
    for start in range(0, value_dim, MAX_COLUMNS):
        columns = slice(start, min(start + MAX_COLUMNS, value_dim))
        output, lse = forward.forward(
            problem, query_rows, keys, value, entries, counts,
            value_columns=columns, num_stages=1 if value_dim > MAX_COLUMNS else 2,
        )  # fmt: skip
        outputs.append(output)
    output = outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=-1)
    output = checkpoint_name(from_rows(output, length), RESIDUAL_NAMES[0])
    lse = checkpoint_name(lse, RESIDUAL_NAMES[1])
    residuals = query_rows, keys, value, lists, entries, counts, output, lse
    return (output, from_rows(lse / tiles.LOG2E, length)), residuals


def _backward(problem, value_dim, residuals, cotangents):  # type: ignore[no-untyped-def]
    query_rows, keys, value, lists, entries, counts, output, lse = residuals
    doutput, dlse = cotangents
    if value_dim > MAX_COLUMNS:
        raise NotImplementedError(f"value_dim: no gradient kernel for {value_dim}")
    length, num_kv_heads = keys[0].shape[1:3]
    delta = (doutput.astype(jnp.float32) * output).sum(-1)
    sees_any = lse > -jnp.inf
    delta = to_rows(delta, num_kv_heads) - jnp.where(sees_any, to_rows(dlse, num_kv_heads), 0)
    row_statistics = backward.statistics(problem, jnp.where(sees_any, lse, 0), delta)
    doutput = to_rows(doutput, num_kv_heads)
    dquery = backward.query_gradient(
        problem, query_rows, keys, value, doutput, row_statistics, entries, counts, num_stages=2
    )
    dquery = from_rows(jnp.concatenate(dquery, axis=-1), length)
    dkeys = _key_gradients(problem, query_rows, keys, value, doutput, row_statistics, lists)
    dvalue = None if value is None else dkeys.pop()
    unpadded = (x[..., : part.shape[-1]] for x, part in zip(dkeys, keys, strict=True))
    dkey = jnp.concatenate(list(unpadded), axis=-1)
    return dquery, dkey, dvalue, None


def _key_gradients(  # type: ignore[no-untyped-def]
    problem, query_rows, keys, value, doutput, row_statistics, lists
) -> list[jax.Array]:
    """Gradients [B, T, K, w] of the parts of the key, padded, and of the value if there is one."""
    batch, length, num_kv_heads, _ = keys[0].shape
    numbers = problem.heads * sum(part.shape[3] for part in (*query_rows, doutput))
    in_cache = RANGE_BYTES // (numbers * doutput.dtype.itemsize)
    range_tokens = _power_of_two(max(in_cache // 2 + 1, -(-length // MAX_RANGES)))
    cells = Cells(
        num_heads=batch * num_kv_heads,
        num_groups=length // problem.queries_per_selection,
        num_blocks=length // problem.block_size,
        groups_per_range=range_tokens // problem.queries_per_selection,
        blocks_per_range=range_tokens // problem.block_size,
    )
    inverse = inverse_lists(lists, cells, GROUPS_PER_ITEM)
    items = backward.key_gradient_items(
        problem, query_rows, keys, value, doutput, row_statistics, inverse, num_stages=2
    )
    lead, dtype = (batch, length, num_kv_heads), keys[0].dtype
    return [
        backward.sum_items(problem, part, inverse, cells, (*lead, part.shape[1]), dtype)
        for part in items
    ]


_attention.defvjp(_forward, _backward)

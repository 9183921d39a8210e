"""Checks of the arguments that the operations share; each error names the argument."""

import jax
import jax.numpy as jnp


def check_shape(name: str, array: jax.Array, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless `array` has exactly this shape."""
    if array.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(array.shape)}")


def check_integers(name: str, array: jax.Array, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless `array` holds integers and has exactly this shape."""
    check_shape(name, array, shape)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name}: expected integers, got {array.dtype}")


def check_positive(**sizes: int) -> None:
    """Raises ValueError unless every size is an int of at least 1."""
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}: expected an int of at least 1, got {size!r}")


def check_divides_block_size(name: str, size: int, block_size: int) -> None:
    """Raises ValueError unless `size` divides the block size."""
    if block_size % size:
        raise ValueError(f"{name}: {size} does not divide block_size {block_size}")


def check_starts_block(query_offset: jax.Array | int | None, block_size: int) -> None:
    """Raises ValueError if query_offset is known and does not start a block."""
    if isinstance(query_offset, int) and query_offset % block_size:
        raise ValueError(f"query_offset: {query_offset} is no multiple of block_size {block_size}")


def check_query_key(query: jax.Array, key: jax.Array, num_keys: int) -> None:
    """Raises ValueError unless query is [B, T, N, H] and key [B, num_keys, K, H], K dividing N."""
    if query.ndim != 4:
        raise ValueError(f"query: expected [B, T, N, H], got shape {list(query.shape)}")
    if key.ndim != 4:
        raise ValueError(f"key: expected [B, S, K, H], got shape {list(key.shape)}")
    batch, _, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[2]
    check_shape("key", key, (batch, num_keys, num_kv_heads, head_dim))
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(f"key: its {num_kv_heads} heads do not divide the {num_heads} of query")


def check_value(key: jax.Array, value: jax.Array | None, value_dim: int | None) -> None:
    """Raises ValueError unless value is [B, S, K, h], or None and value_dim a part of key's H."""
    if value is None:
        if value_dim is None or not 1 <= value_dim <= key.shape[3]:
            raise ValueError(
                f"value_dim: value=None needs 1 .. {key.shape[3]}, key's head dim, got {value_dim}"
            )
        return
    if value.ndim != 4:
        raise ValueError(f"value: expected [B, S, K, h], got shape {list(value.shape)}")
    check_shape("value", value, (*key.shape[:3], value.shape[3]))
    if value_dim not in (None, value.shape[3]):
        raise ValueError(f"value_dim: {value_dim}, but the head dim of value is {value.shape[3]}")


def check_segment_ids(segment_ids: jax.Array | None, query: jax.Array, row_length: int) -> None:
    """Raises ValueError unless segment_ids is None or integers [B, row_length]."""
    if segment_ids is not None:
        check_integers("segment_ids", segment_ids, (query.shape[0], row_length))


def row_length(
    query: jax.Array, segment_ids: jax.Array | None, query_offset: jax.Array | int | None
) -> int:
    """Returns S, the tokens of the row that queries [B, T, N, H] are from.

    Raises:
      ValueError: query_offset comes without segment_ids, of which S is the length, or is no int [].
    """
    if query_offset is None:
        return query.shape[1]
    if segment_ids is None or segment_ids.ndim != 2:
        raise ValueError("segment_ids: query_offset needs those of the whole row, [B, S]")
    check_integers("query_offset", jnp.asarray(query_offset), ())
    return segment_ids.shape[1]

"""Checks of the arguments that the operations on a cache share; each error names the argument."""

import jax

from pallas_kernels.arguments import check_integers, check_shape

KEYS_MULTIPLE = 8  # keys of a cache that the kernels take: they copy so many at least


def check_cache(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array | None,
    rope_key: jax.Array | None,
    lengths: jax.Array,
) -> None:
    """Raises ValueError unless a query [B, N, H] a row and its cache of keys fit together."""
    check_keys(query, key, value, rope_key)
    check_integers("lengths", lengths, query.shape[:1])


def check_keys(
    query: jax.Array, key: jax.Array, value: jax.Array | None, rope_key: jax.Array | None
) -> None:
    """Raises ValueError unless a query [B, N, H] a row and keys and values fit together."""
    if query.ndim != 3:
        raise ValueError(f"query: expected [B, N, H], got shape {list(query.shape)}")
    if key.ndim != 4:
        raise ValueError(f"key: expected [B, S, K, R], got shape {list(key.shape)}")
    batch, num_heads, head_dim = query.shape
    num_keys, num_kv_heads, width = key.shape[1:]
    if rope_key is None:
        check_shape("key", key, (batch, num_keys, num_kv_heads, head_dim))
    else:
        check_shape("key", key, (batch, *key.shape[1:]))
        check_shape("rope_key", rope_key, (batch, num_keys, head_dim - width))
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(f"key: its {num_kv_heads} heads do not divide the {num_heads} of query")
    if value is not None:
        if value.ndim != 4:
            raise ValueError(f"value: expected [B, S, K, h], got shape {list(value.shape)}")
        check_shape("value", value, (*key.shape[:3], value.shape[3]))


def check_lists(query: jax.Array, key: jax.Array, block_indices: jax.Array) -> None:
    """Raises ValueError unless there is a list of blocks, int [B, K, L], for each key head."""
    if block_indices.ndim != 3:
        raise ValueError(f"block_indices: expected [B, K, L], got {list(block_indices.shape)}")
    list_shape = (query.shape[0], key.shape[2], block_indices.shape[2])
    check_integers("block_indices", block_indices, list_shape)

"""Checks of the arguments that the operations share; each error names the argument."""

import jax
import jax.numpy as jnp


def check_shape(name: str, array: jax.Array, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless `array` has exactly this shape."""
    if array.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(array.shape)}")


def check_positive(**sizes: int) -> None:
    """Raises ValueError unless every size is an int of at least 1."""
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}: expected an int of at least 1, got {size!r}")


def check_divides(divisor_name: str, divisor: int, name: str, size: int) -> None:
    """Raises ValueError unless `divisor` divides `size`."""
    if size % divisor:
        raise ValueError(f"{divisor_name}: {divisor} does not divide {name} {size}")


def check_query_key(query: jax.Array, key: jax.Array, num_keys: int) -> None:
    """Checks query [B, T, N, H] against key [B, num_keys, K, H], where K divides N."""
    if query.ndim != 4:
        raise ValueError(f"query: expected [B, T, N, H], got shape {list(query.shape)}")
    if key.ndim != 4:
        raise ValueError(f"key: expected [B, S, K, H], got shape {list(key.shape)}")
    batch, _, num_heads, head_dim = query.shape
    check_shape("key", key, (batch, num_keys, key.shape[2], head_dim))
    if key.shape[2] == 0 or num_heads % key.shape[2]:
        raise ValueError(f"key: its {key.shape[2]} heads do not divide the {num_heads} of query")


def check_value(key: jax.Array, value: jax.Array | None, value_dim: int | None) -> None:
    """Checks value [B, S, K, h] against key; without it, value_dim says how much of key it is."""
    if value is not None:
        if value.ndim != 4 or value.shape[:3] != key.shape[:3]:
            raise ValueError(
                f"value: expected {[*key.shape[:3], 'h']} as key has, got shape {list(value.shape)}"
            )
        if value_dim not in (None, value.shape[3]):
            raise ValueError(f"value_dim: {value_dim} but value has head dim {value.shape[3]}")
    elif value_dim is None or not 1 <= value_dim <= key.shape[3]:
        raise ValueError(
            f"value_dim: value=None needs one of 1 .. {key.shape[3]} (head dim of key), got {value_dim}"
        )


def check_segment_ids(segment_ids: jax.Array | None, query: jax.Array) -> None:
    """Checks segment_ids, integers [B, T], if there are any."""
    if segment_ids is None:
        return
    check_shape("segment_ids", segment_ids, query.shape[:2])
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(f"segment_ids: expected integers, got {segment_ids.dtype}")

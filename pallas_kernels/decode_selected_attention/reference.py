"""Definition of decode_selected_attention in XLA."""

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention.reference import attend_visible


def decode_selected_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array | None,
    block_indices: jax.Array,
    lengths: jax.Array,
    block_size: int,
    rope_key: jax.Array | None,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """See `api.decode_selected_attention`; gathers the blocks."""
    tokens, visible = listed_tokens(block_indices, lengths, block_size)
    by_token = tokens.swapaxes(1, 2)

    def gather(x: jax.Array) -> jax.Array:
        # The newest block may reach behind the cache, where nothing is visible.
        return jnp.take_along_axis(x, by_token[..., None], axis=1, mode="clip")

    value = None if value is None else gather(value)
    if rope_key is not None:
        rows = jnp.arange(tokens.shape[0])[:, None, None]
        rope_key = rope_key.at[rows, by_token].get(mode="clip")
    return attend_visible(query, gather(key), value, rope_key, visible, scale)


def listed_tokens(
    block_indices: jax.Array, lengths: jax.Array, block_size: int
) -> tuple[jax.Array, jax.Array]:
    """Positions of the tokens of listed blocks, int [B, K, L * block_size], and which are seen."""
    first = jnp.diff(block_indices, axis=2, prepend=-1) != 0  # not a repetition
    tokens = block_indices[..., None] * block_size + jnp.arange(block_size)
    visible = (first & (block_indices >= 0))[..., None] & (tokens < lengths[:, None, None, None])
    shape = (*block_indices.shape[:2], -1)
    return jnp.maximum(tokens, 0).reshape(shape), visible.reshape(shape)

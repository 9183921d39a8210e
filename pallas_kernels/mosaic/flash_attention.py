"""Differentiable attention to a contiguous range of keys per token, on Hopper GPUs.

The sliding window and the attention to compressed blocks are this operation with different ranges.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.chunking import pad_to_multiple
from pallas_kernels.masked_attention import RESIDUAL_NAMES
from pallas_kernels.mosaic import key_range, key_walk, tiles
from pallas_kernels.mosaic.flash_dkv import flash_dkv
from pallas_kernels.mosaic.flash_dq import flash_dq
from pallas_kernels.mosaic.flash_forward import flash_forward
from pallas_kernels.mosaic.key_range import Documents, KeyRange

PADDING = 128  # tokens and keys come in multiples of it
# Programs of the gradient of keys that are enough: heads are cut until there are about four for
# each multiprocessor; tokens, where every program fetches its keys for less work, for two.
PROGRAMS_BY_HEADS, PROGRAMS_BY_TOKENS, MAX_TOKEN_PARTS = 512, 256, 4


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is static of a call.

    Attributes:
      name: Of the operation, for profiles.
      key_range: The keys that a token sees.
      value_dim: h.
      scale: Factor of the scores.
      warpgroups: Warpgroups of a program that compute; interpret mode takes one.
      interpret: Parameters of interpret mode, for tests.
    """

    name: str
    key_range: KeyRange
    value_dim: int
    scale: float
    warpgroups: int = 2
    interpret: Any = None


def flash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array | None,
    segment_ids: jax.Array | None,
    query_offset: jax.Array | int | None,
    settings: Settings,
) -> tuple[jax.Array, jax.Array]:
    """Attends from each token to its range of keys.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H].
      value: [B, S, K, h], or None: the first h numbers of each key.
      segment_ids: int, document of each token of the row, 0 = padding; None = one document a row.
      query_offset: int32 [], position in the row of the first query; None = they are the row.
      settings: The rest.

    Returns:
      Output [B, T, N, h] in query's dtype, log-sum-exp [B, T, N] in float32.

    Raises:
      NotImplementedError: The kernels do not take these types or sizes.
    """
    _check(query, key, value, settings.value_dim)
    length = query.shape[1]
    query, key = pad_to_multiple(query, PADDING), pad_to_multiple(key, PADDING)
    value = None if value is None else pad_to_multiple(value, PADDING)
    documents = None
    if segment_ids is not None:
        segment_ids = pad_to_multiple(segment_ids.astype(jnp.int32), PADDING)
        if query_offset is not None:  # the padding of queries may be behind that of the row
            segment_ids = jnp.pad(segment_ids, ((0, 0), (0, PADDING)))
        documents = key_range.documents(
            segment_ids, query.shape[1], key.shape[1], settings.key_range.stride, query_offset
        )
    output, lse = _attend(query, key, value, documents, settings)
    return output[:, :length], lse[:, :length]


def _check(query: jax.Array, key: jax.Array, value: jax.Array | None, value_dim: int) -> None:
    arrays = {"query": query, "key": key} | ({} if value is None else {"value": value})
    for name, array in arrays.items():
        if array.dtype not in (jnp.bfloat16, jnp.float16) or array.dtype != query.dtype:
            raise NotImplementedError(f"{name}: {array.dtype} is not query's bfloat16 or float16")
    head_dim = query.shape[-1]
    is_wide = value is None and head_dim > key_walk.NARROW
    limits = (320, 256) if is_wide else (key_walk.NARROW, 128)
    for name, size, limit in zip(("key", "value"), (head_dim, value_dim), limits, strict=True):
        if size % 32 or size > limit:
            raise NotImplementedError(f"{name}: head dim {size} is no multiple of 32 to {limit}")
    if value is None and value_dim % math.gcd(head_dim, 64):
        raise NotImplementedError(f"value_dim: {value_dim} of {head_dim} cuts a tile of the key")


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array | None,
    documents: Documents | None,
    settings: Settings,
) -> tuple[jax.Array, jax.Array]:
    return _forward(query, key, value, documents, settings)[0]


def _forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array | None,
    documents: Documents | None,
    settings: Settings,
) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
    output, lse = flash_forward(
        query,
        key,
        value,
        documents,
        key_range=settings.key_range,
        value_dim=settings.value_dim,
        scale=settings.scale,
        name=f"{settings.name}_forward",
        warpgroups=settings.warpgroups,
        interpret=settings.interpret,
    )
    output = checkpoint_name(output, RESIDUAL_NAMES[0])
    lse = checkpoint_name(lse, RESIDUAL_NAMES[1])
    natural = jnp.where(lse == jnp.inf, -jnp.inf, lse / tiles.LOG2E).transpose(0, 2, 1)
    return (output, natural), (query, key, value, documents, output, lse)


def _backward(
    settings: Settings, residuals: tuple[Any, ...], cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array | None, ...]:
    query, key, value, documents, output, lse = residuals
    doutput, dlse = cotangents
    dlse = dlse.transpose(0, 2, 1)
    shared_settings = {
        "key_range": settings.key_range,
        "scale": settings.scale,
        "warpgroups": settings.warpgroups,
        "interpret": settings.interpret,
    }
    dquery, delta = flash_dq(
        query, key, value, output, doutput, lse, dlse, documents,
        name=f"{settings.name}_dq", **shared_settings,
    )  # fmt: skip
    head_parts, token_parts = _parts(query, key, settings)
    dkey, dvalue = flash_dkv(
        query, key, value, doutput, lse, delta, documents,
        head_parts=head_parts, token_parts=token_parts, name=f"{settings.name}_dkv",
        **shared_settings,
    )  # fmt: skip
    return dquery, dkey, dvalue, None


def _parts(query: jax.Array, key: jax.Array, settings: Settings) -> tuple[int, int]:
    """Returns in how many parts of heads and of tokens the gradient of the keys is cut."""
    batch, num_keys, num_kv_heads, _ = key.shape
    group = query.shape[2] // num_kv_heads
    programs = batch * num_kv_heads * num_keys // (settings.warpgroups * tiles.ROWS)
    divisors = (part for part in range(1, group + 1) if group % part == 0)
    head_parts = next((p for p in divisors if p * programs >= PROGRAMS_BY_HEADS), group)
    return head_parts, min(max(1, PROGRAMS_BY_TOKENS // (programs * head_parts)), MAX_TOKEN_PARTS)


_attend.defvjp(_forward, _backward)

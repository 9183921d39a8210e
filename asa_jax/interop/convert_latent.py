"""Grouped-query attention as latent attention: a fit of keys and values on real tokens.

After TransMLA (arXiv 2502.07864) and MHA2MLA (arXiv 2502.14837). Query head n of N reads key/value
head k = n // (N / K), a query q_n = W_Q,n x against a key k_k = W_K,k x, both rotated in pairs of
features (l, l + H/2).

1. The rotated key. Pairs of one frequency can be mixed across heads before they are rotated. Latent
   attention has HR / 2 frequencies and one key for all heads: each takes the first principal
   component u of the pairs, of all heads, whose frequencies lie between its own and the next, with
   the query q_n . u. The rest of the key, k - u u^T k, loses its rotation. Exact where there is one
   key/value head and HR = H.
2. The latent. The rest of the keys and the values of the heads that a latent serves, each divided
   by its root mean square, are projected on their R first principal components. Exact where R is
   twice the features of these heads.
3. The heads. Where HC < H or h < H, the products W_Q,n^T W_UK,n and W_UV,n^T W_O,n are replaced by
   their best approximation of that rank.

The gates of a `global` layer come from a least-squares fit on the same tokens: they have no bias,
but hidden states have a direction in common.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from asa_jax.config import ModelConfig

# Gates of compression and selection start near sigmoid(-4) = 0.02 and sigmoid(4) = 0.98: attention
# to selected tokens is what the pretrained layer did, and both still learn.
GATE_LOGITS = (-4.0, 4.0)
# Share of the mean feature variance that is added to every variance in the fit of the gates.
RIDGE = 1e-3


class LatentFit(NamedTuple):
    """Parameters of a latent attention layer, and how well it keeps keys and values.

    Attributes:
        params: nested dict, as `LatentAttention` or `GroupLatentAttention` hold them.
        key_error: root of the energy of keys that the latent loses, relative to all of it.
        value_error: the same of values.
    """

    params: dict[str, Any]
    key_error: jax.Array
    value_error: jax.Array


class _Rotary(NamedTuple):
    """What keeps its rotation, and keys without it.

    Attributes:
        query: [D, N, HR].
        key: [D, HR].
        rest: [D, K, H], keys without the part that `key` holds.
    """

    query: jax.Array
    key: jax.Array
    rest: jax.Array


class _Latent(NamedTuple):
    """A latent, or several.

    Attributes:
        down: [D, R], or [D, latents, R].
        key_up: [R, n, H], of the query heads that it serves.
        value_up: [R, n, H].
        lost: energy [2] of keys and values outside of the latent.
        energy: energy [2] of keys and values.
    """

    down: jax.Array
    key_up: jax.Array
    value_up: jax.Array
    lost: jax.Array
    energy: jax.Array


def fit_latent(
    attention: dict[str, Any],
    source: ModelConfig,
    target: ModelConfig,
    kind: str,
    x: jax.Array,
    counted: jax.Array,
) -> LatentFit:
    """Fits a latent attention layer to a grouped-query layer.

    Args:
        attention: parameters of `GroupedQueryAttention`.
        source: the model they are of.
        target: the model of the result; `latent_norm` false for an exact fit at full rank.
        kind: `mla`, `local` or `global`.
        x: [B, T, D], inputs of the layer on real text.
        counted: bool [B, T], false for padding.

    Returns:
        The fit.
    """
    x = jnp.where(counted[..., None], x.astype(jnp.float32), 0)
    query = attention["query"]["weight"]
    key, value = attention["key_value"]["weight"]
    kv_head = np.arange(source.num_heads) // (source.num_heads // source.num_kv_heads)
    rotary = _split_rotary(query, key, kv_head, target.qk_rope_head_dim, x)

    global_ = kind == "global"
    groups = target.num_latent_groups if global_ else 1
    rank = target.group_kv_lora_rank if global_ else target.kv_lora_rank
    parts = [
        _fit_group(rotary.rest, key, value, heads, rank, target.latent_norm, x)
        for heads in np.split(kv_head, groups)
    ]
    latent = _Latent(
        down=jnp.stack([part.down for part in parts], axis=1),
        key_up=jnp.concatenate([part.key_up for part in parts], axis=1),
        value_up=jnp.concatenate([part.value_up for part in parts], axis=1),
        lost=jnp.sum(jnp.stack([part.lost for part in parts]), axis=0),
        energy=jnp.sum(jnp.stack([part.energy for part in parts]), axis=0),
    )
    nope, key_up = _factorise(query, latent.key_up, target.qk_nope_head_dim)
    output = jnp.moveaxis(attention["output"]["weight"], -1, 0)
    value_up, output = _factorise(latent.value_up, output, target.v_head_dim)
    # Latent attention divides scores by the root of another head size.
    scale = target.score_scale(target.qk_nope_head_dim + target.qk_rope_head_dim)
    rescale = source.score_scale(source.head_dim) / scale
    rescale *= source.rope_scaling.attention_factor**2
    rotated = rotary.query / target.rope_scaling.attention_factor**2
    weights = {
        "down": latent.down if global_ else latent.down[:, 0],
        "rope_key": rotary.key,
        "key_up": key_up,
        "value_up": value_up,
        "output": jnp.moveaxis(output, 0, -1),
    }
    if global_:
        weights["gates"] = _fit_gates(x, counted, source.num_heads)
    params: dict[str, Any] = {name: {"weight": weight} for name, weight in weights.items()}
    asked = rescale * jnp.concatenate([nope, rotated], axis=-1)
    params["query"] = {"up": {"weight": asked}}
    if target.latent_norm:
        params["norm"] = {"scale": jnp.ones(rank)}
    return LatentFit(params, *jnp.sqrt(latent.lost / latent.energy))


def _split_rotary(
    query: jax.Array, key: jax.Array, kv_head: np.ndarray, size: int, x: jax.Array
) -> _Rotary:
    """Takes one rotated key of `size` features out of the keys of all heads.

    Args:
        query: [D, N, H].
        key: [D, K, H].
        kv_head: int [N], the key head of each query head.
        size: HR.
        x: [B, T, D].
    """
    query_pairs = query.reshape(*query.shape[:2], 2, -1)
    key_pairs = key.reshape(*key.shape[:2], 2, -1)
    heads, frequencies = key_pairs.shape[1], key_pairs.shape[3]
    keys = jnp.einsum("BTD,DKEF->BTEKF", x, key_pairs).reshape(*x.shape[:2], 2, -1)
    energy = jnp.einsum("BTEP,BTEQ->PQ", keys, keys)

    # Source frequency i is theta^(-i / F), target frequency j is theta^(-j / F').
    nearest = np.arange(frequencies) * (size // 2) // frequencies
    member = np.tile(nearest == np.arange(size // 2)[:, None], heads)
    of_frequency = jnp.where(member[:, :, None] & member[:, None, :], energy, 0)
    direction = jnp.linalg.eigh(of_frequency)[1][..., -1] * member
    direction = direction.reshape(-1, heads, frequencies)

    kept = jnp.einsum("DKEF,JKF->DEJ", key_pairs, direction)
    rest = key_pairs - jnp.einsum("DEJ,JKF->DKEF", kept, direction)
    asked = jnp.einsum("DNEF,JNF->DNEJ", query_pairs, direction[:, kv_head])
    return _Rotary(
        asked.reshape(*asked.shape[:2], size), kept.reshape(-1, size), rest.reshape(key.shape)
    )


def _fit_group(
    rest: jax.Array,
    key: jax.Array,
    value: jax.Array,
    heads: np.ndarray,
    rank: int,
    normed: bool,
    x: jax.Array,
) -> _Latent:
    """Principal components of the keys and values that one latent serves.

    Args:
        rest: [D, K, H], keys without their rotated part.
        key: [D, K, H].
        value: [D, K, H].
        heads: int [n], the key/value head of each query head that the latent serves.
        rank: R.
        normed: whether an RMSNorm follows, which latents should pass with the least change.
        x: [B, T, D].
    """
    served, index = np.unique(heads, return_inverse=True)
    rest, key, value = (w[:, served] for w in (rest, key, value))
    energy = jnp.stack([jnp.sum(jnp.einsum("BTD,DKH->BTKH", x, w) ** 2) for w in (key, value)])
    # Balanced, or the larger keys would take all components.
    balance = jnp.repeat(jnp.sqrt(energy), key[0].size)
    weight = jnp.concatenate([w.reshape(len(w), -1) for w in (rest, value)], axis=1) / balance
    features = jnp.einsum("BTD,DM->BTM", x, weight)
    variances, basis = jnp.linalg.eigh(jnp.einsum("BTM,BTL->ML", features, features))
    variances, basis = jnp.maximum(variances[::-1], 0), basis[:, ::-1]  # the largest first
    lost = jnp.sum(basis[:, rank:] ** 2 * variances[rank:], axis=1)

    basis = basis[:, :rank]
    size = jnp.sqrt(jnp.sum(variances[:rank]) / x[..., 0].size / rank) if normed else 1.0
    down, up = (_widen(w, rank) for w in (weight @ basis / size, basis * balance[:, None] * size))
    up = up.T
    up = up.reshape(rank, 2, *key.shape[1:])[:, :, index]
    return _Latent(down, up[:, 0], up[:, 1], lost.reshape(2, -1).sum(axis=1) * energy, energy)


def _factorise(left: jax.Array, right: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Gives head n of left [A, N, H] and right [C, N, H] `size` features for H.

    The product over the features stays, or is the best approximation of that rank.
    """
    if size >= left.shape[-1]:
        return _widen(left, size), _widen(right, size)
    (q_left, r_left), (q_right, r_right) = (
        jnp.linalg.qr(jnp.moveaxis(w, 1, 0)) for w in (left, right)
    )
    product = r_left @ jnp.matrix_transpose(r_right)
    u, values, v = jnp.linalg.svd(product, full_matrices=False)
    root = jnp.sqrt(values[:, None, :size])
    left = q_left @ u[..., :size] * root
    right = q_right @ jnp.matrix_transpose(v)[..., :size] * root
    return _widen(jnp.moveaxis(left, 0, 1), size), _widen(jnp.moveaxis(right, 0, 1), size)


def _fit_gates(x: jax.Array, counted: jax.Array, heads: int) -> jax.Array:
    """Weights [D, N, 2] whose products with tokens x [B, T, D] are nearest to GATE_LOGITS."""
    tokens = jnp.maximum(jnp.sum(counted), 1)
    mean = jnp.sum(x, axis=(0, 1)) / tokens
    second = jnp.einsum("BTD,BTE->DE", x, x) / tokens
    ridge = RIDGE * jnp.mean(jnp.diag(second)) * jnp.eye(len(mean))
    constant = jnp.linalg.solve(second + ridge, mean)
    gates = constant[:, None, None] * jnp.array(GATE_LOGITS)
    return jnp.broadcast_to(gates, (len(mean), heads, 2))


def _widen(x: jax.Array, size: int) -> jax.Array:
    """Appends zeros to the last axis up to `size`."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])

"""Next-token loss that never holds the logits of a whole sequence.

With hidden states x_t, unembedding W and targets y_t,

    nll_t = logsumexp(x_t W) - (x_t W)[y_t],    d nll_t / d logits = softmax(x_t W) - onehot(y_t).

The sequence is walked in chunks, forwards and again backwards, where the logits of a chunk are
computed anew. Logits and the gradient of W accumulate in float32.
"""

import functools
import math

import jax
import jax.numpy as jnp

from asa_jax.sharding import LOGICAL_TO_MESH, constrain


def token_nll(
    hidden: jax.Array, unembedding: jax.Array, targets: jax.Array, chunk_tokens: int
) -> jax.Array:
    """Negative log-likelihood of each target, in nats.

    Args:
        hidden: [B, T, D].
        unembedding: [D, V], of the dtype of `hidden`.
        targets: int [B, T] in [0, V).
        chunk_tokens: tokens, over the rows of one device, whose logits exist at a time.

    Returns:
        float32 [B, T].
    """
    return _join(_chunked_nll(*_chunks(hidden, unembedding, targets, chunk_tokens)), targets.shape)


def token_scores(
    hidden: jax.Array, unembedding: jax.Array, targets: jax.Array, chunk_tokens: int
) -> tuple[jax.Array, jax.Array]:
    """What evaluation asks of each target: its `token_nll`, and whether it is the argmax.

    Args:
        hidden: [B, T, D].
        unembedding: [D, V], of the dtype of `hidden`.
        targets: int [B, T] in [0, V).
        chunk_tokens: tokens, over the rows of one device, whose logits exist at a time.

    Returns:
        Nats, float32 [B, T], and bool [B, T]. Without gradient.
    """
    hidden, unembedding, labels = _chunks(hidden, unembedding, targets, chunk_tokens)

    def body(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, y = chunk
        logits = _logits(x, unembedding)
        nll, _ = _nll_and_lse(logits, y)
        return nll, jnp.argmax(logits, axis=-1) == y

    nll, correct = jax.lax.map(body, (hidden, labels))
    return _join(nll, targets.shape), _join(correct, targets.shape)


def _chunks(
    hidden: jax.Array, unembedding: jax.Array, targets: jax.Array, chunk_tokens: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Hidden states and targets cut into chunks, and the unembedding as every chunk reads it."""
    rows, length, _ = hidden.shape
    parts = _num_shards("sequence")
    rows_here = max(1, rows // _num_shards("batch"))
    chunk = min(max(1, chunk_tokens // rows_here), -(-length // parts))
    chunks = -(-length // (parts * chunk))
    # The vocabulary matrix is gathered over fsdp once, not for every chunk.
    unembedding = constrain(unembedding, "activation", "vocab")
    split = functools.partial(_split, parts=parts, chunks=chunks)
    return split(hidden), unembedding, split(targets)


def _join(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Undoes `_split` for [chunks, B, parts, t] and cuts the padding off."""
    rows, length = shape
    return jnp.moveaxis(x, 0, 2).reshape(rows, -1)[:, :length]


def _num_shards(axis: str) -> int:
    """Shards of a logical axis on the mesh in context."""
    mesh_axes = LOGICAL_TO_MESH[axis] or ()
    names = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes.get(name, 1) for name in names)


def _split(x: jax.Array, parts: int, chunks: int) -> jax.Array:
    """Cuts [B, T, ...] into [chunks, B, parts, t, ...]: each chunk takes t tokens of every part.

    Parts are the shards of the sequence, so that every device works on every chunk.
    """
    rows, length, *rest = x.shape
    chunk = -(-length // (parts * chunks))
    padding = parts * chunks * chunk - length
    x = jnp.pad(x, ((0, 0), (0, padding), *((0, 0) for _ in rest)))
    x = jnp.moveaxis(x.reshape(rows, parts, chunks, chunk, *rest), 2, 0)
    return constrain(x, "layers", "batch", "sequence", *["activation"] * (x.ndim - 3))


def _logits(hidden: jax.Array, unembedding: jax.Array) -> jax.Array:
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    return jnp.einsum("...D,DV->...V", hidden, unembedding, preferred_element_type=wide)


def _is_target(logits: jax.Array, targets: jax.Array) -> jax.Array:
    # A comparison, unlike a gather, stays on its shard where the vocabulary is sharded.
    return (
        jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) == targets[..., None]
    )


def _nll_and_lse(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    lse = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.sum(jnp.where(_is_target(logits, targets), logits, 0), axis=-1)
    return lse - picked, lse


@jax.custom_vjp
def _chunked_nll(hidden: jax.Array, unembedding: jax.Array, targets: jax.Array) -> jax.Array:
    return _chunked_nll_forward(hidden, unembedding, targets)[0]


def _chunked_nll_forward(
    hidden: jax.Array, unembedding: jax.Array, targets: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    def body(_: None, chunk: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, ...]]:
        x, y = chunk
        logits = _logits(x, unembedding)
        return None, _nll_and_lse(logits, y)

    _, (nll, lse) = jax.lax.scan(body, None, (hidden, targets))
    return nll, (hidden, unembedding, targets, lse)


def _chunked_nll_backward(
    saved: tuple[jax.Array, ...], d_nll: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    hidden, unembedding, targets, lse = saved

    def body(d_unembedding: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        x, y, lse, d = chunk
        logits = _logits(x, unembedding)
        probability = jnp.exp(logits - lse[..., None])
        d_logits = (probability - _is_target(logits, y)) * d[..., None]
        d_logits = d_logits.astype(x.dtype)
        d_x = jnp.einsum("...V,DV->...D", d_logits, unembedding)
        d_unembedding += jnp.einsum(
            "BPTD,BPTV->DV", x, d_logits, preferred_element_type=d_unembedding.dtype
        )
        return d_unembedding, d_x

    start = jnp.zeros_like(unembedding, dtype=lse.dtype)
    d_unembedding, d_hidden = jax.lax.scan(body, start, (hidden, targets, lse, d_nll))
    return d_hidden, d_unembedding.astype(unembedding.dtype), None


_chunked_nll.defvjp(_chunked_nll_forward, _chunked_nll_backward)

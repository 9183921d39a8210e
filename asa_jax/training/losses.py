"""Next-token loss that never holds the logits of a whole sequence.

With hidden states x_t, unembedding W and targets y_t,

    nll_t = logsumexp(x_t W) - (x_t W)[y_t],    d nll_t / d logits = softmax(x_t W) - onehot(y_t).

The sequence is walked once, in chunks. Nothing follows the loss, so its gradients are those of the
sum of all nll_t up to a factor that the backward pass brings; they are computed with the loss, from
logits that are computed once. Logits and the gradient of W accumulate in float32.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from asa_jax.sharding import gather_embed, sharded, tensor_shards

HIDDEN = ("batch", "sequence", "activation")
UNEMBEDDING = ("embed", "vocab")
TOKENS = ("batch", "sequence")


@jax.named_scope("loss")
def summed_nll(
    hidden: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
    counted: jax.Array,
    chunk_tokens: int,
) -> jax.Array:
    """Sum of the negative log-likelihoods of the targets that count, in nats.

    Args:
        hidden: [B, T, D].
        unembedding: [D, V], of the dtype of `hidden`.
        targets: int [B, T] in [0, V).
        counted: bool [B, T].
        chunk_tokens: tokens, over the rows of one device, whose logits exist at a time.

    Returns:
        float32 [].
    """

    def nll(
        hidden: jax.Array, unembedding: jax.Array, targets: jax.Array, counted: jax.Array
    ) -> jax.Array:
        chunks = _chunks((hidden, targets, counted), chunk_tokens)
        return _chunked_nll(gather_embed(unembedding, axis=0), *chunks)[None, None]

    parts = sharded(nll, (HIDDEN, UNEMBEDDING, TOKENS, TOKENS), TOKENS)
    return jnp.sum(parts(hidden, unembedding, targets, counted))


def token_scores(
    hidden: jax.Array, unembedding: jax.Array, targets: jax.Array, chunk_tokens: int
) -> tuple[jax.Array, jax.Array]:
    """What evaluation asks of each target: its nll, and whether it is the argmax.

    Args:
        hidden: [B, T, D].
        unembedding: [D, V], of the dtype of `hidden`.
        targets: int [B, T] in [0, V).
        chunk_tokens: tokens, over the rows of one device, whose logits exist at a time.

    Returns:
        Nats, float32 [B, T], and bool [B, T]. Without gradient.
    """

    def scores(
        hidden: jax.Array, unembedding: jax.Array, targets: jax.Array
    ) -> tuple[jax.Array, ...]:
        unembedding = gather_embed(unembedding, axis=0)

        def body(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            x, y = chunk
            logits = _logits(x, unembedding)
            nll, _ = _nll_and_lse(logits, y)
            return nll, _argmax(logits) == y

        results = jax.lax.map(body, _chunks((hidden, targets), chunk_tokens))
        return tuple(_join(result, targets.shape) for result in results)

    score = sharded(scores, (HIDDEN, UNEMBEDDING, TOKENS), (TOKENS, TOKENS))
    return score(hidden, unembedding, targets)


def _chunks(arrays: tuple[jax.Array, ...], chunk_tokens: int) -> tuple[jax.Array, ...]:
    """Arrays [B, T, ...] in chunks [chunks, B, t, ...], the last padded with zeros."""
    rows, length = arrays[0].shape[:2]
    size = min(max(1, chunk_tokens // rows), length)
    count = -(-length // size)
    size = -(-length // count)

    def split(x: jax.Array) -> jax.Array:
        padding = ((0, 0), (0, count * size - length), *((0, 0) for _ in x.shape[2:]))
        return jnp.moveaxis(jnp.pad(x, padding).reshape(rows, count, size, *x.shape[2:]), 1, 0)

    return tuple(map(split, arrays))


def _join(chunks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Undoes the split of an array [B, T]."""
    rows, length = shape
    return jnp.moveaxis(chunks, 0, 1).reshape(rows, -1)[:, :length]


def _logits(hidden: jax.Array, unembedding: jax.Array) -> jax.Array:
    """Logits [B, t, words of this tensor shard]."""
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    return jnp.einsum("...D,DV->...V", hidden, unembedding, preferred_element_type=wide)


def _words(logits: jax.Array) -> jax.Array:
    """Token ids of the logits, int32 [1, 1, words of this tensor shard]."""
    words = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None, None]
    if tensor_shards() == 1:
        return words
    return words + logits.shape[-1] * jax.lax.axis_index("tensor")


def _over_shards(x: jax.Array, reduction: Callable[[jax.Array, str], jax.Array]) -> jax.Array:
    """Reduces over the tensor shards, which divide the vocabulary."""
    return x if tensor_shards() == 1 else reduction(x, "tensor")


def _nll_and_lse(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    maximum = _over_shards(jnp.max(logits, axis=-1), jax.lax.pmax)
    total = jnp.sum(jnp.exp(logits - maximum[..., None]), axis=-1)
    picked = jnp.sum(jnp.where(_words(logits) == targets[..., None], logits, 0), axis=-1)
    total, picked = (_over_shards(x, jax.lax.psum) for x in (total, picked))
    lse = maximum + jnp.log(total)
    return lse - picked, lse


def _argmax(logits: jax.Array) -> jax.Array:
    best = _over_shards(jnp.max(logits, axis=-1), jax.lax.pmax)
    none = jnp.iinfo(jnp.int32).max
    first = jnp.min(jnp.where(logits == best[..., None], _words(logits), none), axis=-1)
    return _over_shards(first, jax.lax.pmin)


@jax.custom_vjp
def _chunked_nll(
    unembedding: jax.Array, hidden: jax.Array, targets: jax.Array, counted: jax.Array
) -> jax.Array:
    def body(total: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        x, y, counted = chunk
        nll, _ = _nll_and_lse(_logits(x, unembedding), y)
        return total + jnp.sum(nll, where=counted), None

    start = jnp.zeros((), jnp.promote_types(hidden.dtype, jnp.float32))
    return jax.lax.scan(body, start, (hidden, targets, counted))[0]


def _chunked_nll_forward(
    unembedding: jax.Array, hidden: jax.Array, targets: jax.Array, counted: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The sum, and its gradients by this device's words and tokens."""

    def body(
        sums: tuple[jax.Array, jax.Array], chunk: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        (total, d_unembedding), (x, y, counted) = sums, chunk
        logits = _logits(x, unembedding)
        nll, lse = _nll_and_lse(logits, y)
        d_logits = jnp.exp(logits - lse[..., None]) - (_words(logits) == y[..., None])
        d_logits = jnp.where(counted[..., None], d_logits, 0).astype(x.dtype)
        d_x = jnp.einsum("...V,DV->...D", d_logits, unembedding)
        d_unembedding += jnp.einsum(
            "BTD,BTV->DV", x, d_logits, preferred_element_type=d_unembedding.dtype
        )
        return (total + jnp.sum(nll, where=counted), d_unembedding), d_x

    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    start = jnp.zeros((), wide), jnp.zeros_like(unembedding, dtype=wide)
    (total, d_unembedding), d_hidden = jax.lax.scan(body, start, (hidden, targets, counted))
    return total, (d_unembedding, d_hidden)


def _chunked_nll_backward(
    gradients: tuple[jax.Array, jax.Array], d_total: jax.Array
) -> tuple[jax.Array | None, ...]:
    # `sharded` divides what comes back among the shards that computed the same sum, and adds up
    # the gradients of all.
    factor, dtype = _over_shards(d_total, jax.lax.psum), gradients[1].dtype
    d_unembedding, d_hidden = ((factor * x).astype(dtype) for x in gradients)
    return d_unembedding, d_hidden, None, None


_chunked_nll.defvjp(_chunked_nll_forward, _chunked_nll_backward)

"""Next-token loss that never holds the logits of a whole sequence.

With hidden states x_t, unembedding W and targets y_t,

    nll_t = logsumexp(x_t W) - (x_t W)[y_t],    d nll_t / d logits = softmax(x_t W) - onehot(y_t).

The sequence is walked in chunks, forwards and again backwards, where the logits of a chunk are
computed anew. Logits and the gradient of W accumulate in float32.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from asa_jax.sharding import gather_embed, sharded, tensor_shards

HIDDEN = ("batch", "sequence", "activation")
UNEMBEDDING = ("embed", "vocab")
TOKENS = ("batch", "sequence")


@jax.named_scope("loss")
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

    def nll(hidden: jax.Array, unembedding: jax.Array, targets: jax.Array) -> jax.Array:
        x, y = _chunks(hidden, targets, chunk_tokens)
        return _join(_chunked_nll(x, gather_embed(unembedding, axis=0), y), targets.shape)

    return sharded(nll, (HIDDEN, UNEMBEDDING, TOKENS), TOKENS)(hidden, unembedding, targets)


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

    def scores(
        hidden: jax.Array, unembedding: jax.Array, targets: jax.Array
    ) -> tuple[jax.Array, ...]:
        unembedding = gather_embed(unembedding, axis=0)

        def body(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            x, y = chunk
            logits = _logits(x, unembedding)
            nll, _ = _nll_and_lse(logits, y)
            return nll, _argmax(logits) == y

        results = jax.lax.map(body, _chunks(hidden, targets, chunk_tokens))
        return tuple(_join(result, targets.shape) for result in results)

    score = sharded(scores, (HIDDEN, UNEMBEDDING, TOKENS), (TOKENS, TOKENS))
    return score(hidden, unembedding, targets)


def _chunks(
    hidden: jax.Array, targets: jax.Array, chunk_tokens: int
) -> tuple[jax.Array, jax.Array]:
    """Hidden states and targets in chunks [chunks, B, t, ...], the last padded."""
    rows, length = targets.shape
    size = min(max(1, chunk_tokens // rows), length)
    count = -(-length // size)
    size = -(-length // count)

    def split(x: jax.Array) -> jax.Array:
        padding = ((0, 0), (0, count * size - length), *((0, 0) for _ in x.shape[2:]))
        return jnp.moveaxis(jnp.pad(x, padding).reshape(rows, count, size, *x.shape[2:]), 1, 0)

    return split(hidden), split(targets)


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
def _chunked_nll(hidden: jax.Array, unembedding: jax.Array, targets: jax.Array) -> jax.Array:
    return _chunked_nll_forward(hidden, unembedding, targets)[0]


def _chunked_nll_forward(
    hidden: jax.Array, unembedding: jax.Array, targets: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    def body(_: None, chunk: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, ...]]:
        x, y = chunk
        return None, _nll_and_lse(_logits(x, unembedding), y)

    _, (nll, lse) = jax.lax.scan(body, None, (hidden, targets))
    return nll, (hidden, unembedding, targets, lse)


def _chunked_nll_backward(
    saved: tuple[jax.Array, ...], d_nll: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    """Gradients by this device's tokens and words; `sharded` sums them over the others."""
    hidden, unembedding, targets, lse = saved
    # `sharded` divides what comes back among the shards that computed the same nll.
    d_nll = _over_shards(d_nll, jax.lax.psum)

    def body(d_unembedding: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        x, y, lse, d = chunk
        logits = _logits(x, unembedding)
        probability = jnp.exp(logits - lse[..., None])
        d_logits = (probability - (_words(logits) == y[..., None])) * d[..., None]
        d_logits = d_logits.astype(x.dtype)
        d_x = jnp.einsum("...V,DV->...D", d_logits, unembedding)
        d_unembedding += jnp.einsum(
            "BTD,BTV->DV", x, d_logits, preferred_element_type=d_unembedding.dtype
        )
        return d_unembedding, d_x

    start = jnp.zeros_like(unembedding, dtype=lse.dtype)
    d_unembedding, d_hidden = jax.lax.scan(body, start, (hidden, targets, lse, d_nll))
    return d_hidden, d_unembedding.astype(unembedding.dtype), None


_chunked_nll.defvjp(_chunked_nll_forward, _chunked_nll_backward)

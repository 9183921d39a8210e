"""The compiled steps of decoding: empty caches, reading a chunk, drawing tokens."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from asa_jax.config import ModelConfig
from asa_jax.decoding.sampling import sample_tokens
from asa_jax.decoding.settings import Sampling
from asa_jax.model.cached_attention import Chunk
from asa_jax.model.param_layout import split_kinds
from asa_jax.model.transformer import Transformer, abstract_model
from asa_jax.sharding import constrain, partition_spec

# Maps the model, tokens [B], positions [B] and a cache to hidden states [B, D] and the cache.
DecodeFunction = Callable[[Transformer, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]

# Else XLA joins weights that multiply the same vectors, at every step, to have one product of them.
_KEEP_WEIGHTS = {"xla_gpu_dot_merger_threshold_mb": 0}


class DecodeState(NamedTuple):
    """Rows of text as far as they are read.

    Attributes:
        hidden: [B, D], of the last token of each row.
        lengths: int32 [B], tokens that the cache holds.
        ended: bool [B], which rows draw no more.
        seen: bool [B, V], the tokens that a row has.
        cache: of the layers.
    """

    hidden: jax.Array
    lengths: jax.Array
    ended: jax.Array
    seen: jax.Array
    cache: Any


class Draws(NamedTuple):
    """How rows draw; traced, so that nothing is compiled anew.

    Attributes:
        seeds: uint32 [B]; a draw depends on its row's seed, position and text alone.
        ends: int32 [E], the tokens after which a row draws no more.
        sampling: settings of all rows.
    """

    seeds: Any
    ends: Any
    sampling: Sampling


class Drawn(NamedTuple):
    """What a dispatch drew; columns from `num_drawn` on, and behind a row's end, mean nothing.

    Attributes:
        tokens: int32 [B, n].
        log_probabilities: float32 [B, n], by the model, before sampling settings.
        alternatives: int32 [B, n, A], the most likely tokens.
        alternative_log_probabilities: float32 [B, n, A].
        num_drawn: int32 [].
    """

    tokens: Any
    log_probabilities: Any
    alternatives: Any
    alternative_log_probabilities: Any
    num_drawn: Any


@functools.partial(jax.jit, static_argnames=("cfg", "num_rows", "cache_length"))
def empty_state(*, cfg: ModelConfig, num_rows: int, cache_length: int) -> DecodeState:
    """Rows without tokens, and caches for `cache_length` tokens of each."""
    graphdef, shapes, _ = abstract_model(cfg)
    # Caches need no parameters.
    cache = nnx.merge(graphdef, shapes).init_cache(num_rows, cache_length)
    state = DecodeState(
        hidden=jnp.zeros((num_rows, cfg.hidden_size), cfg.compute_dtype),
        lengths=jnp.zeros(num_rows, jnp.int32),
        ended=jnp.ones(num_rows, bool),
        seen=jnp.zeros((num_rows, cfg.vocab_size), bool),
        cache=cache,
    )
    return _by_rows(state, cfg)


@functools.partial(jax.jit, static_argnames=("cfg", "num_rows", "cache_length"))
def resize_state(
    state: DecodeState, *, cfg: ModelConfig, num_rows: int, cache_length: int
) -> DecodeState:
    """The same rows, whose tokens all fit, with caches for `cache_length` tokens of `num_rows`."""

    def fit(old: jax.Array, empty: jax.Array) -> jax.Array:
        # Token p of a ring lies in slot p, until there are more tokens than slots of a full ring.
        common = tuple(map(slice, map(min, old.shape, empty.shape)))
        return empty.at[common].set(old[common])

    empty = empty_state(cfg=cfg, num_rows=num_rows, cache_length=cache_length)
    return _by_rows(jax.tree.map(fit, state, empty), cfg)


@functools.partial(jax.jit, static_argnames=("cfg",), donate_argnames=("state",))
def read_chunk(
    params: Any,
    state: DecodeState,
    tokens: jax.Array,
    offset: jax.Array,
    lengths: jax.Array,
    *,
    cfg: ModelConfig,
) -> DecodeState:
    """Appends to each row those of a chunk's tokens that it does not hold yet.

    Args:
        params: nested dict of parameters.
        state: the rows.
        tokens: int32 [B, T] of positions offset .. offset + T - 1, anything where a row has none.
        offset: int32 [], as of `Chunk`.
        lengths: int32 [B], tokens of the rows with all that will be read.
        cfg: the architecture.

    Returns:
        The rows.
    """
    size, vocab = tokens.shape[1], state.seen.shape[1]
    chunk = Chunk(offset, state.lengths, lengths)
    model = nnx.merge(abstract_model(cfg)[0], params)
    hidden, cache = model.prefill(constrain(tokens, "batch", "sequence"), chunk, state.cache)
    rows = jnp.arange(tokens.shape[0])[:, None]
    new = jnp.where(chunk.is_new(size), tokens, vocab)
    after = chunk.after(size)
    state = DecodeState(
        hidden=jnp.where((after > state.lengths)[:, None], hidden, state.hidden),
        lengths=after,
        ended=lengths == 0,
        seen=state.seen.at[rows, new].set(True, mode="drop"),
        cache=cache,
    )
    return _by_rows(state, cfg)


@functools.partial(
    jax.jit,
    static_argnames=("cfg", "vocab_size", "size", "num_alternatives", "decode"),
    donate_argnames=("state",),
    compiler_options=_KEEP_WEIGHTS,
)
def draw_tokens(
    params: Any,
    state: DecodeState,
    draws: Draws,
    num_steps: jax.Array,
    *,
    cfg: ModelConfig,
    vocab_size: int,
    size: int,
    num_alternatives: int = 0,
    decode: DecodeFunction = Transformer.decode,
) -> tuple[DecodeState, Drawn]:
    """Draws and reads tokens until there are `num_steps` or every row has ended.

    Args:
        params: nested dict of parameters.
        state: the rows.
        draws: how they draw.
        num_steps: int32 [], at most `size`.
        cfg: the architecture.
        vocab_size: tokens of the tokenizer; the model may have more, which are never drawn.
        size: columns of the result.
        num_alternatives: most likely tokens to give beside each, A.
        decode: reads a token of each row, with a cache that it understands.

    Returns:
        The rows, and the tokens drawn.
    """
    model = nnx.merge(abstract_model(cfg)[0], params)
    model.join()

    def unfinished(carry: tuple[DecodeState, Drawn]) -> jax.Array:
        state, drawn = carry
        return (drawn.num_drawn < num_steps) & ~jnp.all(state.ended)

    def step(carry: tuple[DecodeState, Drawn]) -> tuple[DecodeState, Drawn]:
        state, drawn = carry
        tokens, drawn = next_tokens(model, state, drawn, draws, vocab_size)
        hidden, cache = decode(model, tokens, state.lengths, state.cache)
        return _by_rows(advance(state, tokens, draws, hidden, cache), cfg), drawn

    nothing = nothing_drawn(state.lengths.size, size, num_alternatives)
    return jax.lax.while_loop(unfinished, step, (state, nothing))


def nothing_drawn(num_rows: int, size: int, num_alternatives: int) -> Drawn:
    """A result of `size` columns that are to be filled."""
    shape = (num_rows, size)
    return Drawn(
        tokens=jnp.zeros(shape, jnp.int32),
        log_probabilities=jnp.zeros(shape),
        alternatives=jnp.zeros((*shape, num_alternatives), jnp.int32),
        alternative_log_probabilities=jnp.zeros((*shape, num_alternatives)),
        num_drawn=jnp.int32(0),
    )


def next_tokens(
    model: Transformer, state: DecodeState, drawn: Drawn, draws: Draws, vocab_size: int
) -> tuple[jax.Array, Drawn]:
    """The next token [B] of each row, and the result with one column more."""
    logits = _logits(model, state.hidden, vocab_size)
    tokens = constrain(_draw(logits, state, draws), "activation")
    return tokens, _append(drawn, tokens, logits)


def advance(
    state: DecodeState, tokens: jax.Array, draws: Draws, hidden: jax.Array, cache: Any
) -> DecodeState:
    """The rows after their tokens [B] were read, which gave hidden states [B, D] and a cache."""
    ended = state.ended | jnp.any(tokens[:, None] == draws.ends, axis=1)
    # A row that has ended stays where it is: what is written behind its end is written over.
    rows, new = jnp.arange(tokens.size), jnp.where(ended, state.seen.shape[1], tokens)
    return DecodeState(
        hidden=jnp.where(ended[:, None], state.hidden, hidden),
        lengths=jnp.where(ended, state.lengths, state.lengths + 1),
        ended=ended,
        seen=state.seen.at[rows, new].set(True, mode="drop"),
        cache=cache,
    )


def _logits(model: Transformer, hidden: jax.Array, vocab_size: int) -> jax.Array:
    """Logits float32 [B, V] after hidden states [B, D], -inf for tokens without text."""
    logits = jnp.einsum(
        "BD,DV->BV", hidden, model.unembedding(), preferred_element_type=jnp.float32
    )
    return jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)


def _draw(logits: jax.Array, state: DecodeState, draws: Draws) -> jax.Array:
    keys = jax.vmap(jax.random.fold_in)(jax.vmap(jax.random.key)(draws.seeds), state.lengths)
    return sample_tokens(logits, state.seen, keys, draws.sampling)


def _append(drawn: Drawn, tokens: jax.Array, logits: jax.Array) -> Drawn:
    """Writes tokens [B] and what their logits [B, V] say to the next column."""
    log_probabilities = jax.nn.log_softmax(logits)
    best, alternatives = jax.lax.top_k(log_probabilities, drawn.alternatives.shape[-1])
    of_tokens = jnp.take_along_axis(log_probabilities, tokens[:, None], axis=-1)[:, 0]
    column = drawn.num_drawn
    # Whole on every device, so that every process can read them.
    new = (constrain(x, *("activation",) * x.ndim) for x in (tokens, of_tokens, alternatives, best))
    written = [old.at[:, column].set(x) for old, x in zip(drawn[:-1], new, strict=True)]
    return Drawn._make([*written, column + 1])


def _by_rows(state: DecodeState, cfg: ModelConfig) -> DecodeState:
    """Asks for rows divided like a batch; XLA divides the rest of a cache as the layers need."""
    if jax.sharding.get_abstract_mesh().empty:
        return state
    (batch,) = partition_spec(("batch",))
    # Stacked layers lead with an axis of their own.
    first_stacked = len(split_kinds(cfg)[0]) if cfg.scan_layers else len(state.cache)

    def place(path: Any, x: jax.Array) -> jax.Array:
        leading = (None,) if path[0].idx >= first_stacked else ()
        rest = (P.UNCONSTRAINED,) * (x.ndim - len(leading) - 1)
        return jax.lax.with_sharding_constraint(x, P(*leading, batch, *rest))

    return state._replace(cache=jax.tree.map_with_path(place, state.cache))

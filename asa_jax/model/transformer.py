"""A Llama-like decoder whose layers attend as `layer_kinds` says."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from asa_jax.config import ModelConfig
from asa_jax.context_parallel import context_size, in_row_order, placement, row_order
from asa_jax.model.cached_attention import Chunk, pad_rows
from asa_jax.model.global_attention import GroupLatentAttention
from asa_jax.model.grouped_query_attention import GroupedQueryAttention
from asa_jax.model.latent_attention import LatentAttention
from asa_jax.model.layers import RMSNorm, SwiGLU, TokenEmbedding
from asa_jax.model.mixture_of_experts import MixtureOfExperts
from asa_jax.model.native_sparse_attention import NativeSparseAttention
from asa_jax.model.param_layout import listed_layers, shortest_period, split_kinds
from asa_jax.sharding import constrain
from pallas_kernels.masked_attention import RESIDUAL_NAMES

Attention = GroupedQueryAttention | LatentAttention | GroupLatentAttention | NativeSparseAttention
# A function of one layer group: (group, hidden states, its cache) to (hidden states, its cache).
GroupFunction = Callable[["LayerGroup", jax.Array, Any], tuple[jax.Array, Any]]

# Of hidden states in decoding: of fewer rows XLA makes no matrix product but a product of numbers,
# which it writes to memory, and a sum.
MIN_ROWS = 8


def make_attention(kind: str, cfg: ModelConfig, *, rngs: nnx.Rngs) -> Attention:
    """The attention of a layer kind; a new kind gets its line here and its name in the config."""
    match kind:
        case "full":
            return GroupedQueryAttention(cfg, None, rngs=rngs)
        case "sliding":
            return GroupedQueryAttention(cfg, cfg.window_size, rngs=rngs)
        case "mla":
            return LatentAttention(cfg, None, rngs=rngs)
        case "local":
            return LatentAttention(cfg, cfg.window_size, rngs=rngs)
        case "global":
            return GroupLatentAttention(cfg, rngs=rngs)
        case "nsa":
            return NativeSparseAttention(cfg, rngs=rngs)
    raise ValueError(f"layer kind {kind!r} is not known")


class Layer(nnx.Module):
    """x + Attention(RMSNorm(x)), then x + SwiGLU(RMSNorm(x)), or the same with experts."""

    def __init__(self, kind: str, cfg: ModelConfig, *, experts: bool, rngs: nnx.Rngs) -> None:
        self.attention_norm = RMSNorm(cfg.hidden_size, cfg.norm_epsilon)
        self.attention = make_attention(kind, cfg, rngs=rngs)
        self.mlp_norm = RMSNorm(cfg.hidden_size, cfg.norm_epsilon)
        self.mlp = MixtureOfExperts(cfg, rngs=rngs) if experts else SwiGLU(cfg, rngs=rngs)

    def __call__(self, x: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """Maps [B, T, D] to [B, T, D]."""
        normed = self.attention_norm(x)
        with jax.named_scope("attention"):  # read by training/breakdown.py, as are the others
            x = x + self.attention(normed, positions, segment_ids)
        x = x + self.mlp(self.mlp_norm(x))
        return constrain(x, "batch", "sequence", "activation")

    def prefill(
        self, x: jax.Array, positions: jax.Array, chunk: Chunk, cache: Any
    ) -> tuple[jax.Array, Any]:
        """Maps a chunk of tokens, [B, T, D] at positions [B, T], and appends it to the cache."""
        y, cache = self.attention.prefill(self.attention_norm(x), positions, chunk, cache)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), cache

    def decode(self, x: jax.Array, position: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        """Maps one token a row, [B, D], to [B, D]."""
        y, cache = self.attention.decode(self.attention_norm(x), position, cache)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), cache


class LayerGroup(nnx.Module):
    """The shortest run of layers whose repetition is the model: ('local', 'global') in ASA."""

    def __init__(
        self, kinds: tuple[str, ...], cfg: ModelConfig, *, experts: bool, rngs: nnx.Rngs
    ) -> None:
        self.layers = nnx.List([Layer(kind, cfg, experts=experts, rngs=rngs) for kind in kinds])


class Transformer(nnx.Module):
    """Token embedding, layers, final norm. Logits are `hidden @ unembedding()`."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.cfg = cfg
        self.embedding = TokenEmbedding(cfg, rngs=rngs)
        self.final_norm = RMSNorm(cfg.hidden_size, cfg.norm_epsilon)
        # Layers without experts before those with them are no part of the repetition.
        first, rest = split_kinds(cfg)
        self.prefix = LayerGroup(first, cfg, experts=False, rngs=rngs) if first else None
        kinds = shortest_period(rest)
        self.repeats = len(rest) // len(kinds)
        make = functools.partial(LayerGroup, kinds, cfg, experts=cfg.experts.num_experts > 0)
        # With scan one stacked group, whose every parameter leads with the layer axis.
        self.groups: Any = (
            nnx.vmap(lambda rngs: make(rngs=rngs))(rngs.split(self.repeats))
            if cfg.scan_layers
            else nnx.List([make(rngs=rngs) for _ in range(self.repeats)])
        )

    def __call__(
        self, inputs: jax.Array, positions: jax.Array, segment_ids: jax.Array
    ) -> jax.Array:
        """Hidden states after the final norm.

        Where the mesh in context has several devices on its context axis, tokens come and hidden
        states go in the order of `context_parallel.placement`.

        Args:
            inputs: int [B, T] token ids in [0, V).
            positions: int [B, T], from the start of each document.
            segment_ids: int [B, T], documents of a row as runs of one id, 0 for padding; a document
                starts at a multiple of `cfg.alignment`.

        Returns:
            [B, T, D] in the compute dtype.
        """

        def apply(group: LayerGroup, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            for layer in group.layers:
                x = layer(x, positions, segment_ids)
            return x, None

        # Attention asks for the documents of whole rows, in order; the ids are small.
        segment_ids = in_row_order(segment_ids, "batch", "sequence")
        x = constrain(self.embedding(inputs), "batch", "sequence", "activation")
        x, _ = self._run(rematerialised(apply, self.cfg.remat), x, None)
        return self.final_norm(x)

    def join(self) -> None:
        """Joins weights that multiply the same vectors, of layers in a list on one device.

        Made before a loop of steps, it saves each of them many small products.
        """
        if self.cfg.scan_layers or not jax.sharding.get_abstract_mesh().empty:
            return
        for group in [*self._leading, *self.groups]:
            for layer in group.layers:
                for module in (layer.attention, layer.mlp):
                    if not isinstance(module, NativeSparseAttention | MixtureOfExperts):
                        module.join()

    def unembedding(self) -> jax.Array:
        """The [D, V] matrix of the logits, in the compute dtype."""
        return self.embedding.unembedding()

    def init_cache(self, batch: int, max_length: int) -> Any:
        """Empty caches of all layers for rows of at most max_length tokens."""
        dtype = jnp.dtype(self.cfg.compute_dtype)

        def of(group: LayerGroup) -> list[Any]:
            return [layer.attention.init_cache(batch, max_length, dtype) for layer in group.layers]

        leading = [of(group) for group in self._leading]
        if not self.cfg.scan_layers:
            return [*leading, *map(of, self.groups)]
        stack = (self.repeats,)
        stacked = jax.tree.map(lambda x: jnp.broadcast_to(x, stack + x.shape), of(self.groups))
        return [*(leading[0] if leading else ()), *stacked]

    def prefill(self, inputs: jax.Array, chunk: Chunk, cache: Any) -> tuple[jax.Array, Any]:
        """Reads a chunk of each row and appends it to the caches.

        Args:
            inputs: int [B, T], T a multiple of `cfg.alignment`; token ids in [0, V) of positions
                chunk.offset .. chunk.offset + T - 1, any where a row has none to read.
            chunk: where they stand, and which are to be read.
            cache: of `init_cache`, with max_length a multiple of `cfg.alignment`.

        Returns:
            Hidden states of the last token read of each row [B, D], and the cache.
        """
        length, context = inputs.shape[1], context_size()
        if context > 1:
            inputs = constrain(inputs[:, placement(length, context)], "batch", "sequence")
        positions = jnp.broadcast_to(chunk.offset + placement(length, context), inputs.shape)

        def apply(group: LayerGroup, x: jax.Array, caches: Any) -> tuple[jax.Array, Any]:
            filled = []
            for layer, cache in zip(group.layers, caches, strict=True):
                x, cache = layer.prefill(x, positions, chunk, cache)
                filled.append(cache)
            return x, filled

        x, cache = self._run(apply, self.embedding(inputs), cache)
        index = jnp.clip(chunk.after(length) - 1 - chunk.offset, 0, length - 1)
        last = x[jnp.arange(x.shape[0]), jnp.asarray(row_order(length, context))[index]]
        return self.final_norm(last), cache

    def decode(self, tokens: jax.Array, position: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        """Appends one token [B] a row at position [B]; gives hidden states [B, D], the cache."""

        def apply(group: LayerGroup, x: jax.Array, caches: Any) -> tuple[jax.Array, Any]:
            updated = []
            for layer, cache in zip(group.layers, caches, strict=True):
                x, cache = layer.decode(x, position, cache)
                updated.append(cache)
            return x, updated

        x, one_device = self.embedding(tokens), jax.sharding.get_abstract_mesh().empty
        num_rows = max(MIN_ROWS, tokens.size) if one_device else tokens.size
        x, cache = self._run(apply, pad_rows(x, num_rows), cache)
        return self.final_norm(x)[: tokens.size], cache

    @property
    def _leading(self) -> list[LayerGroup]:
        """The groups before those that repeat: one, or none."""
        return [] if self.prefix is None else [self.prefix]

    def _run(self, apply: GroupFunction, x: jax.Array, caches: Any) -> tuple[jax.Array, Any]:
        """Applies a function to the layer groups in turn, by scan where they are stacked."""
        if not self.cfg.scan_layers:
            results = []
            shared = _traced_once(apply)
            for i, group in enumerate([*self._leading, *self.groups]):
                x, result = shared(*nnx.split(group), x, None if caches is None else caches[i])
                results.append(result)
            return x, results
        graphdef, params = nnx.split(self.groups)

        def body(x: jax.Array, layer: tuple[Any, Any]) -> tuple[jax.Array, Any]:
            group_params, cache = layer
            return apply(nnx.merge(graphdef, group_params), x, cache)

        size = len(split_kinds(self.cfg)[0])
        first: Any
        rest: Any
        first, rest = (None, None) if caches is None else (caches[:size], caches[size:])
        for group in self._leading:
            x, first = apply(group, x, first)
        x, rest = jax.lax.scan(body, x, (params, rest))
        return x, None if first is None else [*first, *rest]


def _traced_once(apply: GroupFunction) -> Callable[..., tuple[jax.Array, Any]]:
    """A function of (graph definition, parameters, x, cache) that groups of one kind share.

    Traced and lowered once, its kernels are compiled once; else each layer would have its own.
    """

    @functools.partial(jax.jit, static_argnums=0)
    def call(graphdef: Any, params: Any, x: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        return apply(nnx.merge(graphdef, params), x, cache)

    return call


def rematerialised(apply: GroupFunction, policy: str) -> GroupFunction:
    """Wraps `apply` so that its backward pass computes anew what it needs.

    Args:
        apply: the function of a group of layers.
        policy: what is kept: 'none' keeps everything, 'dots' the results of products with weights
            and of attention, 'attention' those of attention alone, 'full' only the inputs.
    """
    if policy == "none":
        return apply
    policies = jax.checkpoint_policies
    attention = policies.save_only_these_names(*RESIDUAL_NAMES)
    save = {
        "dots": policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, attention
        ),
        "attention": attention,
        "full": None,
    }[policy]

    def wrapped(group: LayerGroup, x: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        graphdef, params = nnx.split(group)

        def pure(params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
            return apply(nnx.merge(graphdef, params), x, cache)

        return jax.checkpoint(pure, policy=save)(params, x)

    return wrapped


def abstract_model(cfg: ModelConfig) -> tuple[Any, Any, Any]:
    """The model without its arrays.

    Args:
        cfg: the architecture.

    Returns:
        The graph definition for `nnx.merge`, the parameters as a nested dict of ShapeDtypeStruct,
        and their logical axes as a dict of the same structure with tuples of names.
    """
    model = nnx.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model, nnx.Param)
    axes = {
        path: _with_layer_axis(param.axes, param.get_value().ndim)
        for path, param in nnx.to_flat_state(state)
    }
    shapes = nnx.to_pure_dict(state)
    return graphdef, shapes, nnx.traversals.unflatten_mapping(axes)


def init_params(cfg: ModelConfig, key: jax.Array) -> Any:
    """Draws the parameters, a nested dict of float32 arrays; call under jit with out_shardings.

    A list of layers is drawn as a stack: with the same key the numbers are the same, and a draw for
    each layer would take minutes to compile.
    """
    stacked = dataclasses.replace(cfg, scan_layers=True)
    params = nnx.to_pure_dict(nnx.state(Transformer(stacked, rngs=nnx.Rngs(key)), nnx.Param))
    if cfg.scan_layers:
        return params
    # Without the barrier XLA would draw each layer's part by itself after all.
    return listed_layers(stacked, jax.lax.optimization_barrier(params))[1]


def count_params(cfg: ModelConfig) -> int:
    """Number of parameters, from shapes alone."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_model(cfg)[1]))


def _with_layer_axis(axes: tuple[str, ...], ndim: int) -> tuple[str, ...]:
    return ("layers",) * (ndim - len(axes)) + axes

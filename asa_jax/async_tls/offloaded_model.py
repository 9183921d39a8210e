"""A whole model whose sparse layers have their keys and values on the host.

A step goes layer by layer, because what a layer asks of the host depends on its query: project,
`OffloadedLayer.step`, finish. Dense layers have their caches on the device.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from asa_jax.async_tls.engine import Counters, Engine, slots_for
from asa_jax.async_tls.host_memory import check_host_memory, system_available_bytes
from asa_jax.async_tls.host_thread import HostThreadBackend
from asa_jax.async_tls.layer import OffloadedLayer
from asa_jax.async_tls.model_layers import (
    build_model,
    cached_tokens,
    finish,
    layers_of,
    project,
)
from asa_jax.async_tls.settings import DecodingConfig, KeyShape, key_shape
from asa_jax.async_tls.simulated import SimulatedBackend
from asa_jax.config import ModelConfig

_THREADS_A_LAYER = 2


@dataclasses.dataclass(frozen=True)
class EngineFigures:
    """Sums over the sparse layers of a model.

    Attributes:
        counters: of their engines.
        reselected: key heads that the drift guard gave the blocks of their own query.
        tokens: that all rows together were stepped by.
    """

    counters: Counters
    reselected: int
    tokens: int

    def describe(self) -> str:
        """One line for people."""
        counters, tokens = self.counters, max(1, self.tokens)
        asked = counters.hits + counters.misses
        return (
            f"async_tls: {self.tokens} tokens, {counters.hits / max(1, asked):.1%} of {asked} "
            f"blocks were on the device; {counters.to_device_bytes / tokens / 2**20:.3f} MiB a "
            f"token to it, {counters.to_host_bytes / tokens / 2**20:.3f} from it; "
            f"{counters.stalled_transfers} transfers waited for, {counters.late} blocks late, "
            f"{counters.overflow} put off, {counters.unused} unused; {self.reselected} key heads "
            "selected anew"
        )


class OffloadedModel:
    """Layers, engines and the caches of dense layers; `load`, then `step` by step."""

    def __init__(
        self, cfg: ModelConfig, params: Any, settings: DecodingConfig, channels: np.ndarray
    ) -> None:
        """Prepares; allocates nothing.

        Args:
            cfg: the architecture, layers in a list.
            params: nested dict of its parameters.
            settings: sizes, dense layers and back end.
            channels: int32 [layers, K, r].
        """
        self._cfg, self._params, self._settings = cfg, params, settings
        layers = [nnx.split(layer) for layer in layers_of(build_model(cfg, params))]
        self._layers = [(_programs(graphdef), params) for graphdef, params in layers]
        self._scale = layers_of(build_model(cfg, params))[0].attention.scale
        self._shape, self._channels = key_shape(cfg), channels
        self._backends: list[HostThreadBackend | SimulatedBackend] = []
        self._engines: list[Engine] = []
        self._sparse: list[OffloadedLayer] = []
        self._dense: list[Any] = []
        self._tokens = 0
        # Of texts before the present one.
        self._counters: list[Counters] = []
        self._reselected = 0

    @property
    def figures(self) -> EngineFigures:
        """What was done for all texts."""
        counters = [*self._counters, *(engine.counters for engine in self._engines)]
        columns = zip(*map(dataclasses.astuple, counters), strict=True)
        reselected = self._reselected + sum(one.reselected for one in self._sparse)
        return EngineFigures(
            Counters(*map(sum, columns)) if counters else Counters(), reselected, self._tokens
        )

    @property
    def device_bytes(self) -> int:
        """Bytes on the device of what grows with texts: indexes, pools and dense caches."""
        dense = sum(array.nbytes for array in jax.tree.leaves(self._dense))
        return dense + sum(layer.device_bytes for layer in self._sparse)

    def load(self, caches: Iterable[Any], lengths: np.ndarray) -> None:
        """Takes over prompts that were read: those of sparse layers go to the host.

        Args:
            caches: of all layers, one after another, as `model_layers.caches_of` has them; S a
                multiple of the block size.
            lengths: int [B], tokens that it holds of each row.

        Raises:
            HostMemoryError: the host has no room for it.
            TransferError: blocks cannot be brought to the device.
        """
        self._end()
        for number, one in enumerate(caches):
            if number < self._settings.num_dense_layers:
                self._dense.append(one)
                continue
            key, value = cached_tokens(one)
            self._sparse.append(self._new_layer(number, key))
            self._sparse[-1].load(key, value, lengths)

    def step(self, tokens: jax.Array, position: jax.Array) -> jax.Array:
        """Reads a token [B] of each row at positions [B]; gives hidden states [B, D].

        Raises:
            TransferError: as `OffloadedLayer.step`.
        """
        return self.step_embedded(_embed(self._params, tokens, cfg=self._cfg), position)

    def step_embedded(self, x: jax.Array, position: jax.Array) -> jax.Array:
        """As `step`, of embeddings [B, D] of tokens."""
        num_dense = self._settings.num_dense_layers
        for number, (programs, params) in enumerate(self._layers):
            if number < num_dense:
                x, self._dense[number] = programs.decode(params, x, position, self._dense[number])
            else:
                query, key, value = programs.project(params, x, position)
                mixed = self._sparse[number - num_dense].step(query, key, value)
                x = programs.finish(params, x, mixed)
                if number > num_dense:
                    # Of the layer before: the device has this one to go on with meanwhile, and a
                    # copy does not wait for more than that.
                    self._sparse[number - num_dense - 1].request()
        for layer in self._sparse[-1:]:
            layer.request()
        self._tokens += len(x)
        return _final_norm(self._params, x, cfg=self._cfg)

    def _new_layer(self, number: int, key: jax.Array) -> OffloadedLayer:
        """An empty layer for keys [B, S, K, H]."""
        sizes, (batch, length, heads, _) = self._settings.sizes, key.shape
        blocks = length // sizes.block_size
        backend = self._new_backend(batch * heads, blocks, key.dtype)
        engine = Engine(sizes, batch, heads, blocks, backend)
        self._backends.append(backend)
        self._engines.append(engine)
        return OffloadedLayer(
            sizes, engine, self._channels[number], lagged=self._settings.lagged, scale=self._scale,
            value_dim=self._shape.value_dim, implementation=self._cfg.implementation,
        )  # fmt: skip

    def _new_backend(
        self, num_rows: int, num_blocks: int, dtype: Any
    ) -> HostThreadBackend | SimulatedBackend:
        sizes = self._settings.sizes
        shape = num_rows, num_blocks, slots_for(sizes), sizes.block_size, _width(self._shape)
        if self._settings.backend == "simulated":
            return SimulatedBackend(*shape, dtype)
        device = jax.devices()[0]
        return HostThreadBackend(*shape, dtype, device=device, num_threads=_THREADS_A_LAYER)

    def _end(self) -> None:
        """Gives up what an earlier text had, but for its figures."""
        self._counters += [engine.counters for engine in self._engines]
        self._reselected += sum(one.reselected for one in self._sparse)
        for backend in self._backends:
            backend.close()
        self._backends, self._engines, self._sparse, self._dense = [], [], [], []


def check_memory(
    cfg: ModelConfig, settings: DecodingConfig, num_rows: int, cache_length: int
) -> None:
    """Raises a HostMemoryError unless the caches of all sparse layers fit the host together."""
    shape, layers = key_shape(cfg), cfg.num_layers - settings.num_dense_layers
    numbers = layers * num_rows * cache_length * shape.num_kv_heads * _width(shape)
    check_host_memory(numbers * jnp.dtype(cfg.compute_dtype).itemsize, system_available_bytes())


def _width(shape: KeyShape) -> int:
    """Numbers of a token of a key head: key and value, or the key alone."""
    return shape.head_dim if shape.value_dim is not None else 2 * shape.head_dim


@functools.partial(jax.jit, static_argnames="cfg")
def _embed(params: Any, tokens: jax.Array, *, cfg: ModelConfig) -> jax.Array:
    return build_model(cfg, params).embedding(tokens)


@functools.partial(jax.jit, static_argnames="cfg")
def _final_norm(params: Any, x: jax.Array, *, cfg: ModelConfig) -> jax.Array:
    return build_model(cfg, params).final_norm(x)


class _Programs(NamedTuple):
    """What is compiled for layers of one kind.

    Attributes:
        decode: parameters, x [B, D], positions [B], cache to x and cache, densely.
        project: parameters, x, positions to query, key and value of attention.
        finish: parameters, x, what attention gave to x.
    """

    decode: Callable[..., Any]
    project: Callable[..., Any]
    finish: Callable[..., Any]


@functools.cache
def _programs(graphdef: Any) -> _Programs:
    """Closures: as an argument, the definition would be hashed in each call, for a third of it."""

    @functools.partial(jax.jit, donate_argnums=3)
    def decode(params: Any, x: jax.Array, position: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        return nnx.merge(graphdef, params).decode(x, position, cache)

    @jax.jit
    def project_one(params: Any, x: jax.Array, position: jax.Array) -> tuple[Any, ...]:
        new = project(nnx.merge(graphdef, params), x[:, None], position[:, None])
        return tuple(None if array is None else array[:, 0] for array in new)

    @jax.jit
    def finish_one(params: Any, x: jax.Array, mixed: jax.Array) -> jax.Array:
        return finish(nnx.merge(graphdef, params), x[:, None], mixed[:, None])[:, 0]

    return _Programs(decode, project_one, finish_one)

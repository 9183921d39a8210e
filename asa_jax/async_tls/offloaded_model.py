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
from asa_jax.model.transformer import Layer

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
            f"{counters.stalled_transfers} transfers that the host waited for, {counters.late} "
            f"blocks late, {counters.overflow} put off, {counters.unused} unused; "
            f"{self.reselected} key heads selected anew"
        )


class OffloadedModel:
    """Layers, engines and the caches of dense layers; `load`, then `step` by step.

    Attributes:
        backend_line: which back end moves blocks, and why, for people.
    """

    _engine_type: type[Engine] = Engine

    def __init__(
        self,
        cfg: ModelConfig,
        params: Any,
        settings: DecodingConfig,
        channels: np.ndarray,
        backend: str,
        backend_line: str,
    ) -> None:
        """Prepares; allocates nothing.

        Args:
            cfg: the architecture, layers in a list.
            params: nested dict of its parameters.
            settings: sizes and dense layers.
            channels: int32 [layers, K, r].
            backend: 'host_thread' or 'simulated'.
            backend_line: as the attribute.
        """
        self._cfg, self._settings = cfg, settings
        self._device = jax.devices()[0]
        self._backend, self.backend_line = backend, backend_line
        model = build_model(cfg, params)
        self._embed, self._final_norm = map(_bound, (model.embedding, model.final_norm))
        layers = layers_of(model)
        self._layers = [_programs(*pair) for pair in zip(layers, [*layers[1:], None], strict=True)]
        self._scale = layers[0].attention.scale
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
        return self.step_embedded(self._embed(tokens), position)

    def step_embedded(self, x: jax.Array, position: jax.Array) -> jax.Array:
        """As `step`, of embeddings [B, D] of tokens."""
        for number, cache in enumerate(self._dense):
            x, self._dense[number] = self._layers[number].decode(x, position, cache)
        sparse = self._layers[len(self._dense) :]
        projected = sparse[0].project(x, position) if sparse else ()
        for number, (layer, programs) in enumerate(zip(self._sparse, sparse, strict=True)):
            mixed = layer.step(*projected)
            x, projected = programs.pass_on(x, mixed, position)
            if number > 0:
                # Of the layer before: the device has this one to go on with meanwhile, and a copy
                # does not wait for more than that.
                self._sparse[number - 1].request()
        for layer in self._sparse[-1:]:
            layer.request()
        self._tokens += len(x)
        return self._final_norm(x)

    def _new_layer(self, number: int, key: jax.Array) -> OffloadedLayer:
        """An empty layer for keys [B, S, K, H]."""
        sizes, (batch, length, heads, _) = self._settings.sizes, key.shape
        blocks = length // sizes.block_size
        backend = self._new_backend(batch * heads, blocks, key.dtype)
        engine = self._engine_type(sizes, batch, heads, blocks, backend)
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
        shape = num_rows, num_blocks, slots_for(sizes), sizes.block_size, token_width(self._shape)
        if self._backend == "simulated":
            return SimulatedBackend(*shape, dtype)
        return HostThreadBackend(*shape, dtype, device=self._device, num_threads=_THREADS_A_LAYER)

    def _end(self) -> None:
        """Gives up what an earlier text had, but for its figures."""
        self._counters += [engine.counters for engine in self._engines]
        self._reselected += sum(one.reselected for one in self._sparse)
        backends = self._backends
        # First, because a back end whose transfers stand still raises.
        self._backends, self._engines, self._sparse, self._dense = [], [], [], []
        for backend in backends:
            backend.close()


def check_memory(
    cfg: ModelConfig, settings: DecodingConfig, num_rows: int, cache_length: int
) -> None:
    """Raises a HostMemoryError unless the caches of all sparse layers fit the host together."""
    shape, layers = key_shape(cfg), cfg.num_layers - settings.num_dense_layers
    numbers = layers * num_rows * cache_length * shape.num_kv_heads * token_width(shape)
    check_host_memory(numbers * jnp.dtype(cfg.compute_dtype).itemsize, system_available_bytes())


def token_width(shape: KeyShape) -> int:
    """Numbers of a token of a key head: key and value, or the key alone."""
    return shape.head_dim if shape.value_dim is not None else 2 * shape.head_dim


class _Programs(NamedTuple):
    """What is compiled for layers of one kind, with the parameters of one.

    Attributes:
        decode: x [B, D], positions [B], cache to x and cache, densely.
        project: x, positions to query, key and value of attention, None where there is none.
        pass_on: x, what attention gave, positions to x and what the next layer projects.
    """

    decode: Callable[..., Any]
    project: Callable[..., Any]
    pass_on: Callable[..., Any]


class _Kind(NamedTuple):
    """A module without its parameters, from which and their list it is made again.

    Programs are closures over it, cached: as an argument a definition is hashed in each call, and
    parameters in any other form than a list are sorted; both take longer than a call itself.
    """

    graphdef: Any
    structure: Any

    def __call__(self, params: list[jax.Array]) -> Any:
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.structure, params))


def _split(module: nnx.Module) -> tuple[_Kind, list[jax.Array]]:
    graphdef, state = nnx.split(module)
    params, structure = jax.tree.flatten(state)
    return _Kind(graphdef, structure), params


def _bound(module: nnx.Module) -> Callable[..., Any]:
    kind, params = _split(module)
    return functools.partial(_call(kind), params)


def _programs(layer: Layer, following: Layer | None) -> _Programs:
    """Programs of a layer, and of the one behind it, if there is one."""
    kind, params = _split(layer)
    next_kind, next_params = (None, None) if following is None else _split(following)
    return _Programs(
        functools.partial(_decode(kind), params),
        functools.partial(_project(kind), params),
        functools.partial(_pass_on(kind, next_kind), params, next_params),
    )


@functools.cache
def _call(kind: _Kind) -> Callable[..., Any]:
    return jax.jit(lambda params, x: kind(params)(x))


@functools.cache
def _decode(kind: _Kind) -> Callable[..., Any]:
    @functools.partial(jax.jit, donate_argnums=3)
    def decode(params: Any, x: jax.Array, position: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        return kind(params).decode(x, position, cache)

    return decode


@functools.cache
def _project(kind: _Kind) -> Callable[..., Any]:
    @jax.jit
    def project_token(params: Any, x: jax.Array, position: jax.Array) -> tuple[Any, ...]:
        new = project(kind(params), x[:, None], position[:, None])
        return tuple(None if array is None else array[:, 0] for array in new)

    return project_token


@functools.cache
def _pass_on(kind: _Kind, following: _Kind | None) -> Callable[..., Any]:
    @jax.jit
    def pass_on(
        params: Any, next_params: Any, x: jax.Array, mixed: jax.Array, position: jax.Array
    ) -> tuple[jax.Array, Any]:
        x = finish(kind(params), x[:, None], mixed[:, None])[:, 0]
        if following is None:
            return x, None
        return x, _project(following)(next_params, x, position)

    return pass_on

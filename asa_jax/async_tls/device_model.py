"""A whole model whose sparse layers have their keys and values on the host, a program a step.

Blocks travel by back end B3. The host starts steps and reads nothing, so they can be queued one
behind another. What cannot be brought is a TransferError when results are waited for, or at the
next step.
"""

import contextlib
import functools
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from asa_jax.async_tls.device_layer import (
    DeviceCounters,
    DeviceLayer,
    DeviceLayerConfig,
    init_layer,
    step,
)
from asa_jax.async_tls.engine import Counters, slots_for
from asa_jax.async_tls.ffi_gather import chosen_backend
from asa_jax.async_tls.layer import by_head, index_prompt
from asa_jax.async_tls.model_layers import (
    build_model,
    cached_tokens,
    finish,
    layers_of,
    project,
)
from asa_jax.async_tls.offloaded_model import EngineFigures, OffloadedModel, token_width
from asa_jax.async_tls.pinned_blocks import PinnedBlocks
from asa_jax.async_tls.settings import DecodingConfig, key_shape
from asa_jax.async_tls.transfers import TransferError
from asa_jax.config import ModelConfig
from asa_jax.model.transformer import Transformer


class _Texts:
    """What is kept of the present texts: arrays that transfers use live until these are done."""

    def __init__(self) -> None:
        self.hosts: list[PinnedBlocks] = []
        self.dense: list[Any] = []
        self.sparse: list[DeviceLayer] = []

    def end(self) -> None:
        """Waits for what is on its way, then gives all of it up."""
        with contextlib.suppress(RuntimeError):  # told when it was waited for
            jax.block_until_ready(self.sparse)
        for host in self.hosts:
            host.close()
        self.hosts, self.dense, self.sparse = [], [], []


class DeviceModel:
    """Layers and caches; `load`, then `step` by step. The interface of `OffloadedModel`.

    Attributes:
        backend_line: which back end moves blocks, and why, for people.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        params: Any,
        settings: DecodingConfig,
        channels: np.ndarray,
        backend_line: str,
    ) -> None:
        """Prepares; allocates nothing.

        Args:
            cfg: the architecture, layers in a list.
            params: nested dict of its parameters.
            settings: sizes and dense layers.
            channels: int32 [layers, K, r].
            backend_line: of `ffi_gather.chosen_backend`.
        """
        self.backend_line = backend_line
        self._cfg, self._params, self._settings = cfg, params, settings
        self._channels, self._device = channels, jax.devices()[0]
        self._texts = _Texts()
        self._tokens, self._past = 0, np.zeros(len(DeviceCounters._fields), np.int64)
        model = build_model(cfg, params)
        self._layer_cfg = DeviceLayerConfig(
            settings.sizes, settings.lagged, layers_of(model)[0].attention.scale,
            key_shape(cfg).value_dim, cfg.implementation,
        )  # fmt: skip
        weakref.finalize(self, self._texts.end).atexit = False

    @property
    def figures(self) -> EngineFigures:
        """What was done for all texts; waits for it. How often the device waited, nobody counts."""
        sums = DeviceCounters(*map(int, self._past + self._counted()))
        width, dtype = token_width(key_shape(self._cfg)), jnp.dtype(self._cfg.compute_dtype)
        block_bytes = self._settings.sizes.block_size * width * dtype.itemsize
        counters = Counters(
            hits=sums.hits, misses=sums.misses,
            to_device_bytes=sums.to_device * block_bytes, to_host_bytes=sums.to_host * block_bytes,
        )  # fmt: skip
        return EngineFigures(counters, sums.reselected, self._tokens)

    @property
    def device_bytes(self) -> int:
        """Bytes on the device of what grows with texts: indexes, pools and dense caches."""
        arrays = self._texts.dense, [(layer.key_index, layer.pool) for layer in self._texts.sparse]
        return sum(array.nbytes for array in jax.tree.leaves(arrays))

    def load(self, caches: Iterable[Any], lengths: np.ndarray) -> None:
        """Takes over prompts that were read; arguments as of `OffloadedModel.load`.

        Raises:
            HostMemoryError: the host has no room for it.
        """
        self.close()
        for number, one in enumerate(caches):
            if number < self._settings.num_dense_layers:
                self._texts.dense.append(one)
                continue
            self._texts.sparse.append(
                self._loaded(*cached_tokens(one), self._channels[number], lengths)
            )

    def step(self, tokens: jax.Array, position: jax.Array) -> jax.Array:
        """Reads a token [B] of each row at positions [B]; gives hidden states [B, D].

        Raises:
            TransferError: blocks did not arrive; texts are to be loaded anew.
        """
        return self.step_embedded(_embed(self._params, tokens, cfg=self._cfg), position)

    def step_embedded(self, x: jax.Array, position: jax.Array) -> jax.Array:
        """As `step`, of embeddings [B, D] of tokens."""
        texts = self._texts
        with transfer_errors():
            x, texts.dense, texts.sparse = _step(
                self._params, x, position, texts.dense, texts.sparse,
                cfg=self._cfg, layer_cfg=self._layer_cfg,
            )  # fmt: skip
        self._tokens += len(x)
        return x

    def close(self) -> None:
        """Gives up what it has of texts, but for its figures, which end with a failed transfer."""
        with contextlib.suppress(RuntimeError):
            self._past += self._counted()
        self._texts.end()

    def _counted(self) -> np.ndarray:
        with transfer_errors():
            sums = [
                [np.asarray(x).sum(dtype=np.int64) for x in layer.counters]
                for layer in self._texts.sparse
            ]
        return np.sum(sums, axis=0, dtype=np.int64) if sums else np.zeros_like(self._past)

    def _loaded(
        self, key: jax.Array, value: Any, channels: np.ndarray, lengths: np.ndarray
    ) -> DeviceLayer:
        """A layer with prompts of keys [B, S, K, H]: all in host memory, the tails in the pool."""
        sizes, device_channels = self._settings.sizes, jnp.asarray(channels)
        tokens = by_head(key, value)
        rows, width = tokens.shape[0] * tokens.shape[1], tokens.shape[-1]
        blocks = tokens.reshape(rows, -1, sizes.block_size, width)
        host = PinnedBlocks(blocks.shape, np.dtype(blocks.dtype), self._device)
        self._texts.hosts.append(host)
        host.store(blocks)
        num_heads, num_slots = key.shape[2], slots_for(sizes)
        tails = jnp.repeat(jnp.asarray((lengths - 1) // sizes.block_size, jnp.int32), num_heads)
        pool = jnp.zeros((rows, num_slots, *blocks.shape[2:]), blocks.dtype)
        layer = init_layer(
            index_prompt(key, device_channels, lengths, sizes.block_size), device_channels,
            pool.at[:, 0].set(blocks[jnp.arange(rows), tails]), tails, jnp.asarray(host.source()),
        )  # fmt: skip
        # Committed as what a step returns, or a step is compiled twice.
        return jax.device_put(layer, self._device)


def make_model(
    cfg: ModelConfig,
    params: Any,
    settings: DecodingConfig,
    channels: np.ndarray,
    on_device: type[DeviceModel] = DeviceModel,
    on_host: type[OffloadedModel] = OffloadedModel,
) -> DeviceModel | OffloadedModel:
    """A model of the back end that was asked for, or that works; arguments as its own.

    Raises:
        GatherUnavailableError: the back end does not work on this machine.
    """
    backend, line = chosen_backend(settings.backend, jax.devices()[0])
    if backend == "ffi_gather":
        return on_device(cfg, params, settings, channels, line)
    return on_host(cfg, params, settings, channels, backend, line)


@contextlib.contextmanager
def transfer_errors() -> Iterator[None]:
    """Turns what the device says of a failed exchange into a TransferError of one line."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "exchange of blocks: " not in str(error):
            raise
        raise TransferError(" ".join(str(error).split())) from None


@functools.partial(jax.jit, static_argnames="cfg")
def _embed(params: Any, tokens: jax.Array, *, cfg: ModelConfig) -> jax.Array:
    return build_model(cfg, params).embedding(tokens)


@functools.partial(
    jax.jit, static_argnames=("cfg", "layer_cfg"), donate_argnames=("dense", "sparse")
)
def _step(
    params: Any,
    x: jax.Array,
    position: jax.Array,
    dense: list[Any],
    sparse: list[DeviceLayer],
    *,
    cfg: ModelConfig,
    layer_cfg: DeviceLayerConfig,
) -> tuple[jax.Array, list[Any], list[DeviceLayer]]:
    model: Transformer = build_model(cfg, params)
    layers, dense, sparse = layers_of(model), [*dense], [*sparse]
    for number, cache in enumerate(dense):
        x, dense[number] = layers[number].decode(x, position, cache)
    for number, state in enumerate(sparse):
        layer = layers[len(dense) + number]
        projected = project(layer, x[:, None], position[:, None])
        query, key, value = jax.tree.map(lambda array: array[:, 0], projected)
        mixed, sparse[number] = step(state, query, key, value, cfg=layer_cfg)
        x = finish(layer, x[:, None], mixed[:, None])[:, 0]
    return model.final_norm(x), dense, sparse

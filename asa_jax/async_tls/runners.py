"""`Runner`s whose rows read a prompt densely and then attend to few of its tokens.

`MemoryRunner` leaves the caches on the device; `OffloadRunner` (AsyncTLS) moves those of all sparse
layers to the host once the prompt is read, and its steps are driven from the host, layer by layer.
"""

import functools
import math
from typing import Any, cast

import jax
import numpy as np

from asa_jax.async_tls.calibration import fingerprint_of, load_channels
from asa_jax.async_tls.device_model import make_model, transfer_errors
from asa_jax.async_tls.generation_options import ASYNC_TLS, SparseOptions
from asa_jax.async_tls.memory_decoding import MemoryDecoder, SparseDecode, start, stop
from asa_jax.async_tls.model_layers import build_model, caches_of
from asa_jax.async_tls.offloaded_model import EngineFigures, check_memory
from asa_jax.async_tls.settings import DecodingConfig, key_shape
from asa_jax.async_tls.transfers import TransferError
from asa_jax.config import ModelConfig
from asa_jax.decoding.runner import Runner
from asa_jax.decoding.settings import CHUNK_TOKENS
from asa_jax.decoding.steps import (
    DecodeState,
    Drawn,
    Draws,
    advance,
    draw_tokens,
    next_tokens,
    nothing_drawn,
)
from asa_jax.errors import UserError
from pallas_kernels.async_tls_select_blocks.mosaic_gpu import BLOCKS_MULTIPLE


class _SparseRunner(Runner):
    """A runner whose caches are whole blocks of the index."""

    def __init__(
        self,
        cfg: ModelConfig,
        params: Any,
        vocab_size: int,
        settings: DecodingConfig,
        channels: np.ndarray,
        chunk_tokens: int = CHUNK_TOKENS,
    ) -> None:
        """Prepares; nothing is compiled.

        Args:
            cfg: the architecture, of kinds that `settings.key_shape` takes.
            params: nested dict of parameters.
            vocab_size: tokens that may be drawn.
            settings: how it is decoded.
            channels: int32 [layers, K, r], of the labels.
            chunk_tokens: most tokens of a row that are read at a time.
        """
        super().__init__(cfg, params, vocab_size, chunk_tokens=chunk_tokens)
        self._settings, self._channels = settings, channels
        # What the rows are after the last draw, as long as nothing was read since.
        self._drawn: DecodeState | None = None

    def cache_length(self, num_tokens: int, max_tokens: int) -> int:
        """As `Runner.cache_length`, in whole blocks of the index, as many as its kernel takes."""
        blocks = BLOCKS_MULTIPLE * self._settings.sizes.block_size
        multiple = math.lcm(blocks, self.cfg.alignment)
        return -(-super().cache_length(num_tokens, max_tokens) // multiple) * multiple


class MemoryRunner(_SparseRunner):
    """Decodes by one of the selections that AsyncTLS is compared with."""

    def __init__(self, *args: Any, decoder: MemoryDecoder, **kwargs: Any) -> None:
        """As `_SparseRunner`, with the decoder."""
        super().__init__(*args, **kwargs)
        self._decode = SparseDecode(decoder, self._settings)
        self._start = jax.jit(start, static_argnames="settings")

    def draw(
        self, state: DecodeState, draws: Draws, num_steps: int, *, size: int, num_alternatives: int
    ) -> tuple[DecodeState, Drawn]:
        """See `Runner.draw`."""
        if state is not self._drawn:
            self._cache = self._start(
                state.cache, state.lengths, self._channels, settings=self._settings
            )
        groups = state.cache
        with self._devices():
            after, drawn = draw_tokens(
                self.params, state._replace(cache=self._cache), draws, np.int32(num_steps),
                cfg=self.cfg, vocab_size=self._vocab_size, size=size,
                num_alternatives=num_alternatives, decode=self._decode,
            )  # fmt: skip
        self._cache = after.cache
        self._drawn = after._replace(cache=stop(groups, after.cache))
        return self._drawn, drawn


class OffloadRunner(_SparseRunner):
    """Decodes by AsyncTLS: caches of sparse layers go to the host when text is drawn.

    A text cannot be read on behind what was drawn, because prefill needs the caches on the device.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As `_SparseRunner`."""
        super().__init__(*args, **kwargs)
        self._model = make_model(self.cfg, self.params, self._settings, self._channels)

    @property
    def backend_line(self) -> str:
        """Which back end moves blocks, for people."""
        return self._model.backend_line

    @property
    def figures(self) -> EngineFigures:
        """What the engines of all layers did so far."""
        return self._model.figures

    def empty(self, num_texts: int, cache_length: int) -> DecodeState:
        """As `Runner.empty`; HostMemoryError where the host has no room for the caches."""
        check_memory(self.cfg, self._settings, num_texts, cache_length)
        return super().empty(num_texts, cache_length)

    def read(
        self, state: DecodeState, tokens: np.ndarray, offset: int, lengths: np.ndarray
    ) -> DecodeState:
        """See `Runner.read`."""
        if state.cache is None:
            raise UserError("async_tls: a text whose cache is on the host cannot be read on")
        return super().read(state, tokens, offset, lengths)

    def draw(
        self, state: DecodeState, draws: Draws, num_steps: int, *, size: int, num_alternatives: int
    ) -> tuple[DecodeState, Drawn]:
        """See `Runner.draw`; it waits for the token before each."""
        try:
            with self._devices(), transfer_errors():
                # Committed as the pools are, or the first steps compile their programs twice.
                state, drawn = jax.device_put(
                    (state, nothing_drawn(state.lengths.size, size, num_alternatives)),
                    jax.devices()[0],
                )
                if state.cache is not None:
                    self._model.load(caches_of(state.cache), np.asarray(state.lengths))
                    state = state._replace(cache=None)
                # Of the token before the last, so that the device has the last to go on with.
                ended = state.ended
                for _ in range(num_steps):
                    if np.asarray(ended).all():
                        break
                    ended = state.ended
                    state, drawn = self._step(state, drawn, draws)
                jax.block_until_ready(state)
        except TransferError as error:
            raise UserError(f"async_tls: {error}") from None
        return state, drawn

    def _step(self, state: DecodeState, drawn: Drawn, draws: Draws) -> tuple[DecodeState, Drawn]:
        tokens, drawn = _next_tokens(
            self.params, state, drawn, draws, cfg=self.cfg, vocab_size=self._vocab_size
        )
        hidden = self._model.step(tokens, state.lengths)
        return _advance(state, tokens, draws, hidden, None), drawn


@functools.partial(jax.jit, static_argnames=("cfg", "vocab_size"))
def _next_tokens(
    params: Any,
    state: DecodeState,
    drawn: Drawn,
    draws: Draws,
    *,
    cfg: ModelConfig,
    vocab_size: int,
) -> tuple[jax.Array, Drawn]:
    return next_tokens(build_model(cfg, params), state, drawn, draws, vocab_size)


_advance = jax.jit(advance)


def make_runner(
    options: SparseOptions, cfg: ModelConfig, params: Any, vocab_size: int, chunk_tokens: int
) -> MemoryRunner | OffloadRunner:
    """The runner that a command line asks for.

    Args:
        options: the decoder and its settings.
        cfg: the architecture.
        params: nested dict of its parameters, as they are stored.
        vocab_size: tokens that may be drawn.
        chunk_tokens: most tokens of a row that are read at a time.

    Raises:
        CheckpointError: the channels are of another model or other sizes, or damaged.
    """
    shape, number = key_shape(cfg), options.settings.sizes.num_channels
    sizes = cfg.num_layers, shape.num_kv_heads, number
    if options.channels is None:  # nothing reads the labels
        channels = np.broadcast_to(np.arange(number, dtype=np.int32), sizes)
    else:
        fingerprint = fingerprint_of(cfg, params)
        channels = load_channels(options.channels, sizes, shape.head_dim, fingerprint)
    arguments = cfg, params, vocab_size, options.settings, channels, chunk_tokens
    if options.decoder == ASYNC_TLS:
        return OffloadRunner(*arguments)
    return MemoryRunner(*arguments, decoder=cast(MemoryDecoder, options.decoder))

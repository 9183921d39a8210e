"""Runs the compiled steps of decoding on a model's devices."""

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from asa_jax.config import ModelConfig
from asa_jax.context_parallel import row_multiple
from asa_jax.decoding.cache_bytes import allocated_bytes
from asa_jax.decoding.settings import CHUNK_TOKENS, Sampling, check_chunk_tokens, check_length
from asa_jax.decoding.steps import (
    DecodeState,
    Drawn,
    Draws,
    draw_tokens,
    empty_state,
    read_chunk,
    resize_state,
)
from asa_jax.errors import UserError
from asa_jax.model.param_layout import listed_layers, matrices_in_compute_dtype

MIN_BUCKET_TOKENS = 64
_LESS = "shorten the prompt, lower max_tokens or give fewer prompts at once"


class Runner:
    """A model on its devices, and the few sizes of arrays that its programs are compiled for."""

    def __init__(
        self,
        cfg: ModelConfig,
        params: Any,
        vocab_size: int,
        mesh: Mesh | None = None,
        chunk_tokens: int = CHUNK_TOKENS,
    ) -> None:
        """Prepares; nothing is compiled.

        Args:
            cfg: the architecture.
            params: nested dict of parameters.
            vocab_size: tokens that may be drawn.
            mesh: devices that hold the parameters; None: one device.
            chunk_tokens: most tokens of a row that are read at a time.

        Raises:
            ConfigError: chunk_tokens are not whole blocks.
        """
        self.cfg, listed = listed_layers(cfg, params)
        self.params = matrices_in_compute_dtype(self.cfg, listed)
        self.mesh = mesh
        self._vocab_size = vocab_size
        self._multiple = row_multiple(cfg.alignment, mesh.shape["context"] if mesh else 1)
        check_chunk_tokens(chunk_tokens, self._multiple)
        self._chunk_tokens = chunk_tokens

    def block_start(self, position: int) -> int:
        """The start of the block of a position, where a chunk may begin."""
        return position // self.cfg.alignment * self.cfg.alignment

    def num_rows(self, num_texts: int) -> int:
        """Rows of the arrays for so many texts: a multiple of what the mesh divides."""
        shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"] if self.mesh else 1
        return -(-num_texts // shards) * shards

    def cache_length(self, num_tokens: int, max_tokens: int) -> int:
        """Tokens of the caches for texts of `num_tokens` that draw `max_tokens` more.

        An eighth of the length at most is in excess, so that few programs are compiled.

        Raises:
            ConfigError: more than any text may have.
        """
        check_length(num_tokens, max_tokens)
        total = num_tokens + max_tokens
        step = self._doubled(max(MIN_BUCKET_TOKENS, total // 16))
        return -(-total // step) * step

    def chunk_size(self, num_tokens: int, cache_length: int) -> int:
        """Tokens of each chunk in which `num_tokens` are read."""
        size = self._doubled(max(MIN_BUCKET_TOKENS, num_tokens))
        return min(size, self._chunk_tokens, cache_length)

    def _doubled(self, tokens: int) -> int:
        """The smallest multiple of whole blocks by a power of two that is at least `tokens`."""
        size = self._multiple
        while size < tokens:
            size *= 2
        return size

    def empty(self, num_texts: int, cache_length: int) -> DecodeState:
        """Rows without tokens.

        Raises:
            UserError: their caches do not fit into memory.
        """
        num_rows = self.num_rows(num_texts)
        self._check_memory(num_rows, cache_length)
        with self._devices():
            return empty_state(cfg=self.cfg, num_rows=num_rows, cache_length=cache_length)

    def shapes(self, cache_length: int) -> DecodeState:
        """Shapes and dtypes of the state of one text."""
        return jax.eval_shape(
            functools.partial(empty_state, cfg=self.cfg, num_rows=1, cache_length=cache_length)
        )

    def read(
        self, state: DecodeState, tokens: np.ndarray, offset: int, lengths: np.ndarray
    ) -> DecodeState:
        """Reads a chunk; arguments as of `steps.read_chunk`."""
        with self._devices():
            return read_chunk(self.params, state, tokens, np.int32(offset), lengths, cfg=self.cfg)

    def resize(self, state: DecodeState, cache_length: int) -> DecodeState:
        """The same rows, filled up to what the mesh divides, with caches of another length.

        Raises:
            UserError: the new caches do not fit into memory beside the old ones.
        """
        num_rows = self.num_rows(state.lengths.size)
        self._check_memory(num_rows, cache_length)
        with self._devices():
            return resize_state(state, cfg=self.cfg, num_rows=num_rows, cache_length=cache_length)

    def draw(
        self, state: DecodeState, draws: Draws, num_steps: int, *, size: int, num_alternatives: int
    ) -> tuple[DecodeState, Drawn]:
        """Draws tokens and does not wait for them; arguments as of `steps.draw_tokens`."""
        with self._devices():
            return draw_tokens(
                self.params, state, draws, np.int32(num_steps), cfg=self.cfg,
                vocab_size=self._vocab_size, size=size, num_alternatives=num_alternatives,
            )  # fmt: skip

    def fetch(self, arrays: Any) -> Any:
        """Waits for arrays and brings them to the host."""
        with self._devices():
            return jax.tree.map(np.asarray, arrays)

    def _check_memory(self, num_rows: int, cache_length: int) -> None:
        """Refuses caches that cannot fit; a host would swap or kill the process instead."""
        devices = list(self.mesh.devices.flat) if self.mesh else jax.local_devices()[:1]
        needed = allocated_bytes(self.cfg, num_rows, cache_length)
        there = memory_bytes(devices)
        if needed > there:
            raise UserError(
                f"out of memory: caches of {num_rows} x {cache_length} tokens take "
                f"{needed / 2**30:.1f} GiB, and there are {there / 2**30:.1f}; {_LESS}"
            )

    @contextlib.contextmanager
    def _devices(self) -> Iterator[None]:
        mesh = jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext()
        try:
            with mesh:
                yield
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise UserError(f"out of memory: {_LESS}") from None


def make_draws(
    seeds: Sequence[int], num_rows: int, ends: Sequence[int], sampling: Sampling
) -> Draws:
    """`Draws` of rows with these seeds, and of rows that only fill the arrays."""
    padded = np.zeros(num_rows, np.uint32)
    padded[: len(seeds)] = seeds
    return Draws(padded, np.array(ends, np.int32), sampling.checked())


def memory_bytes(devices: Sequence[jax.Device]) -> int:
    """Memory of the devices together, as far as this process can tell; of the host for CPUs."""
    stats = [device.memory_stats() or {} for device in devices]
    if all("bytes_limit" in entry for entry in stats):
        return sum(entry["bytes_limit"] - entry["bytes_in_use"] for entry in stats)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

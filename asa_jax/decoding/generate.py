"""Continues prompts with text from a model and its caches."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from asa_jax.config import MAX_EVALUATION_TOKENS, Config
from asa_jax.context_parallel import row_multiple
from asa_jax.data.tokenizer import StreamingDecoder, Tokenizer
from asa_jax.decoding.cache_bytes import allocated_bytes
from asa_jax.decoding.settings import Sampling, check_request
from asa_jax.decoding.steps import STEPS_PER_DISPATCH, DecodeState, advance, start
from asa_jax.errors import ConfigError, UserError

MIN_BUCKET_TOKENS = 64
PLAIN = Sampling()
_LESS = "shorten the prompt, lower max_tokens or give fewer prompts at once"


class Generator:
    """Continues batches of prompts, which may differ in length.

    Programs are compiled once for each number of rows, bucket of prompt lengths and bucket of cache
    lengths. What a row draws depends on its prompt, its place in the batch and the seed alone.
    """

    def __init__(
        self, config: Config, params: Any, tokenizer: Tokenizer, mesh: Mesh | None = None
    ) -> None:
        """Prepares generation; nothing is compiled before the first prompt.

        Args:
            config: the run.
            params: nested dict of parameters, as `restore_params` gives.
            tokenizer: the run's tokenizer.
            mesh: devices that hold the parameters; None: one device. Several processes must all
                make the same calls.

        Raises:
            ConfigError: the tokenizer has more tokens than the model.
        """
        if tokenizer.vocab_size > config.model.vocab_size:
            raise ConfigError(
                f"config.model.vocab_size = {config.model.vocab_size}: must be at least "
                f"{tokenizer.vocab_size}, the vocabulary of the tokenizer"
            )
        self.tokenizer = tokenizer
        self._cfg, self._params, self._mesh = config.model, params, mesh

    def generate(
        self, prompts: Sequence[str], *, max_tokens: int, sampling: Sampling = PLAIN, seed: int = 0
    ) -> list[str]:
        """The whole continuation of each prompt; arguments and errors as of `stream`."""
        parts = self.stream(prompts, max_tokens=max_tokens, sampling=sampling, seed=seed)
        return ["".join(texts) for texts in zip(*parts, strict=True)]

    def stream(
        self, prompts: Sequence[str], *, max_tokens: int, sampling: Sampling = PLAIN, seed: int = 0
    ) -> Iterator[list[str]]:
        """Continues prompts until their documents end, and gives the text as it comes.

        Args:
            prompts: at least one. An empty one is read as a line break, because training never
                reads an end of document.
            max_tokens: most tokens of a continuation.
            sampling: how tokens are drawn.
            seed: of the draws.

        Returns:
            Gives for each prompt the text that has come since, in whole characters, often ''.

        Raises:
            ConfigError: a setting is out of range, or prompt and continuation are too long.
            UserError: the caches do not fit into memory.
        """
        encoded = [self.encode_prompt(prompt) for prompt in prompts]
        rows = [_Continuation(self.tokenizer, tokens) for tokens in encoded]
        drawn = self.stream_tokens(encoded, max_tokens=max_tokens, sampling=sampling, seed=seed)
        return _stream_text(rows, drawn)

    def encode_prompt(self, prompt: str) -> list[int]:
        """Token ids of a prompt, at least one."""
        encode = self.tokenizer.encode
        return encode(prompt) or encode("\n") or [self.tokenizer.end_of_document_id]

    def stream_tokens(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        sampling: Sampling = PLAIN,
        seed: int = 0,
    ) -> Iterator[np.ndarray]:
        """As `stream`, of token ids, and on beyond the end of a document.

        Args:
            prompts: token ids of each prompt, at least one.
            max_tokens: tokens to draw for each.
            sampling: how tokens are drawn.
            seed: of the draws.

        Returns:
            Gives int32 [B, n], the next n tokens of each prompt.
        """
        check_request(max_tokens, seed)
        cache_length = self._cache_length(max(map(len, prompts)), max_tokens)
        settings = {
            "seed": np.uint32(seed),
            "sampling": sampling.checked(),
            "cfg": self._cfg,
            "vocab_size": self.tokenizer.vocab_size,
        }
        padded, lengths = self._pad(prompts)
        self._check_memory(len(lengths), cache_length)

        def draw() -> Iterator[np.ndarray]:
            state, drawn = self._run(start, padded, lengths, **settings, cache_length=cache_length)
            yield drawn[: len(prompts)]
            for first in range(1, max_tokens, STEPS_PER_DISPATCH):
                state, drawn = self._run(advance, state, **settings)
                yield drawn[: len(prompts), : max_tokens - first]

        return draw()

    def _cache_length(self, longest: int, max_tokens: int) -> int:
        """Tokens that the longest row comes to, whole dispatches and buckets."""
        if longest + max_tokens > MAX_EVALUATION_TOKENS:
            raise ConfigError(
                f"prompt of {longest} tokens and max_tokens = {max_tokens}: must be at most "
                f"{MAX_EVALUATION_TOKENS} together"
            )
        dispatches = -(-max_tokens // STEPS_PER_DISPATCH)
        return self._bucket(longest + dispatches * STEPS_PER_DISPATCH)

    def _bucket(self, tokens: int) -> int:
        """The next of few lengths, so that few programs are compiled."""
        context = self._mesh.shape["context"] if self._mesh else 1
        size = row_multiple(self._cfg.alignment, context)
        while size < max(tokens, MIN_BUCKET_TOKENS):
            size *= 2
        return size

    def _pad(self, prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Prompts as int32 [B, T] and their lengths [B], B a multiple of what the mesh splits."""
        shards = self._mesh.shape["data"] * self._mesh.shape["fsdp"] if self._mesh else 1
        num_rows = -(-len(prompts) // shards) * shards
        tokens = np.zeros((num_rows, self._bucket(max(map(len, prompts)))), np.int32)
        lengths = np.ones(num_rows, np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
            lengths[row] = len(prompt)
        return tokens, lengths

    def _check_memory(self, num_rows: int, cache_length: int) -> None:
        """Refuses caches that cannot fit; a host would swap or kill the process instead."""
        devices = list(self._mesh.devices.flat) if self._mesh else jax.local_devices()[:1]
        needed = allocated_bytes(self._cfg, num_rows, cache_length)
        there = _memory_bytes(devices)
        if needed > there:
            raise UserError(
                f"out of memory: caches of {num_rows} x {cache_length} tokens take "
                f"{needed / 2**30:.1f} GiB, and there are {there / 2**30:.1f}; {_LESS}"
            )

    def _run(
        self, step: Callable[..., tuple[DecodeState, jax.Array]], *args: Any, **settings: Any
    ) -> tuple[DecodeState, np.ndarray]:
        mesh = jax.set_mesh(self._mesh) if self._mesh else contextlib.nullcontext()
        try:
            with mesh:
                state, drawn = step(self._params, *args, **settings)
                return state, np.array(drawn)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise UserError(f"out of memory: {_LESS}") from None


def generate_text(
    config: Config,
    params: Any,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> str:
    """The continuation of one prompt; arguments as of `Generator`, `Sampling` and `stream`."""
    generator = Generator(config, params, tokenizer, mesh)
    sampling = Sampling(temperature, top_k, top_p)
    return generator.generate([prompt], max_tokens=max_tokens, sampling=sampling, seed=seed)[0]


class _Continuation:
    """The text of one row, up to the end of its document."""

    # Decoders treat the start of a text in their own ways, so it goes on from the prompt's end.
    _CONTEXT_TOKENS = 8

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._end = tokenizer.end_of_document_id
        self._decoder = StreamingDecoder(tokenizer)
        self.ended = False
        for token in prompt[-self._CONTEXT_TOKENS :]:
            self._decoder.push(token)

    def push(self, tokens: Sequence[int]) -> str:
        """Adds tokens and returns the text that is complete with them."""
        text = ""
        for token in tokens:
            if self.ended:
                break
            self.ended = token == self._end
            text += self._decoder.flush() if self.ended else self._decoder.push(token)
        return text

    def flush(self) -> str:
        """Returns what is held back, at the end of the stream."""
        return "" if self.ended else self._decoder.flush()


def _stream_text(rows: list[_Continuation], drawn: Iterator[np.ndarray]) -> Iterator[list[str]]:
    for chunk in drawn:
        yield [row.push(tokens) for row, tokens in zip(rows, chunk.tolist(), strict=True)]
        if all(row.ended for row in rows):
            return
    yield [row.flush() for row in rows]


def _memory_bytes(devices: Sequence[jax.Device]) -> int:
    """Memory of the devices together, as far as this process can tell; of the host for CPUs."""
    stats = [device.memory_stats() or {} for device in devices]
    if all("bytes_limit" in entry for entry in stats):
        return sum(entry["bytes_limit"] - entry["bytes_in_use"] for entry in stats)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

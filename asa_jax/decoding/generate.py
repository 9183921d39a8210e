"""Continues prompts with text from a model and its caches."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from asa_jax.config import Config
from asa_jax.data.tokenizer import Tokenizer, check_vocabulary
from asa_jax.decoding.continuation import Alternative, Completion, Continuation
from asa_jax.decoding.rows import STREAM_TOKENS, Progress, Rows
from asa_jax.decoding.runner import Runner
from asa_jax.decoding.settings import (
    CHUNK_TOKENS,
    Sampling,
    check_alternatives,
    check_request,
    row_seeds,
)
from asa_jax.decoding.steps import Drawn

PLAIN = Sampling()


class Generator:
    """Continues batches of prompts, which may differ in length.

    Programs are compiled once for each number of rows, size of chunks and length of caches. What a
    row draws depends on its prompt and its seed alone.
    """

    def __init__(
        self,
        config: Config,
        params: Any,
        tokenizer: Tokenizer,
        mesh: Mesh | None = None,
        *,
        chunk_tokens: int = CHUNK_TOKENS,
        runner: Runner | None = None,
    ) -> None:
        """Prepares generation; nothing is compiled before the first prompt.

        Args:
            config: the run.
            params: nested dict of parameters, as `restore_params` gives.
            tokenizer: the run's tokenizer.
            mesh: devices that hold the parameters; None: one device. Several processes must all
                make the same calls.
            chunk_tokens: most tokens of a prompt that are read at a time.
            runner: of this model, made elsewhere; None: one on the mesh.

        Raises:
            ConfigError: the tokenizer has more tokens than the model, or chunks are not whole
                blocks.
        """
        check_vocabulary(tokenizer.vocab_size, config.model.vocab_size, "the tokenizer")
        self.config, self.tokenizer = config, tokenizer
        self.runner = runner or Runner(
            config.model, params, tokenizer.vocab_size, mesh, chunk_tokens
        )

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_tokens: int,
        sampling: Sampling = PLAIN,
        seed: int | Sequence[int] = 0,
    ) -> list[str]:
        """The whole continuation of each prompt; arguments and errors as of `stream`."""
        completions = self.complete(prompts, max_tokens=max_tokens, sampling=sampling, seed=seed)
        return [completion.text for completion in completions]

    def complete(
        self,
        prompts: Sequence[str],
        *,
        max_tokens: int,
        sampling: Sampling = PLAIN,
        seed: int | Sequence[int] = 0,
        stop: Sequence[str] = (),
        num_alternatives: int = 0,
        progress: Progress | None = None,
    ) -> list[Completion]:
        """As `stream`, with all that is known of each continuation.

        All tokens are drawn in one dispatch, unless a stop string may end them earlier.

        Args:
            prompts: at least one.
            max_tokens: most tokens of a continuation.
            sampling: how tokens are drawn.
            seed: as of `stream`.
            stop: strings that end a continuation.
            num_alternatives: most likely tokens to give beside each token, at most 20.
            progress: told how far the prompts are read.

        Raises:
            ConfigError: a setting is out of range, or prompt and continuation are too long.
            UserError: the caches do not fit into memory.
        """
        encoded = [self.encode_prompt(prompt) for prompt in prompts]
        rows = [Continuation(self.tokenizer, tokens, stop) for tokens in encoded]
        check_request(max_tokens, stop=stop, num_alternatives=num_alternatives)
        check_alternatives(num_alternatives, self.tokenizer.vocab_size)
        drawn = self._draw(
            encoded, max_tokens, sampling, seed, until_end=True, progress=progress,
            num_alternatives=num_alternatives,
            steps_per_dispatch=STREAM_TOKENS if stop else max_tokens,
        )  # fmt: skip
        parts, texts = [], [""] * len(rows)
        for part, new in _texts(rows, drawn):
            parts += [part] if part else []
            texts = [text + more for text, more in zip(texts, new, strict=True)]
        return [_completion(i, row, texts[i], parts) for i, row in enumerate(rows)]

    def stream(
        self,
        prompts: Sequence[str],
        *,
        max_tokens: int,
        sampling: Sampling = PLAIN,
        seed: int | Sequence[int] = 0,
        stop: Sequence[str] = (),
    ) -> Iterator[list[str]]:
        """Continues prompts until their documents end, and gives the text as it comes.

        Args:
            prompts: at least one. An empty one is read as a line break, because training never
                reads an end of document.
            max_tokens: most tokens of a continuation.
            sampling: how tokens are drawn.
            seed: of each row's draws; an int is the first row's, and each row has one more.
            stop: strings that end a continuation; neither they nor their parts are given.

        Returns:
            Gives for each prompt the text that has come since, in whole characters, often ''.

        Raises:
            ConfigError: a setting is out of range, or prompt and continuation are too long.
            UserError: the caches do not fit into memory.
        """
        encoded = [self.encode_prompt(prompt) for prompt in prompts]
        rows = [Continuation(self.tokenizer, tokens, stop) for tokens in encoded]
        check_request(max_tokens, stop=stop)
        drawn = self._draw(encoded, max_tokens, sampling, seed, until_end=True)
        return (new for _, new in _texts(rows, drawn))

    def encode_prompt(self, prompt: str, *, continues: bool = False) -> list[int]:
        """Token ids of a prompt, at least one; `continues`: it is not the start of a text."""
        encode, start = self.tokenizer.encode, () if continues else self.tokenizer.start_ids
        return [*start, *encode(prompt)] or encode("\n") or [self.tokenizer.end_of_document_id]

    def stream_tokens(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        sampling: Sampling = PLAIN,
        seed: int | Sequence[int] = 0,
    ) -> Iterator[np.ndarray]:
        """As `stream`, of token ids, and on beyond the end of a document.

        Args:
            prompts: token ids of each prompt, at least one.
            max_tokens: tokens to draw for each.
            sampling: how tokens are drawn.
            seed: as of `stream`.

        Returns:
            Gives int32 [B, n], the next n tokens of each prompt.
        """
        drawn = self._draw(prompts, max_tokens, sampling, seed, until_end=False)
        return (part.tokens for part in drawn)

    def _draw(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        sampling: Sampling,
        seed: int | Sequence[int],
        *,
        until_end: bool,
        progress: Progress | None = None,
        **dispatch: int,
    ) -> Iterator[Drawn]:
        """Checks a request and allocates its caches at once; reads and draws when iterated."""
        seeds = row_seeds(seed, len(prompts))
        check_request(max_tokens, seeds)
        sampling = sampling.checked()
        length = self.runner.cache_length(max(map(len, prompts)), max_tokens)
        rows = Rows.empty(self.runner, len(prompts), length)
        ends = self.tokenizer.end_ids if until_end else ()

        def draw() -> Iterator[Drawn]:
            rows.read(prompts, progress)
            yield from rows.draw(max_tokens, sampling=sampling, seeds=seeds, ends=ends, **dispatch)

        return draw()


def _texts(
    rows: Sequence[Continuation], drawn: Iterator[Drawn]
) -> Iterator[tuple[Drawn | None, list[str]]]:
    """What was drawn and the text that came with it, until every row has finished."""
    for part in drawn:
        tokens = part.tokens.tolist()
        yield part, [row.push(new) for row, new in zip(rows, tokens, strict=True)]
        if all(row.finish_reason for row in rows):
            return
    yield None, [row.flush() for row in rows]


def _completion(index: int, row: Continuation, text: str, parts: Sequence[Drawn]) -> Completion:
    """All that is known of a row that has finished."""

    def column(arrays: list[Any]) -> Any:
        return np.concatenate([array[index] for array in arrays])[: row.num_tokens].tolist()

    likely = column([part.alternatives for part in parts])
    logs = column([part.alternative_log_probabilities for part in parts])
    assert row.finish_reason is not None
    return Completion(
        text=text,
        finish_reason=row.finish_reason,
        tokens=column([part.tokens for part in parts]),
        log_probabilities=column([part.log_probabilities for part in parts]),
        alternatives=[
            [Alternative(*pair) for pair in zip(*of_token, strict=True)]
            for of_token in zip(likely, logs, strict=True)
        ],
    )

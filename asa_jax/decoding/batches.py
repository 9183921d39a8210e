"""Many prompts, some at a time."""

from collections.abc import Iterator, Sequence
from typing import Any

from asa_jax.decoding.continuation import Completion
from asa_jax.decoding.generate import Generator
from asa_jax.decoding.prompts import Prompt
from asa_jax.decoding.rows import Progress
from asa_jax.decoding.settings import MAX_SEED


def complete_prompts(
    generator: Generator,
    prompts: Sequence[Prompt],
    *,
    seed: int,
    batch_size: int,
    progress: Progress,
    **request: Any,
) -> Iterator[tuple[Prompt, Completion]]:
    """Continues prompts in their order, `batch_size` at a time.

    Args:
        generator: of the continuations.
        prompts: with or without seeds.
        seed: that of line 1 where it gives none; of line n one more for each line.
        batch_size: prompts of a batch. What a prompt is continued with does not depend on it.
        progress: told how many prompts are done, of how many.
        **request: as `Generator.complete` takes it.

    Returns:
        Gives each prompt with its completion, as batches are done.
    """
    size = min(batch_size, len(prompts))
    for first in range(0, len(prompts), size):
        batch = list(prompts[first : first + size])
        # A last batch of fewer rows would be another program: repetitions fill it up.
        rows = batch + batch[:1] * (size - len(batch))
        seeds = [_seed(prompt, seed) for prompt in rows]
        completions = generator.complete([prompt.text for prompt in rows], seed=seeds, **request)
        yield from zip(batch, completions, strict=False)
        progress(first + len(batch), len(prompts))


def _seed(prompt: Prompt, seed: int) -> int:
    return (seed + prompt.line - 1) % (MAX_SEED + 1) if prompt.seed is None else prompt.seed


def to_json(prompt: Prompt, completion: Completion, *, log_probabilities: bool) -> dict[str, Any]:
    """What a line of the results holds."""
    result: dict[str, Any] = {
        "line": prompt.line,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "num_tokens": len(completion.tokens),
    }
    if log_probabilities:
        result["tokens"] = completion.tokens
        result["log_probabilities"] = completion.log_probabilities
        result["alternatives"] = completion.alternatives
    return result

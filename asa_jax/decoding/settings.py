"""How tokens are drawn; imports no jax, so that a wrong value is told at once."""

from collections.abc import Sequence
from typing import NamedTuple

from asa_jax.config_evaluation import MAX_EVALUATION_TOKENS
from asa_jax.errors import ConfigError

MAX_SEED = 2**32 - 1
MAX_ALTERNATIVES = 20
# Settings become float32, where what is far beyond these is 0 or infinite and makes logits NaN.
SMALLEST, LARGEST = 1e-30, 1e30
# Tokens of a prompt that are read at a time: enough to fill a device, few enough that what they
# need is little beside the caches of a long prompt.
CHUNK_TOKENS = 4096


class Sampling(NamedTuple):
    """What becomes of the logits before a token is drawn, in this order.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token (greedy).
        top_k: draw from the k most likely tokens; 0: from all.
        top_p: then from the fewest of the most likely tokens that hold this probability together.
        min_p: and from those at least this many times as likely as the most likely one.
        repetition_penalty: before all that, divides the positive logits of tokens that the prompt
            or the continuation has, and multiplies the negative ones; 1: none.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def checked(self) -> "Sampling":
        """Returns the same with its fields in their types.

        Raises:
            ConfigError: a field is out of range.
        """
        temperature, penalty = self.temperature, self.repetition_penalty
        _require(
            temperature == 0 or SMALLEST <= temperature <= LARGEST, "temperature", temperature,
            f"0 (greedy) or from {SMALLEST:g} to {LARGEST:g}",
        )  # fmt: skip
        _require(0 <= self.top_k < 2**31, "top_k", self.top_k, "at least 0 (0: all tokens)")
        _require(SMALLEST <= self.top_p <= 1, "top_p", self.top_p, f"from {SMALLEST:g} to 1")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 to 1")
        _require(
            SMALLEST <= penalty <= LARGEST, "repetition_penalty", penalty,
            f"from {SMALLEST:g} to {LARGEST:g} (1: none)",
        )  # fmt: skip
        return Sampling(
            float(temperature), int(self.top_k), float(self.top_p), float(self.min_p),
            float(penalty),
        )  # fmt: skip


def check_request(
    max_tokens: int,
    seeds: Sequence[int] = (),
    stop: Sequence[str] = (),
    num_alternatives: int = 0,
    least_tokens: int = 1,
) -> None:
    """Raises a ConfigError unless what is asked for beside the sampling is in range."""
    least, most = least_tokens, MAX_EVALUATION_TOKENS - 1
    _require(least <= max_tokens <= most, "max_tokens", max_tokens, f"from {least} to {most}")
    for seed in seeds:
        _require(0 <= seed <= MAX_SEED, "seed", seed, f"from 0 to {MAX_SEED}")
    for text in stop:
        _require(bool(text), "stop", text, "at least a character")
    _require(
        0 <= num_alternatives <= MAX_ALTERNATIVES, "alternatives", num_alternatives,
        f"from 0 to {MAX_ALTERNATIVES}",
    )  # fmt: skip


def check_alternatives(num_alternatives: int, vocab_size: int) -> None:
    """Raises a ConfigError if there are not so many tokens to choose from."""
    _require(
        num_alternatives <= vocab_size, "alternatives", num_alternatives,
        f"at most {vocab_size}, the tokens of the tokenizer",
    )  # fmt: skip


def check_length(num_tokens: int, max_tokens: int) -> None:
    """Raises a ConfigError if a prompt and its continuation are longer than any text may be."""
    if num_tokens + max_tokens > MAX_EVALUATION_TOKENS:
        raise ConfigError(
            f"prompt of {num_tokens} tokens and max_tokens = {max_tokens}: must be at most "
            f"{MAX_EVALUATION_TOKENS} together"
        )


def check_chunk_tokens(chunk_tokens: int, multiple: int) -> None:
    """Raises a ConfigError unless chunks are whole blocks."""
    _require(
        chunk_tokens > 0 and chunk_tokens % multiple == 0, "chunk_tokens", chunk_tokens,
        f"a positive multiple of {multiple} (model.selection_block_size, on a mesh times "
        "2 * config.mesh.context)",
    )  # fmt: skip


def row_seeds(seed: int | Sequence[int], num_rows: int) -> list[int]:
    """The seed of each row; an int is that of the first row, and each row has one more.

    Raises:
        ConfigError: there is not one for each row.
    """
    if isinstance(seed, int):
        _require(0 <= seed <= MAX_SEED, "seed", seed, f"from 0 to {MAX_SEED}")
        return [(seed + row) % (MAX_SEED + 1) for row in range(num_rows)]
    _require(len(seed) == num_rows, "seed", list(seed), f"one for each of {num_rows} prompts")
    return list(seed)


def _require(condition: bool, name: str, value: object, requirement: str) -> None:
    if not condition:
        raise ConfigError(f"{name} = {value!r}: must be {requirement}")

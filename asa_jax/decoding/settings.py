"""How tokens are drawn; imports no jax, so that a wrong value is told at once."""

from typing import NamedTuple

from asa_jax.config import MAX_EVALUATION_TOKENS
from asa_jax.errors import ConfigError

MAX_SEED = 2**32 - 1


class Sampling(NamedTuple):
    """What becomes of the logits before a token is drawn, in this order.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token (greedy).
        top_k: draw from the k most likely tokens; 0: from all.
        top_p: then from the fewest of the most likely tokens that hold this probability together.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def checked(self) -> "Sampling":
        """Returns the same with its fields in their types.

        Raises:
            ConfigError: a field is out of range.
        """
        finite = 0 <= self.temperature < float("inf")
        _require(finite, "temperature", self.temperature, "at least 0 (0: greedy)")
        _require(0 <= self.top_k < 2**31, "top_k", self.top_k, "at least 0 (0: all tokens)")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        return Sampling(float(self.temperature), int(self.top_k), float(self.top_p))


def check_request(max_tokens: int, seed: int) -> None:
    """Raises a ConfigError unless the number of tokens and the seed are in range."""
    most = MAX_EVALUATION_TOKENS
    _require(1 <= max_tokens < most, "max_tokens", max_tokens, f"from 1 to {most - 1}")
    _require(0 <= seed <= MAX_SEED, "seed", seed, f"from 0 to {MAX_SEED}")


def _require(condition: bool, name: str, value: object, requirement: str) -> None:
    if not condition:
        raise ConfigError(f"{name} = {value!r}: must be {requirement}")

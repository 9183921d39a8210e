"""What `eval.py` measures."""

import dataclasses

from asa_jax.config_checks import require, require_choice, require_positive, require_range

EVALUATION_TASKS = (
    "perplexity", "single_noise", "single_text", "single_word", "single_uuid", "multi_key",
    "multi_value", "multi_query", "variable_tracking", "frequent_words", "associative_recall",
    "key_value",
)  # fmt: skip
# Rotary positions have no end; beyond this a length is a slip of the keyboard.
MAX_EVALUATION_TOKENS = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What `eval.py` measures; lengths in tokens.

    `samples` counts each pair of length and depth, `perplexity_tokens` bounds each text and length,
    and `batch_tokens` each forward pass.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int
    batch_tokens: int
    perplexity_tokens: int
    position_bucket_tokens: int
    seed: int

    def __post_init__(self) -> None:
        require_positive(
            "evaluation", self, "samples", "batch_tokens", "perplexity_tokens",
            "position_bucket_tokens",
        )  # fmt: skip
        require_range("evaluation", self, 0, "seed")
        for task in self.tasks:
            require_choice("evaluation", "tasks", task, EVALUATION_TASKS)
        require(bool(self.lengths), "evaluation.lengths", self.lengths, "at least one length")
        for length in self.lengths:
            require(
                1 < length <= MAX_EVALUATION_TOKENS,
                "evaluation.lengths", length, f"from 2 to {MAX_EVALUATION_TOKENS}",
            )  # fmt: skip
        require(bool(self.depths), "evaluation.depths", self.depths, "at least one depth")
        require(
            all(0 <= depth <= 1 for depth in self.depths),
            "evaluation.depths", self.depths, "between 0 (start of the context) and 1 (its end)",
        )  # fmt: skip

"""A scorer without a model."""

from collections.abc import Callable, Sequence

import numpy as np

from asa_jax.data.tokenizer import Tokenizer
from asa_jax.evaluation.scorer import TokenScores


class FakeScorer:
    """Stands in for `Scorer`: every token gets the scores that `score_token` gives it."""

    def __init__(self, tokenizer: Tokenizer, score_token: Callable[[int], tuple[float, bool]]):
        self.tokenizer = tokenizer
        self.on_tokens: Callable[[int], None] = lambda count: None
        self._score_token = score_token

    def score(self, sequences: Sequence[np.ndarray]) -> list[TokenScores]:
        results = []
        for sequence in sequences:
            nll, correct = zip(*(self._score_token(int(t)) for t in sequence[1:]), strict=True)
            results.append(TokenScores(np.array(nll, np.float32), np.array(correct)))
            self.on_tokens(len(nll))
        return results

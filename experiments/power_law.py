"""Loss as a power of the number of parameters, fitted to runs of several sizes.

L(N) = A N^-a is a straight line in logarithms: least squares give a, A and, from what the line
leaves over, their errors. With three sizes one degree of freedom is left for them, so the errors
say little more than an order of magnitude.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from asa_jax.errors import DataError


class PowerLaw(NamedTuple):
    """L(N) = exp(intercept) N^-exponent.

    Attributes:
        exponent: a.
        exponent_error: its standard error.
        intercept: log A.
        residual: standard deviation of log L around the line.
        sizes: the parameters of the runs that were fitted.
    """

    exponent: float
    exponent_error: float
    intercept: float
    residual: float
    sizes: tuple[float, ...]

    def predict(self, parameters: float) -> tuple[float, float]:
        """The loss at a size, and the standard error of a single run there."""
        logs = np.log(self.sizes)
        offset = math.log(parameters) - logs.mean()
        spread = ((logs - logs.mean()) ** 2).sum()
        error = self.residual * math.sqrt(1 + 1 / len(logs) + offset**2 / spread)
        loss = math.exp(self.intercept - self.exponent * math.log(parameters))
        return loss, loss * error


def fit_power_law(parameters: Sequence[float], losses: Sequence[float]) -> PowerLaw:
    """Fits runs of at least three sizes.

    Raises:
        DataError: there are fewer sizes.
    """
    if len(set(parameters)) < 3:
        raise DataError(f"a power law takes runs of three sizes, there are {len(set(parameters))}")
    logs, values = np.log(parameters), np.log(losses)
    slope, intercept = np.polyfit(logs, values, 1)
    left = values - (slope * logs + intercept)
    residual = math.sqrt((left**2).sum() / (len(logs) - 2))
    error = residual / math.sqrt(((logs - logs.mean()) ** 2).sum())
    return PowerLaw(-float(slope), error, float(intercept), residual, tuple(parameters))

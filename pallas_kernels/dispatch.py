"""Which implementation of an operation runs."""

from typing import Literal

Implementation = Literal["mosaic_gpu", "xla"]


def resolve(op: str, implementation: Implementation | None) -> Implementation:
    """Returns the implementation to run: the one asked for, or the best one that exists.

    Args:
      op: Name of the operation, for messages.
      implementation: 'mosaic_gpu', 'xla', or None for the best that takes the call.

    Raises:
      NotImplementedError: The implementation asked for does not exist for this operation.
      ValueError: The name is unknown.
    """
    if implementation == "mosaic_gpu":
        raise NotImplementedError(
            f"{op}: there is no mosaic_gpu kernel yet; use implementation='xla' or None"
        )
    if implementation not in (None, "xla"):
        raise ValueError(
            f"implementation: expected 'mosaic_gpu', 'xla' or None, got {implementation!r}"
        )
    return "xla"

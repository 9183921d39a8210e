"""Which implementation of an operation runs.

Every operation has an XLA form, which runs anywhere, and a Mosaic GPU kernel for Hopper GPUs. A
kernel says that it cannot take a call by raising NotImplementedError while it is traced.
"""

import contextlib
import contextvars
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Literal

import jax

Implementation = Literal["mosaic_gpu", "xla"]

_log = logging.getLogger(__name__)
_hopper_assumed = contextvars.ContextVar("hopper_assumed", default=False)


def run[Result](
    op: str,
    implementation: Implementation | None,
    *,
    mosaic_gpu: Callable[[], Result],
    xla: Callable[[], Result],
) -> Result:
    """Computes an operation by the implementation asked for, or by the best that takes the call.

    Args:
      op: Name of the operation, for messages.
      implementation: 'mosaic_gpu', 'xla', or None: the kernel on a Hopper GPU, if it takes the
        call, else XLA, which is logged once for each reason.
      mosaic_gpu: Calls the kernel.
      xla: Calls the XLA form.

    Raises:
      NotImplementedError: The kernel was asked for by name and cannot take the call.
      ValueError: The name is unknown.
    """
    if implementation not in (None, "mosaic_gpu", "xla"):
        raise ValueError(
            f"implementation: expected 'mosaic_gpu', 'xla' or None, got {implementation!r}"
        )
    with jax.named_scope(op):
        return _run(op, implementation, mosaic_gpu, xla)


def _run[Result](
    op: str,
    implementation: Implementation | None,
    mosaic_gpu: Callable[[], Result],
    xla: Callable[[], Result],
) -> Result:
    if implementation == "xla" or (implementation is None and not is_hopper()):
        return xla()
    if not is_hopper():
        raise NotImplementedError(
            f"{op}: mosaic_gpu needs a Hopper GPU, this is {_device_kind()}; "
            "use implementation='xla' or None"
        )
    try:
        return mosaic_gpu()
    except NotImplementedError as error:
        if implementation == "mosaic_gpu":
            raise NotImplementedError(f"{op}: {error}") from error
        _log_fallback(op, str(error))
        return xla()


@contextlib.contextmanager
def assumed_hopper() -> Iterator[None]:
    """Within, programs are traced as for a Hopper GPU, whatever device is here to run them."""
    token = _hopper_assumed.set(True)
    try:
        yield
    finally:
        _hopper_assumed.reset(token)


def is_hopper() -> bool:
    """Returns whether programs are for a Hopper GPU: compute capability 9 of the default device."""
    if _hopper_assumed.get():
        return True
    return jax.default_backend() == "gpu" and jax.devices()[0].compute_capability.startswith("9.")


def describe(implementation: Implementation | None) -> str:
    """Returns one line for the start of a program: what this implementation means here."""
    if implementation == "xla" or (implementation is None and not is_hopper()):
        return f"attention: xla on {_device_kind()}"
    return f"attention: mosaic_gpu kernels on {_device_kind()}"


def _device_kind() -> str:
    return jax.devices()[0].device_kind


@functools.cache  # so once for each reason
def _log_fallback(op: str, reason: str) -> None:
    _log.warning("%s runs in XLA instead of mosaic_gpu: %s", op, reason)

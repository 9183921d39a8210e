"""Ctrl-C at a moment when nothing is lost."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def interrupts_later() -> Iterator[None]:
    """Lets a SIGINT that comes in the block take effect behind it.

    A call that takes over arrays must be able to give their successors back.
    """
    if threading.current_thread() is not threading.main_thread():  # interrupts go to the main one
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    handler = signal.signal(signal.SIGINT, lambda *signaled: came.append(signaled))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came and callable(handler):
            handler(*came[0])

"""A window of steps recorded by jax.profiler."""

from pathlib import Path
from typing import Self

import jax

from asa_jax.config import TrainingConfig

PROFILE = "profile"


class ProfileWindow:
    """Records `profile_steps` steps, from `profile_start_step` on, to profile/."""

    def __init__(self, workdir: Path, config: TrainingConfig) -> None:
        self._directory = workdir / PROFILE
        self._window = range(
            config.profile_start_step, config.profile_start_step + config.profile_steps
        )
        self._recording = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """Starts or ends the recording where `step` is the first in or after the window."""
        if step not in self._window:
            self._stop()
        elif not self._recording:
            jax.profiler.start_trace(str(self._directory))
            self._recording = True

    def _stop(self) -> None:
        if self._recording:
            jax.profiler.stop_trace()
            self._recording = False

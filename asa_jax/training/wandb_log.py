"""Metrics to Weights & Biases, where `config.training.wandb_project` names a project.

The package is an extra and is imported when it is asked for. Its own environment variables choose
the rest: WANDB_MODE=offline keeps everything in the run directory, for `wandb sync`.
"""

import importlib.util
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from asa_jax.config import Config, config_to_dict
from asa_jax.errors import ConfigError, UserError

RUN_ID = "wandb_run_id"


def check_wandb(project: str) -> None:
    """Refuses a project where the package is missing; imports nothing.

    Raises:
        ConfigError: of that.
    """
    spec = importlib.util.find_spec("wandb") if project else None
    # A folder of that name, which wandb leaves behind, is no package.
    if project and (spec is None or spec.origin is None):
        raise ConfigError(
            f"config.training.wandb_project = {project!r}: the package wandb is not installed; "
            "pip install 'asa-jax[wandb]', or leave the field empty"
        )


class WandbWriter:
    """One run of a project, the same after a restart; a context manager that ends it."""

    def __init__(self, workdir: Path, config: Config) -> None:
        """Starts the run, or goes on with the one whose id the run directory holds.

        Args:
            workdir: the run directory.
            config: the run, shown beside it.

        Raises:
            UserError: the service refuses, or is not logged in to.
        """
        import wandb

        try:
            self._run = wandb.init(
                project=config.training.wandb_project, id=_run_id(workdir / RUN_ID),
                resume="allow", name=workdir.resolve().name, dir=str(workdir),
                config=config_to_dict(config), settings=wandb.Settings(console="off"),
            )  # fmt: skip
        except wandb.Error as error:
            raise UserError(
                f"config.training.wandb_project: {error}; `wandb login`, or set "
                "WANDB_MODE=offline, or leave the field empty"
            ) from error
        # Steps that are done again after a restart are earlier than wandb's own counter.
        self._run.define_metric("*", step_metric="step")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._run.finish(exit_code=1 if error else 0)

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Logs the numbers of a step; those that are not known are left out."""
        known = {name: value for name, value in values.items() if value is not None}
        self._run.log({"step": step, **known})


def _run_id(path: Path) -> str:
    known = path.read_text() if path.exists() else ""
    if not known:
        known = uuid.uuid4().hex
        path.write_text(known)
    return known

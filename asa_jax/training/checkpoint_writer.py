"""Writing checkpoints in the background; `checkpoint.py` says what one holds."""

import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

from asa_jax.errors import CheckpointError
from asa_jax.training.checkpoint import optimizer_item
from asa_jax.training.digest import write_digest
from asa_jax.training.processes import (
    from_first_process,
    is_lost_process,
    wait_for_all,
)
from asa_jax.training.run_directory import CHECKPOINTS
from asa_jax.training.step import TrainState

# Files are compressed, but float32 of training hardly shrinks; the rest is for metadata.
FREE_SPACE_FACTOR = 1.1

_log = logging.getLogger(__name__)


class CheckpointWriter:
    """Saves steps and keeps the newest; a context manager that ends with the last save on disk."""

    def __init__(self, workdir: Path, keep: int) -> None:
        """Removes what an interrupted save left.

        Args:
            workdir: the run directory.
            keep: steps to keep, at least 2.
        """
        self._directory = (workdir / CHECKPOINTS).resolve()
        self._state_bytes = 0
        # Of a failed save orbax raises one error; its other tasks would print theirs later.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        if jax.process_index() == 0:
            _remove_empty(self._directory)
        wait_for_all("checkpoints are in order")
        self._manager = _Manager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, cleanup_tmp_directories=True, temporary_path_class=_DigestedPath
            ),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if is_lost_process(error):
            return  # a save under way would wait for it too
        try:
            self.wait()
        except CheckpointError as failure:
            if error is None:
                raise
            _log.error("%s", failure)
        finally:
            self._manager.close()

    def save(self, state: TrainState, data: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Copies the state to the host and starts writing it; a step that exists is left as it is.

        Args:
            state: the arrays to save.
            data: state of the data iterator.
            meta: of `make_meta`.

        Raises:
            CheckpointError: the disk is too full, or this or the previous save failed.
        """
        self.wait()
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self._state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        self._check_space(step)
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            optimizer=ocp.args.StandardSave(optimizer_item(state)),
            data=ocp.args.JsonSave(dict(data)),
            meta=ocp.args.JsonSave(dict(meta)),
        )
        with self._in_one_line():
            saved = self._manager.save(step, args=items, force=True)
        if not saved:
            raise CheckpointError(f"{self._directory / str(step)}: not saved, newer steps exist")

    def wait(self) -> None:
        """Returns when the last save is complete on disk; raises CheckpointError if it failed."""
        with self._in_one_line():
            self._manager.wait_until_finished()

    def _check_space(self, step: int) -> None:
        needed = int(self._state_bytes * FREE_SPACE_FACTOR)
        free = shutil.disk_usage(self._directory).free
        if not from_first_process(lambda: free >= needed):
            raise CheckpointError(
                f"{self._directory / str(step)}: needs {needed} bytes, {free} are free; older "
                "checkpoints are kept, free some space and run the same command again"
            )

    @contextmanager
    def _in_one_line(self) -> Iterator[None]:
        """Turns whatever orbax raises, often pages long, into a CheckpointError."""
        try:
            yield
        except Exception as error:
            reasons = re.findall(
                r"No space left on device|File too large|[Qq]uota exceeded", str(error)
            )
            lines = str(error).strip().splitlines() or [repr(error)]
            raise CheckpointError(
                f"{self._directory}: a checkpoint of {self._state_bytes} bytes could not be "
                f"written: {reasons[0] if reasons else lines[-1][:300]}; older ones are kept"
            ) from error


def _remove_empty(directory: Path) -> None:
    """Removes empty folders that orbax would take for saved steps."""
    for folder in directory.iterdir():
        if folder.name.isdecimal() and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


class _Manager(ocp.CheckpointManager):
    """Leaves preemption to the training loop, which counts its steps in another way."""

    def reached_preemption(self, step: int) -> bool:
        return False


class _DigestedPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """Commits a step by renaming it, its digest included."""

    async def finalize(self) -> None:
        """Runs in the writing thread, when all files of the step are on disk."""
        write_digest(Path(self.get()))
        await super().finalize()

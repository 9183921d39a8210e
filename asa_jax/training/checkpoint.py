"""Checkpoints of a run: written asynchronously with orbax, verified before they are restored.

    checkpoints/<step>/params/     parameters
    checkpoints/<step>/optimizer/  optimizer state and counters
    checkpoints/<step>/data/       JSON: where the data stream is
    checkpoints/<step>/meta/       JSON: configuration, versions, mesh, fingerprints, array table
    checkpoints/<step>/digest.json size and sha256 of every file

The digest is written before the rename that commits a step, by the thread that writes the step.
Restoring walks the steps from the newest to the oldest until one is as it was written. Of many
processes the first looks and verifies, and all restore the step that it found.
"""

import importlib.metadata
import logging
import subprocess
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, SingleDeviceSharding

from asa_jax.config import Config, config_from_dict, config_to_dict
from asa_jax.errors import CheckpointError, UserError
from asa_jax.flags import PROJECT
from asa_jax.model.transformer import abstract_model
from asa_jax.sharding import param_shardings
from asa_jax.training.digest import verify_digest
from asa_jax.training.processes import from_first_process, on_all_processes
from asa_jax.training.run_directory import (
    CHECKPOINTS,
    config_changes,
    fingerprint_changes,
    refuse_changes,
)
from asa_jax.training.step import TrainState, with_shardings

FORMAT_VERSION = 1
# No step has this number.
_NONE = -1
VERSIONED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

_log = logging.getLogger(__name__)


class Restored(NamedTuple):
    """A restored run.

    Attributes:
        state: parameters, optimizer state, counters.
        data: state of the data iterator; None where the data changed and that was allowed.
    """

    state: TrainState
    data: dict[str, Any] | None


def make_meta(
    config: Config, mesh: Mesh, state: TrainState, fingerprint: Mapping[str, Any]
) -> dict[str, Any]:
    """What a checkpoint says about itself.

    Args:
        config: the run.
        mesh: the devices it trains on.
        state: arrays or their shapes.
        fingerprint: of the data, as `asa_jax.data.pipeline.fingerprint` gives it.

    Returns:
        A dict that JSON can hold.
    """
    return {
        "format_version": FORMAT_VERSION,
        "config": config_to_dict(config),
        "data_fingerprint": dict(fingerprint),
        "arrays": {"params": _table(state.params), "optimizer": _table(optimizer_item(state))},
        "mesh": {axis: int(size) for axis, size in mesh.shape.items()},
        "versions": {name: importlib.metadata.version(name) for name in VERSIONED},
        "git_commit": _git_commit(),
    }


def optimizer_item(state: TrainState) -> dict[str, Any]:
    """The part of a state that only training needs."""
    return {name: value for name, value in state._asdict().items() if name != "params"}


def restore_state(
    workdir: Path, abstract: TrainState, meta: Mapping[str, Any], *, allow_changes: bool = False
) -> Restored | None:
    """Restores the newest usable step of a run that goes on.

    Newer steps that are not usable are renamed to <step>.damaged, out of the way of the steps to
    come.

    Args:
        workdir: the run directory.
        abstract: shapes, dtypes and shardings to restore to; the mesh may be another one.
        meta: of the run that goes on, to compare.
        allow_changes: go on although configuration or data differ.

    Returns:
        The restored state; None where the run has no checkpoints.

    Raises:
        CheckpointError: there are steps, and none is usable.
        ConfigError: the step belongs to another configuration, seed or data.
    """

    def load(folder: Path, saved: dict[str, Any]) -> Restored:
        changes = config_changes(saved["config"], meta["config"])
        data_changes = fingerprint_changes(saved["data_fingerprint"], meta["data_fingerprint"])
        if not allow_changes:
            refuse_changes(workdir, changes + data_changes)
        for change in changes + data_changes:
            _log.warning("%s, as --allow_changes permits", change)
        _check_arrays(folder, saved["arrays"], meta["arrays"])
        items = _restore(
            folder,
            params=ocp.args.StandardRestore(abstract.params),
            optimizer=ocp.args.StandardRestore(optimizer_item(abstract)),
            data=ocp.args.JsonRestore(),
        )
        state = TrainState(params=items["params"], **items["optimizer"])
        return Restored(state, None if data_changes else items["data"])

    if not from_first_process(lambda: len(_steps(workdir))):
        return None
    folder, restored = _newest_usable(workdir, None, load)
    if jax.process_index() == 0:
        for refused in _steps(workdir):
            if int(refused.name) > int(folder.name):
                refused.rename(_unused(refused.with_name(f"{refused.name}.damaged")))
    return restored


def restore_params(
    workdir: Path, mesh: Mesh | None = None, step: int | None = None
) -> tuple[Config, Any, int]:
    """Restores the parameters of a run, to evaluate it or to sample from it.

    Args:
        workdir: the run directory.
        mesh: devices to restore to; None: the first device.
        step: the step to restore; None: the newest usable one.

    Returns:
        The configuration of the run, its parameters and the step they are of.

    Raises:
        CheckpointError: there is no such step, or none is usable.
    """

    def load(folder: Path, saved: dict[str, Any]) -> tuple[Config, Any, int]:
        config = config_from_dict(saved["config"])
        _, shapes, axes = abstract_model(config.model)
        _check_arrays(folder, {"params": saved["arrays"]["params"]}, {"params": _table(shapes)})
        if mesh is None:
            device = SingleDeviceSharding(jax.devices()[0])
            shardings = jax.tree.map(lambda _: device, shapes)
        else:
            shardings = param_shardings(mesh, axes, shapes)
        target = with_shardings(shapes, shardings)
        params = _restore(folder, params=ocp.args.StandardRestore(target))["params"]
        return config, params, int(folder.name)

    if not _steps(workdir):
        raise CheckpointError(f"{workdir / CHECKPOINTS}: no checkpoints; train the run first")
    return _newest_usable(workdir, step, load)[1]


def _steps(workdir: Path) -> list[Path]:
    """Folders of the saved steps, newest first; empty ones, other names and files do not count."""
    directory = workdir / CHECKPOINTS
    folders = directory.iterdir() if directory.is_dir() else ()
    steps = [f for f in folders if f.name.isdecimal() and f.is_dir() and any(f.iterdir())]
    return sorted(steps, key=lambda folder: int(folder.name), reverse=True)


def _newest_usable[T](
    workdir: Path, step: int | None, load: Callable[[Path, dict[str, Any]], T]
) -> tuple[Path, T]:
    """Loads the newest intact step, or `step` alone; logs what it passes over."""
    directory = workdir / CHECKPOINTS
    candidates = [f for f in _steps(workdir) if step is None or int(f.name) == step]
    reasons: list[str] = []
    while (found := from_first_process(lambda: _next_intact(candidates, reasons))) != _NONE:
        folder = directory / str(found)
        loaded, reason = _try_to_load(folder, load)
        if on_all_processes(reason is None):
            return folder, typing.cast(T, loaded)
        _pass_over(folder, reason or "another process cannot read it", reasons)
    if step is not None and not reasons:
        there = ", ".join(folder.name for folder in _steps(workdir))
        raise CheckpointError(f"{directory}: no step {step}; there are {there}")
    if not reasons:
        raise CheckpointError(f"{directory}: no checkpoint is usable, process 0 says why")
    raise CheckpointError(
        f"{directory}: none of {len(reasons)} checkpoints is usable ({reasons[0]}); put back a "
        "copy, or delete the folder to start from step 0"
    )


def _next_intact(candidates: list[Path], reasons: list[str]) -> int:
    """Takes candidates up to the first that is as it was written; its step, or _NONE."""
    while candidates:
        folder = candidates.pop(0)
        reason = verify_digest(folder)
        if reason is None:
            return int(folder.name)
        _pass_over(folder, reason, reasons)
    return _NONE


def _try_to_load[T](
    folder: Path, load: Callable[[Path, dict[str, Any]], T]
) -> tuple[T | None, str | None]:
    """What `load` gives, or why it gives nothing; a step of something else stays an error."""
    try:
        return load(folder, _read_meta(folder)), None
    except UserError:
        raise
    except Exception as error:
        return None, (str(error).strip() or repr(error)).splitlines()[0][:200]


def _pass_over(folder: Path, reason: str, reasons: list[str]) -> None:
    _log.warning("%s: passed over: %s", folder, reason)
    reasons.append(f"{folder.name}: {reason}")


def _read_meta(folder: Path) -> dict[str, Any]:
    meta = _restore(folder, meta=ocp.args.JsonRestore())["meta"]
    if meta["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder}: has format {meta['format_version']}, this program reads {FORMAT_VERSION}"
        )
    return meta


def _restore(folder: Path, **items: ocp.args.CheckpointArgs) -> ocp.args.Composite:
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(folder.resolve(), args=ocp.args.Composite(**items))


def _table(tree: Any) -> dict[str, str]:
    """Dtype and shape of every array, by path: orbax would cast another dtype silently."""
    return {
        jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _check_arrays(
    folder: Path, saved: Mapping[str, Mapping[str, str]], expected: Mapping[str, Mapping[str, str]]
) -> None:
    for item, table in expected.items():
        for name in sorted(table.keys() | saved[item].keys()):
            here, there = table.get(name, "absent"), saved[item].get(name, "absent")
            if here != there:
                raise CheckpointError(
                    f"{folder}: {item}{name} is {there} there and {here} in this run's model"
                )


def _unused(path: Path) -> Path:
    names = (path.with_name(f"{path.name}{'.' * (i > 0)}{i or ''}") for i in range(1000))
    return next(name for name in names if not name.exists())


def _git_commit() -> str | None:
    command = ["git", "-C", str(PROJECT), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()

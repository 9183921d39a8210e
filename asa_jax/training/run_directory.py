"""A run before any array exists: its sources, its directory, whether it may go on with a config.

    config.json      the configuration of the last start
    data.json        the fingerprint of its data
    run.json         when its first process began, and what the last one ran on
    train.lock       held by the trainer at work
    checkpoints/     one folder a step
    metrics.jsonl    one line a step; also tensorboard/ and loss.png (docs/metrics.md)
    wandb_run_id     of Weights & Biases, where it is asked for; also wandb/
    tokenizer.json, tokenizer_config.json
                     copy of the tokenizer of the sources, unless it is 'bytes', and which of its
                     tokens ends a document

Of many processes only the first writes here, but for the arrays of checkpoints.

Imports no jax, so that a second trainer or a changed field is refused at once.
"""

import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from absl import flags

from asa_jax.config import Config, config_to_dict
from asa_jax.data.fingerprint import fingerprint
from asa_jax.data.shards import TOKENIZER, TokenFolder, open_token_folder
from asa_jax.data.tokenizer import BYTES, check_vocabulary
from asa_jax.errors import CheckpointError, ConfigError
from asa_jax.flags import parse_run_flags
from asa_jax.launch import Launch, define_launch_flags, read_launch
from asa_jax.trained_run import END_OF_DOCUMENT, TOKENIZER_CONFIG
from asa_jax.training.wandb_log import check_wandb

CONFIG = "config.json"
DATA = "data.json"
RUN = "run.json"
CHECKPOINTS = "checkpoints"
LOCK = "train.lock"

# What may change when a run goes on: nothing here alters what the next step computes from a batch,
# except `steps`, by which a run is made longer and its schedule follows. Sources may move: the
# checkpoint holds a fingerprint of their content.
CHANGEABLE_SECTIONS = ("mesh", "evaluation")
CHANGEABLE_FIELDS = (
    "data.sources", "model.remat", "model.attention_implementation", "optimizer.device_tokens",
    "training.steps",
    "training.log_every_steps", "training.eval_every_steps", "training.eval_batches",
    "training.checkpoint_every_steps", "training.keep_checkpoints",
    "training.max_skipped_steps", "training.loss_chunk_tokens", "training.wandb_project",
    "training.profile_start_step", "training.profile_steps",
)  # fmt: skip


class Run(NamedTuple):
    """What a trainer knows before it touches a device.

    Attributes:
        config: the configuration.
        workdir: its run directory.
        sources: opened token folders, of one tokenizer.
        allow_changes: go on although configuration or data differ from those of the run.
        launch: which of how many processes this is.
        lock: keeps other trainers out until it is closed; None on all processes but the first.
    """

    config: Config
    workdir: Path
    sources: list[TokenFolder]
    allow_changes: bool
    launch: Launch
    lock: TextIO | None


def start_run() -> Run:
    """Parses the trainer's command line, opens the sources and claims the run directory.

    Raises:
        UserError: of any of these.
    """
    allow = flags.DEFINE_bool(
        "allow_changes", False, "go on with a run although its configuration or data changed"
    )
    define_launch_flags()
    config, workdir = parse_run_flags()
    launch = read_launch()
    if launch.process_id == 0:
        check_wandb(config.training.wandb_project)
    sources = open_sources(config)
    data = run_fingerprint(config, sources)
    if config.init_from and not _has_begun(workdir):
        check_init_from(config.init_from, sources[0])
    lock = None
    if launch.process_id == 0:
        lock = open_run(workdir, config, allow_changes=allow.value)
        claim_data(workdir, data, allow_changes=allow.value)
        copy_tokenizer(sources[0], workdir)
    elif not allow.value:
        # Process 0 refuses the same; so no process waits for one that is gone.
        _refuse_other_config(workdir, config)
        _refuse_other_data(workdir, data)
    return Run(config, workdir, sources, allow.value, launch, lock)


def open_sources(config: Config) -> list[TokenFolder]:
    """Opens the token folders of a configuration.

    Raises:
        DataError: one is missing or damaged.
        ConfigError: their tokenizers differ or exceed the model's vocabulary.
    """
    folders = [open_token_folder(source) for source in config.data.sources]
    for folder in folders:
        check_vocabulary(folder.vocab_size, config.model.vocab_size, str(folder.path))
        if folder.tokenizer_fingerprint != folders[0].tokenizer_fingerprint:
            raise ConfigError(
                f"config.data.sources: {folder.path} and {folders[0].path} were made with "
                "different tokenizers; prepare one of them again"
            )
    return folders


def open_run(workdir: Path, config: Config, *, allow_changes: bool) -> TextIO:
    """Makes the run directory if need be, locks it and writes its config.json.

    Args:
        workdir: the run directory.
        config: the configuration to train with.
        allow_changes: go on although fields differ from those the run was started with.

    Returns:
        The open lock: held until it is closed or the process ends, however it ends.

    Raises:
        CheckpointError: another trainer works there.
        ConfigError: the run has checkpoints of a configuration that differs, or of later steps.
    """
    (workdir / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    lock = _lock(workdir / LOCK)
    if not allow_changes:
        _refuse_other_config(workdir, config)
    _refuse_fewer_steps(workdir, config.training.steps)
    _write_json(workdir / CONFIG, config_to_dict(config))
    note_run(workdir, **{"began": time.time(), **run_notes(workdir)})
    return lock


def run_notes(workdir: Path) -> dict[str, Any]:
    """What run.json says: `began`, seconds since 1970, and once it trains `device` and `jax`."""
    return _read_json(workdir / RUN) or {}


def note_run(workdir: Path, **notes: Any) -> None:
    """Adds to run.json."""
    _write_json(workdir / RUN, run_notes(workdir) | notes)


def forget_run(workdir: Path) -> None:
    """Removes what starting wrote, unless anything else has come to lie there since."""
    files = (CONFIG, DATA, RUN, TOKENIZER, TOKENIZER_CONFIG, LOCK)
    if {path.name for path in workdir.iterdir()} - {*files, CHECKPOINTS} or _has_begun(workdir):
        return
    for name in files:
        (workdir / name).unlink(missing_ok=True)
    (workdir / CHECKPOINTS).rmdir()
    workdir.rmdir()


def _refuse_other_config(workdir: Path, config: Config) -> None:
    before = _read_json(workdir / CONFIG)
    if before and _has_begun(workdir):
        refuse_changes(workdir, config_changes(before, config_to_dict(config)))


def _refuse_fewer_steps(workdir: Path, steps: int) -> None:
    saved = [int(f.name) for f in (workdir / CHECKPOINTS).iterdir() if f.name.isdecimal()]
    if saved and steps < max(saved):
        raise ConfigError(
            f"config.training.steps = {steps}: {workdir} has a checkpoint of step {max(saved)}; "
            "give as many steps at least, or another --workdir"
        )


def _has_begun(workdir: Path) -> bool:
    folder = workdir / CHECKPOINTS
    return folder.is_dir() and any(folder.iterdir())


def run_fingerprint(config: Config, sources: Sequence[TokenFolder]) -> dict[str, Any]:
    """The fingerprint of the batches that a run trains on."""
    return fingerprint(
        sources,
        weights=config.data.weights,
        sequence_length=config.data.sequence_length,
        batch_size=config.data.batch_size,
        alignment=config.model.alignment,
        seed=config.data.seed,
    )


def claim_data(workdir: Path, now: Mapping[str, Any], *, allow_changes: bool) -> None:
    """Refuses other data than the run was started with; writes data.json.

    The checkpoint holds the fingerprint too and decides; this tells before jax is imported.

    Args:
        workdir: the run directory.
        now: of `run_fingerprint`.
        allow_changes: go on with other data.

    Raises:
        ConfigError: the run has checkpoints of other data.
    """
    if not allow_changes:
        _refuse_other_data(workdir, now)
    _write_json(workdir / DATA, now)


def _refuse_other_data(workdir: Path, now: Mapping[str, Any]) -> None:
    before = _read_json(workdir / DATA)
    if before and _has_begun(workdir):
        refuse_changes(workdir, fingerprint_changes(before, now))


def check_init_from(init_from: str, source: TokenFolder) -> None:
    """Refuses to start from parameters of a model that reads other tokens.

    Args:
        init_from: a run directory or a model folder.
        source: a token folder of the new run.

    Raises:
        ConfigError: there is no model, or it has another tokenizer.
    """
    folder = Path(init_from).expanduser()
    if not (folder / CONFIG).is_file():
        raise ConfigError(
            f"config.init_from = {init_from!r}: has no {CONFIG}; give a run directory or a model "
            "folder"
        )
    tokenizer = folder / TOKENIZER
    found = hashlib.sha256(tokenizer.read_bytes()).hexdigest() if tokenizer.exists() else BYTES
    if found != source.tokenizer_fingerprint:
        raise ConfigError(
            f"config.init_from = {init_from!r}: its tokenizer is not that of {source.path}; "
            f"prepare the data with {tokenizer}"
        )


def copy_tokenizer(source: TokenFolder, workdir: Path) -> None:
    """Copies the tokenizer of a token folder to a run directory, with its end of document."""
    if source.tokenizer_fingerprint == BYTES:
        return
    _write(workdir / TOKENIZER, (source.path / TOKENIZER).read_bytes())
    _write_json(workdir / TOKENIZER_CONFIG, {END_OF_DOCUMENT: source.end_of_document})


def fingerprint_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Compares fingerprints of data; returns a line for each difference."""
    return [
        f"config.data: {name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def config_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Compares nested configurations; returns a line for each field that may not change but did."""
    old, new = _fields(before), _fields(now)
    return [
        f"config.{name}: was {old.get(name)!r}, is {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
        and name not in CHANGEABLE_FIELDS
        and name.partition(".")[0] not in CHANGEABLE_SECTIONS
    ]


def refuse_changes(workdir: Path, changes: list[str]) -> None:
    """Raises a ConfigError that names the first of `changes`, if there are any."""
    if changes:
        more = f" (and {len(changes) - 1} more)" if len(changes) > 1 else ""
        raise ConfigError(
            f"{changes[0]}{more}, so the run in {workdir} cannot go on; set it back, take another "
            "--workdir, or go on regardless with --allow_changes"
        )


def _lock(path: Path) -> TextIO:
    # The kernel gives the lock up with its process, so a dead trainer never holds one.
    lock = path.open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        raise CheckpointError(f"{path}: a trainer works here already ({holder})") from None
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be locked ({error.strerror}); the file system must offer flock"
        ) from None
    lock.truncate(0)
    lock.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    return lock


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    _write(path, f"{json.dumps(values, indent=2)}\n".encode())


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:  # which names no file where the disk is full
        raise CheckpointError(f"{path}: cannot be written ({error.strerror})") from None


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return None  # the checkpoint decides
    return values if isinstance(values, dict) else None


def _fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Flattens sections to section.field; JSON makes lists of tuples, so both become lists."""
    flat: dict[str, Any] = {}
    for section, fields in config.items():
        if isinstance(fields, Mapping):
            flat |= {f"{section}.{name}": value for name, value in fields.items()}
        else:
            flat[section] = fields
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()
    }

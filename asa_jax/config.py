"""Run configuration: frozen dataclasses, checked when they are made.

`configs/*.py` hold `ml_collections.ConfigDict`s that the command line can override.
`config_from_dict` converts one to a `Config` once; nothing behind it sees a ConfigDict. Every error
is one line that names the field, its value and what is allowed.
"""

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any

from asa_jax.config_checks import require, require_choice, require_positive, require_range
from asa_jax.config_evaluation import EvaluationConfig
from asa_jax.config_model import ModelConfig
from asa_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Token folders made by `python -m asa_jax.data.prepare`, and how they become batches."""

    sources: tuple[str, ...]
    weights: tuple[float, ...]
    sequence_length: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        require(bool(self.sources), "data.sources", self.sources, "at least one token folder")
        require(
            len(self.weights) == len(self.sources), "data.weights", self.weights,
            f"one weight for each of the {len(self.sources)} data.sources",
        )  # fmt: skip
        require(all(w > 0 for w in self.weights), "data.weights", self.weights, "positive")
        require_positive("data", self, "sequence_length", "batch_size")
        require_range("data", self, 0, "seed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer and learning-rate schedule; steps are optimizer steps."""

    name: str
    learning_rate: float
    adam_learning_rate: float
    final_learning_rate_ratio: float
    schedule: str
    warmup_steps: int
    decay_fraction: float
    b1: float
    b2: float
    epsilon: float
    weight_decay: float
    clip_norm: float
    # parts of a batch, one after another; 0: so that a device has device_tokens at most, or a row
    accumulation_steps: int
    device_tokens: int

    def __post_init__(self) -> None:
        require_choice("optimizer", "name", self.name, ("adamw", "muon"))
        require_choice("optimizer", "schedule", self.schedule, ("cosine", "wsd", "constant"))
        require_positive(
            "optimizer", self, "learning_rate", "adam_learning_rate", "epsilon", "clip_norm",
            "device_tokens",
        )  # fmt: skip
        require_range("optimizer", self, 0, "warmup_steps", "weight_decay", "accumulation_steps")
        for name in ("final_learning_rate_ratio", "decay_fraction"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"optimizer.{name}", value, "between 0 and 1")
        for name in ("b1", "b2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name}", value, "at least 0 and below 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Length of a run and what it does on the way; 0 switches a periodic action off."""

    steps: int
    seed: int
    log_every_steps: int
    eval_every_steps: int
    eval_batches: int
    checkpoint_every_steps: int
    keep_checkpoints: int
    # a step is skipped where its gradient norm exceeds this many times its running average; 0: off
    spike_factor: float
    max_skipped_steps: int
    loss_chunk_tokens: int
    # of Weights & Biases; '': none
    wandb_project: str
    profile_start_step: int
    profile_steps: int

    def __post_init__(self) -> None:
        require_positive(
            "training", self, "steps", "log_every_steps", "eval_batches", "max_skipped_steps",
            "loss_chunk_tokens", "checkpoint_every_steps",
        )  # fmt: skip
        # One step is always complete while another is being written or deleted.
        require_range("training", self, 2, "keep_checkpoints")
        require_range(
            "training", self, 0, "seed", "eval_every_steps", "profile_start_step", "profile_steps",
        )  # fmt: skip
        require(
            self.spike_factor == 0 or self.spike_factor > 1,
            "training.spike_factor", self.spike_factor, "above 1, or 0 to take every step",
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; -1 on one axis takes what the others leave."""

    data: int
    fsdp: int
    tensor: int
    context: int

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            require(size > 0 or size == -1, f"mesh.{name}", size, "positive, or -1 for the rest")
        rest = [name for name, size in sizes.items() if size == -1]
        require(len(rest) <= 1, "mesh", sizes, "at most one -1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run; fields that depend on one another are checked here."""

    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    mesh: MeshConfig
    evaluation: EvaluationConfig
    # what step 0 starts from, a run or model folder; '': random parameters
    init_from: str

    def __post_init__(self) -> None:
        length, alignment = self.data.sequence_length, self.model.alignment
        require(
            length % alignment == 0, "data.sequence_length", length,
            f"a multiple of model.selection_block_size = {alignment}",
        )  # fmt: skip
        rows, parts = self.data.batch_size, self.optimizer.accumulation_steps
        require(
            parts == 0 or rows % parts == 0, "data.batch_size", rows,
            f"a multiple of optimizer.accumulation_steps = {parts}",
        )  # fmt: skip
        steps, warmup = self.training.steps, self.optimizer.warmup_steps
        require(
            warmup <= steps, "optimizer.warmup_steps", warmup,
            f"at most training.steps = {steps}",
        )  # fmt: skip

    def batch_parts(self, mesh: Mapping[str, int]) -> int:
        """In how many parts, one after another, a batch is divided on a mesh of these sizes."""
        if self.optimizer.accumulation_steps:
            return self.optimizer.accumulation_steps
        rows = max(1, self.data.batch_size // (mesh["data"] * mesh["fsdp"]))
        row_tokens = self.data.sequence_length // mesh["context"]
        fitting = max(1, self.optimizer.device_tokens // row_tokens)
        return next(
            parts for parts in range(1, rows + 1) if rows <= fitting * parts and rows % parts == 0
        )


def config_from_dict(values: Mapping[str, Any]) -> Config:
    """Makes a checked `Config` from nested mappings, as a ConfigDict or a run's config.json holds.

    Args:
        values: every field of every section, and nothing else.

    Returns:
        The frozen configuration.

    Raises:
        ConfigError: a field is missing, unknown, ill-typed, not finite or out of range.
    """
    return _build(Config, values, "config")


def config_to_dict(config: Config) -> dict[str, Any]:
    """Returns `config` as nested plain values that JSON can hold and `config_from_dict` takes."""
    return dataclasses.asdict(config)


def _build(cls: type, values: Any, path: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path} = {values!r}: must be a section with fields")
    hints = typing.get_type_hints(cls)
    unknown, missing = sorted(set(values) - set(hints)), sorted(set(hints) - set(values))
    if unknown:
        raise ConfigError(
            f"{path}.{unknown[0]}: unknown field; known are {', '.join(sorted(hints))}"
        )
    if missing:
        raise ConfigError(f"{path}.{missing[0]}: missing")
    return cls(
        **{name: _convert(values[name], hint, f"{path}.{name}") for name, hint in hints.items()}
    )


def _convert(value: Any, hint: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, path)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, tuple | list):
            raise ConfigError(f"{path} = {value!r}: must be a tuple")
        element = typing.get_args(hint)[0]
        return tuple(_convert(item, element, f"{path}[{i}]") for i, item in enumerate(value))
    if hint is float and type(value) is int:
        value = float(value) if abs(value) < 2**1023 else math.inf
    if type(value) is not hint:
        raise ConfigError(f"{path} = {value!r}: must be of type {hint.__name__}")
    if hint is float and not math.isfinite(value):
        raise ConfigError(f"{path} = {value!r}: must be finite")
    if hint is int and abs(value) >= 2**31:
        raise ConfigError(f"{path} = {value!r}: must be an int of 32 bits")
    return value

"""Small runs for the training tests."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asa_jax.config import Config, config_from_dict
from asa_jax.data.prepare import parse, prepare
from asa_jax.flags import PROJECT
from configs import base
from tests.training.commands import STEPS

MakeConfig = Callable[..., Config]

# One layer of each kind is a few thousand parameters and a second to compile.
SMALL: dict[str, Any] = {
    "model.vocab_size": 320,
    "model.hidden_size": 16,
    "model.mlp_size": 32,
    "model.layer_kinds": ("sliding", "sliding"),
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.head_dim": 8,
    "model.window_size": 16,
    "model.kv_lora_rank": 16,
    "model.qk_nope_head_dim": 8,
    "model.qk_rope_head_dim": 4,
    "model.v_head_dim": 8,
    "model.group_kv_lora_rank": 8,
    "model.compression_block_size": 8,
    "model.compression_stride": 8,
    "model.selection_block_size": 8,
    "model.num_selected_blocks": 3,
    "model.compute_dtype": "float32",
    "model.remat": "none",
    "data.sequence_length": 64,
    "data.batch_size": 8,
    "optimizer.learning_rate": 1e-2,
    "optimizer.warmup_steps": 2,
    "training.steps": 20,
    "training.log_every_steps": 5,
    "training.eval_every_steps": 0,
    "training.eval_batches": 1,
    "training.checkpoint_every_steps": 10,
    "training.loss_chunk_tokens": 128,
}


@pytest.fixture(scope="session")
def make_config() -> MakeConfig:
    """Returns make_config(**{'section.field': value}) for small runs."""

    def make(**overrides: Any) -> Config:
        values = base.get_config()
        values.update_from_flattened_dict({**SMALL, **overrides})
        return config_from_dict(values.to_dict())

    return make


@pytest.fixture(scope="session")
def small_flags() -> list[str]:
    """The same as flags of train.py, on top of configs/base.py."""
    return [f"--config.{name}={value}" for name, value in SMALL.items()]


@pytest.fixture(scope="session")
def byte_lengths() -> np.ndarray:
    """Every token stands for one byte."""
    return np.ones(320, np.int32)


@pytest.fixture(scope="session")
def token_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token folder of bytes with a few documents of different lengths."""
    folder = tmp_path_factory.mktemp("text")
    words = np.random.default_rng(0).choice(["a", "rose", "is", "not", "snow"], 20000)
    for i, part in enumerate(np.split(words, [300, 350, 9000, 18000])):
        (folder / f"{i}.txt").write_text(" ".join(part))
    train = [str(folder / f"{i}.txt") for i in range(4)]
    arguments = ["--input", *train, "--validation-input", str(folder / "4.txt")]
    prepare(parse([*arguments, "--tokenizer", "bytes", "--output", str(folder / "tokens")]))
    return folder / "tokens"


@pytest.fixture(scope="session")
def command(small_flags: list[str], token_folder: Path) -> list[str]:
    """Arguments of a run of 60 steps, but for its directory."""
    return [
        sys.executable, "train.py", "--config=configs/base.py", *small_flags,
        f"--config.data.sources={token_folder}", f"--config.training.steps={STEPS}",
        "--config.training.checkpoint_every_steps=20", "--config.training.eval_every_steps=40",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Compiles quickly, and once for all runs."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


Train = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def train(command: list[str], environment: dict[str, str]) -> Train:
    """Returns train(workdir, *more flags), which runs to the end."""

    def run(workdir: Path, *more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, f"--workdir={workdir}", *more],
            cwd=PROJECT, env=environment, capture_output=True, text=True,
        )  # fmt: skip

    return run


@pytest.fixture
def start(command: list[str], environment: dict[str, str]) -> Iterator[Callable[..., Any]]:
    """Returns start(workdir, *more flags), which runs in the background; killed after the test."""
    running = []

    def run(
        workdir: Path, *more: str, output: str = "output", **variables: str
    ) -> subprocess.Popen[bytes]:
        with (workdir.parent / output).open("w") as file:
            process = subprocess.Popen(
                [*command, f"--workdir={workdir}", *more],
                cwd=PROJECT, env=environment | variables, stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip
        running.append(process)
        return process

    yield run
    for process in running:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def finished(
    train: Train, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The directory and the output of a run without interruption."""
    workdir = tmp_path_factory.mktemp("runs") / "straight"
    done = train(workdir)
    assert done.returncode == 0, done.stderr
    return workdir, done

"""train.py where machines fail: kills, full and read-only disks.

docs/reliability.md lists every case of failure with its test; those of single parts are beside
those parts.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from asa_jax.config import config_to_dict
from asa_jax.data.shards import open_token_folder
from asa_jax.flags import PROJECT
from asa_jax.sharding import make_mesh
from asa_jax.training.checkpoint import restore_params
from asa_jax.training.feed import Feed
from asa_jax.training.step import make_trainer
from tests.training.commands import final_params, losses, wait_for

TEMPORARY = "*.orbax-checkpoint-tmp"


def _saved(workdir: Path) -> list[int]:
    return sorted(int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdecimal())


def _begun(workdir: Path) -> int:
    """The newest step whose save was begun."""
    names = [p.name.split(".")[0] for p in (workdir / "checkpoints").glob(TEMPORARY)]
    return max([*map(int, names), *_saved(workdir)], default=0)


@pytest.mark.slow
def test_ten_kills_during_saves_change_nothing(finished, start, train, tmp_path):
    """Each restart goes on from the save before the one that was cut off."""
    workdir, rng, cut_off = tmp_path / "run", random.Random(0), 0
    every = "--config.training.checkpoint_every_steps=1"
    for _ in range(10):
        before = _begun(workdir)
        process = start(workdir, every)
        wait_for(lambda before=before: _begun(workdir) > before)
        # A save takes some hundredths of a second, and the next begins when it is done.
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(rng.random() / 10)
        process.kill()
        process.wait()
        cut_off += any((workdir / "checkpoints").glob(TEMPORARY))
        assert _saved(workdir) == [] or _saved(workdir)[-1] >= _begun(workdir) - 1
    print(f"{cut_off} of 10 kills cut a save off")
    newest = _begun(workdir)
    done = train(workdir, every)
    assert done.returncode == 0, done.stderr
    resumed = int(re.search(r"(?:resumes after|starts at) step (\d+)", done.stdout)[1])
    assert newest - 1 <= resumed <= newest
    steps = [x for x in losses(workdir) if x[1] is not None]
    assert steps == [x for x in losses(finished[0]) if x[1] is not None]
    chex.assert_trees_all_equal(final_params(workdir), final_params(finished[0]))


def test_a_disk_that_is_full_at_the_last_save(command, environment, train, tmp_path):
    """A limit on file sizes in its place; the steps before stay, and no half step is listed."""
    workdir = tmp_path / "run"
    # Arrays of 80 kB are over the limit however a checkpoint is split into files; no other file is.
    flags = [
        "--config.model.mlp_size=1280", "--config.training.steps=3",
        "--config.training.checkpoint_every_steps=1", "--config.training.eval_every_steps=0",
    ]  # fmt: skip
    assert train(workdir, *flags).returncode == 0
    _, before, _ = restore_params(workdir, step=2)
    shutil.rmtree(workdir / "checkpoints" / "3")
    limited = ["bash", "-c", 'ulimit -f 60; exec "$@"', "-", *command, f"--workdir={workdir}"]
    done = subprocess.run(
        [*limited, *flags], cwd=PROJECT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.startswith("resumes after step 2 of 3")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert re.search(rf"{workdir}/checkpoints: a checkpoint of \d+ bytes could not be wri", line)
    assert _saved(workdir) == [1, 2]
    chex.assert_trees_all_equal(restore_params(workdir)[1], before)


# Permissions hold for root too after PR_CAPBSET_DROP of CAP_DAC_OVERRIDE and the exec.
WITHOUT_OVERRIDE = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.parametrize("begun", [False, True])
def test_a_directory_that_cannot_be_written(command, environment, finished, tmp_path, begun):
    workdir = tmp_path / "run"
    if begun:
        shutil.copytree(finished[0], workdir)
    folder = workdir if begun else tmp_path
    folder.chmod(0o555)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_OVERRIDE, *command, f"--workdir={workdir}"],
        cwd=PROJECT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    folder.chmod(0o755)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {workdir}") and "Permission denied" in line


def test_an_impossible_mesh_is_one_line(train, tmp_path):
    done = train(tmp_path / "run", "--config.mesh.tensor=3")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: config.mesh: data=-1 x fsdp=1 x tensor=3 x context=1 needs")


@pytest.mark.usefixtures("fast_compilation")
def test_a_step_with_shuffled_labels_is_skipped(make_config, token_folder):
    """By the policy where its factor is 2; the numbers are in the metrics whatever it is."""
    spike, steps = 25, 30
    config = make_config(**{"training.spike_factor": 2.0, "training.steps": steps})
    sources, mesh = [open_token_folder(token_folder)], make_mesh(config.mesh)
    with jax.set_mesh(mesh), Feed(config, sources, mesh) as feed:
        trainer = make_trainer(config, mesh, sources[0].tokenizer().byte_lengths())
        state = trainer.init()
        for step in range(1, steps + 1):
            batch, _ = feed.next()
            if step == spike:
                before = jax.tree.map(np.asarray, (state.params, state.opt_state))
                targets = np.random.default_rng(0).permutation(np.ravel(batch["targets"]))
                batch["targets"] = jax.numpy.reshape(targets, batch["inputs"].shape)
            state, metrics = trainer.step(state, batch, trainer.schedule)
            if step == spike:
                chex.assert_trees_all_equal((state.params, state.opt_state), before)
                assert metrics["grad_norm"] > 2 * metrics["grad_norm_average"]
            assert metrics["skipped_steps"] == (step >= spike)


def _resumed_equals_straight(config, folder, environment):
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.resumed_run", str(folder)],
        input=json.dumps(config_to_dict(config)), cwd=PROJECT, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result.pop("platform") in ("cpu", "gpu")
    assert result == {"steps": [20, 20], "losses_equal": True, "params_equal": True}


FIELDS = {
    "model.layer_kinds": ("local", "global"),
    # A schedule that does not depend on the number of steps, which is 10 at first.
    "optimizer.schedule": "constant",
}


def test_ten_and_ten_steps_are_twenty(make_config, token_folder, environment, tmp_path):
    config = make_config(**FIELDS, **{"data.sources": (str(token_folder),)})
    _resumed_equals_straight(config, tmp_path, environment)


@pytest.mark.gpu
def test_ten_and_ten_steps_are_twenty_on_a_gpu(make_config, token_folder, tmp_path):
    """With the kernels, in bfloat16, under XLA's flag for deterministic operations."""
    if jax.default_backend() != "gpu":
        pytest.skip("needs a GPU")
    sizes = {
        "model.hidden_size": 512, "model.num_heads": 8, "model.num_kv_heads": 2,
        "model.head_dim": 64, "model.window_size": 256, "model.kv_lora_rank": 128,
        "model.qk_nope_head_dim": 64, "model.qk_rope_head_dim": 32, "model.v_head_dim": 64,
        "model.num_latent_groups": 2, "model.group_kv_lora_rank": 128,
        "model.compression_block_size": 16, "model.compression_stride": 16,
        "model.selection_block_size": 16, "model.num_selected_blocks": 16,
        "model.compute_dtype": "bfloat16", "data.sequence_length": 1024, "data.batch_size": 4,
    }  # fmt: skip
    config = make_config(**FIELDS, **sizes, **{"data.sources": (str(token_folder),)})
    # Without autotuning, as what is deterministic does not choose by time.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true"
    environment = os.environ | {
        "XLA_FLAGS": f"{flags} --xla_gpu_autotune_level=0",
        # The process of the tests holds memory of the device too.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    _resumed_equals_straight(config, tmp_path, environment)

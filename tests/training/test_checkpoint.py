"""Saving, verifying and restoring; every file damaged in turn."""

import json
import logging
import os
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from asa_jax.config import MeshConfig
from asa_jax.errors import CheckpointError, ConfigError
from asa_jax.model.transformer import abstract_model
from asa_jax.sharding import make_mesh
from asa_jax.training import checkpoint_writer
from asa_jax.training.checkpoint import make_meta, restore_params, restore_state
from asa_jax.training.checkpoint_writer import CheckpointWriter
from asa_jax.training.digest import DIGEST
from asa_jax.training.step import TrainState

FINGERPRINT = {"seed": 0, "sources": ["abc"]}
STEPS = (1, 2)


def _state(step: int) -> TrainState:
    """A state as training has them: nested with int keys, named tuples, scalars."""
    params = {
        "layers": {0: {"w": jnp.full((4, 3), step, jnp.float32)}},
        "b": jnp.arange(5.0) + step,
    }
    moments = optax.adam(1e-3).init(params)
    zero = jnp.int32(0)
    return TrainState(params, moments, jnp.int32(step), zero, zero, jnp.float32(step))


def _abstract(state: TrainState) -> TrainState:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=-1, fsdp=1, tensor=1, context=1))


@pytest.fixture(scope="module")
def meta(make_config, mesh):
    return make_meta(make_config(), mesh, _state(0), FINGERPRINT)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory, meta) -> Path:
    """A run directory with two steps."""
    workdir = tmp_path_factory.mktemp("run")
    (workdir / "checkpoints").mkdir()
    with CheckpointWriter(workdir, keep=3) as writer:
        for step in STEPS:
            writer.save(_state(step), {"next_index": 10 * step}, meta)
    return workdir


@pytest.fixture
def workdir(pristine, tmp_path) -> Path:
    shutil.copytree(pristine, tmp_path / "run")
    return tmp_path / "run"


def _restore(workdir: Path, meta, **options):
    return restore_state(workdir, _abstract(_state(0)), meta, **options)


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "flip": _flip,
    "truncate": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "zero": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "empty": lambda file: file.write_bytes(b""),
    "remove": Path.unlink,
}


def test_restores_the_newest_step(workdir, meta):
    restored = _restore(workdir, meta)
    chex.assert_trees_all_equal(restored.state, _state(2))
    assert restored.data == {"next_index": 20}


def test_the_newest_step_has_the_highest_number_whatever_the_clock_says(workdir, meta):
    for path in (workdir / "checkpoints" / "2").rglob("*"):
        os.utime(path, (0, 0))
    os.utime(workdir / "checkpoints" / "2", (0, 0))
    assert int(_restore(workdir, meta).state.step) == 2


def test_a_new_run_has_nothing_to_restore(tmp_path, meta):
    assert _restore(tmp_path, meta) is None


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_never_gives_other_numbers(pristine, tmp_path, meta, damage):
    """Each file of the newest step in turn: that step as it was, or the one before."""
    newest = pristine / "checkpoints" / "2"
    files = [file.relative_to(pristine) for file in newest.rglob("*") if file.is_file()]
    assert len(files) > 10
    for i, name in enumerate(files):
        workdir = tmp_path / str(i)
        shutil.copytree(pristine, workdir)
        DAMAGE[damage](workdir / name)
        state = _restore(workdir, meta).state
        chex.assert_trees_all_equal(state, _state(int(state.step)))
        is_array_data = "ocdbt" in name.name or "d" in name.parts
        if is_array_data:
            assert int(state.step) == 1, name


def test_falls_back_with_a_reason_and_goes_on_from_there(workdir, meta, caplog):
    _flip(workdir / "checkpoints" / "2" / "params" / "manifest.ocdbt")
    with caplog.at_level(logging.WARNING):
        restored = _restore(workdir, meta)
    assert "params/manifest.ocdbt is not as it was written" in caplog.text
    chex.assert_trees_all_equal(restored.state, _state(1))
    # The damaged step is out of the way of a new step 2.
    with CheckpointWriter(workdir, keep=3) as writer:
        writer.save(_state(2), {"next_index": 20}, meta)
    chex.assert_trees_all_equal(_restore(workdir, meta).state, _state(2))
    assert (workdir / "checkpoints" / "2.damaged").is_dir()


def test_never_starts_anew_where_all_steps_are_damaged(workdir, meta):
    for step in STEPS:
        (workdir / "checkpoints" / str(step) / DIGEST).unlink()
    with pytest.raises(CheckpointError, match=r"none of 2 checkpoints is usable \(2: digest.json"):
        _restore(workdir, meta)


def test_a_link_out_of_the_step_is_not_followed(workdir, meta):
    file = workdir / "checkpoints" / "2" / "params" / "manifest.ocdbt"
    file.rename(workdir / "elsewhere")
    file.symlink_to(workdir / "elsewhere")
    assert int(_restore(workdir, meta).state.step) == 1


def test_ignores_what_is_no_step(workdir, meta):
    checkpoints = workdir / "checkpoints"
    (checkpoints / "7").mkdir()
    (checkpoints / "notes.txt").write_text("stray")
    shutil.copytree(checkpoints / "2", checkpoints / "3.orbax-checkpoint-tmp")
    assert int(_restore(workdir, meta).state.step) == 2
    with CheckpointWriter(workdir, keep=3) as writer:
        writer.save(_state(3), {}, meta)
    assert int(_restore(workdir, meta).state.step) == 3
    assert not (checkpoints / "3.orbax-checkpoint-tmp").exists()


def test_keeps_the_newest_steps(workdir, meta):
    with CheckpointWriter(workdir, keep=2) as writer:
        for step in (3, 4, 5):
            writer.save(_state(step), {}, meta)
    names = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert names == {"4", "5"}


def test_saving_a_saved_step_changes_nothing(workdir, meta):
    before = (workdir / "checkpoints" / "2" / DIGEST).read_bytes()
    with CheckpointWriter(workdir, keep=3) as writer:
        writer.save(_state(2)._replace(params=_state(9).params), {}, meta)
    assert (workdir / "checkpoints" / "2" / DIGEST).read_bytes() == before


def test_a_save_holds_the_values_of_its_moment(tmp_path, meta):
    """The step that follows gives the buffers up while the save is being written."""
    (tmp_path / "checkpoints").mkdir()
    increment = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = jax.tree.map(jnp.array, _state(1))
    with CheckpointWriter(tmp_path, keep=2) as writer:
        writer.save(state, {}, meta)
        for _ in range(10):
            state = increment(state)
    chex.assert_trees_all_equal(_restore(tmp_path, meta).state, _state(1))


def _changed(meta, path, value):
    meta = json.loads(json.dumps(meta))
    *parents, name = path.split(".")
    section = meta
    for parent in parents:
        section = section[parent]
    section[name] = value
    return meta


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("config.model.mlp_size", 64, "config.model.mlp_size: was 32, is 64"),
        ("config.model.compute_dtype", "bfloat16", "config.model.compute_dtype"),
        ("config.optimizer.learning_rate", 0.5, "config.optimizer.learning_rate"),
        ("config.training.seed", 1, "config.training.seed: was 0, is 1"),
        ("data_fingerprint.seed", 1, "config.data: seed was 0, is 1"),
        ("data_fingerprint.sources", ["abd"], "config.data: sources was"),
    ],
)
def test_refuses_another_configuration_or_data(workdir, meta, path, value, message):
    with pytest.raises(ConfigError, match=message):
        _restore(workdir, _changed(meta, path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [("config.training.steps", 40), ("config.mesh.data", 2), ("config.model.remat", "full")],
)
def test_goes_on_with_another_length_or_mesh(workdir, meta, path, value):
    assert _restore(workdir, _changed(meta, path, value)).data == {"next_index": 20}


def test_changed_data_starts_its_stream_anew_where_that_is_allowed(workdir, meta):
    changed = _changed(meta, "data_fingerprint.seed", 1)
    restored = _restore(workdir, changed, allow_changes=True)
    chex.assert_trees_all_equal(restored.state, _state(2))
    assert restored.data is None


@pytest.mark.parametrize("value", ["bfloat16[4, 3]", "float32[4, 4]", "absent"])
def test_refuses_arrays_of_another_kind(workdir, meta, value):
    changed = _changed(meta, "arrays.params.['layers'][0]['w']", value)
    with pytest.raises(CheckpointError, match=r"params\['layers'\]\[0\]\['w'\] is float32\[4, 3\]"):
        _restore(workdir, changed, allow_changes=True)


def test_a_full_disk_is_told_before_writing(workdir, meta, monkeypatch):
    usage = shutil.disk_usage(workdir)._replace(free=100)
    monkeypatch.setattr(checkpoint_writer.shutil, "disk_usage", lambda _: usage)
    with (
        pytest.raises(CheckpointError, match=r"checkpoints/3: needs \d+ bytes, 100 are free"),
        CheckpointWriter(workdir, keep=2) as writer,
    ):
        writer.save(_state(3), {}, meta)
    assert int(_restore(workdir, meta).state.step) == 2


def test_a_failing_write_of_the_last_step_is_told(workdir, meta, monkeypatch):
    """The write fails in the background, and no save follows that could tell."""

    def fail(folder):
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(checkpoint_writer, "write_digest", fail)
    with (
        pytest.raises(CheckpointError, match="bytes could not be written: No space left"),
        CheckpointWriter(workdir, keep=2) as writer,
    ):
        writer.save(_state(3), {}, meta)
    assert int(_restore(workdir, meta).state.step) == 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory, make_config, mesh):
    """A run directory with one step of a real model, and its parameters."""
    workdir = tmp_path_factory.mktemp("model")
    (workdir / "checkpoints").mkdir()
    config = make_config()
    _, shapes, _ = abstract_model(config.model)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)
    state = TrainState(params, (), jnp.int32(7), jnp.int32(0), jnp.int32(0), jnp.float32(0))
    with CheckpointWriter(workdir, keep=2) as writer:
        writer.save(state, {}, make_meta(config, mesh, state, FINGERPRINT))
    return workdir, config, params


@pytest.mark.parametrize("step", [None, 7])
def test_restore_params(trained, mesh, step):
    workdir, config, params = trained
    for target in (None, mesh):
        restored = restore_params(workdir, target, step)
        assert (restored[0], restored[2]) == (config, 7)
        chex.assert_trees_all_equal(restored[1], params)
    _, shapes, _ = abstract_model(config.model)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored[1], shapes)


def test_restore_params_names_what_is_there(trained, tmp_path):
    with pytest.raises(CheckpointError, match="no step 8; there are 7"):
        restore_params(trained[0], step=8)
    with pytest.raises(CheckpointError, match="no checkpoints"):
        restore_params(tmp_path)


def test_values_survive_exactly(tmp_path, meta):
    """Bits, not values near by: subnormals, infinities and the smallest steps of float32."""
    (tmp_path / "checkpoints").mkdir()
    bits = np.random.default_rng(0).integers(0, 2**32, 12, dtype=np.uint32).reshape(4, 3)
    odd = jnp.asarray(np.where(np.isnan(bits.view("float32")), 0, bits).view("float32"))
    state = _state(1)
    state.params["layers"][0]["w"] = odd
    with CheckpointWriter(tmp_path, keep=2) as writer:
        writer.save(state, {}, meta)
    restored = _restore(tmp_path, meta).state.params["layers"][0]["w"]
    np.testing.assert_array_equal(
        np.asarray(restored).view("uint32"), np.asarray(odd).view("uint32")
    )

"""Calibrated channels: their choice, and the file that keeps them."""

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from asa_jax.async_tls.calibration import (
    FORMAT,
    add_sample,
    choose_channels,
    load_channels,
    model_fingerprint,
    save_channels,
)
from asa_jax.errors import CheckpointError, UserError
from tests.async_tls.cases import jit

HEAD_DIM = 8
CHANNELS = np.array([[[0, 3], [1, 7]], [[2, 4], [5, 6]]], np.int32)  # two layers, two heads
PARAMS = {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}
MODEL = model_fingerprint({"num_heads": 4}, PARAMS)


def load(path, fingerprint=MODEL):
    return load_channels(path, CHANNELS.shape, HEAD_DIM, fingerprint)


def test_the_channels_that_move_the_scores_most_are_chosen():
    """A channel counts by |q_c k_c|: large keys alone, or large queries alone, do not suffice."""
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, 50, 4, HEAD_DIM)), rng.normal(size=(2, 50, 2, HEAD_DIM))
    key[..., 0, [3, 6]] *= 10
    query[..., :2, 6] *= 0.01  # no query looks at channel 6 of head 0
    query[..., 2:, [1, 2]] *= 5
    add = jit(add_sample)
    totals = jnp.zeros((2, HEAD_DIM))
    for part in range(2):
        totals = add(totals, query[part : part + 1], key[part : part + 1])
    products = np.abs(query.reshape(2, 50, 2, 2, HEAD_DIM) * key[:, :, :, None])
    np.testing.assert_allclose(np.asarray(totals), products.sum((0, 1, 3)), rtol=1e-4)
    chosen = choose_channels(totals, 2)
    assert 3 in chosen[0] and 6 not in chosen[0]
    np.testing.assert_array_equal(chosen[1], [1, 2])


def test_channels_that_there_are_not_are_refused():
    with pytest.raises(ValueError, match="num_channels: 9 of the 8"):
        choose_channels(jnp.zeros((2, HEAD_DIM)), 9)
    with pytest.raises(ValueError, match="not finite"):
        choose_channels(jnp.full((2, HEAD_DIM), jnp.nan), 2)


def test_a_file_gives_back_its_channels(tmp_path):
    save_channels(tmp_path / "channels", list(CHANNELS), MODEL)
    np.testing.assert_array_equal(load(tmp_path / "channels"), CHANNELS)
    assert [file.name for file in tmp_path.iterdir()] == ["channels"]


@pytest.mark.parametrize(
    ("fields", "params"),
    [
        ({"num_heads": 8}, PARAMS),
        ({"num_heads": 4}, {"kernel": PARAMS["kernel"] + np.float32(1e-6)}),
        ({"num_heads": 4}, {"other": PARAMS["kernel"]}),
        ({"num_heads": 4}, {"kernel": PARAMS["kernel"].T}),
    ],
)
def test_channels_of_another_model_are_refused(tmp_path, fields, params):
    save_channels(tmp_path / "channels", list(CHANNELS), MODEL)
    with pytest.raises(CheckpointError, match="calibrated for another model; calibrate anew"):
        load(tmp_path / "channels", model_fingerprint(fields, params))


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        (CHANNELS[:1], r"holds channels int32 \[1, 2, 2\], not int32 \[2, 2, 2\]"),
        (CHANNELS.astype(np.int64), "holds channels int64"),
        (CHANNELS[..., ::-1], "not ascending numbers below 8"),
        (CHANNELS + 1, "not ascending numbers below 8"),
        (CHANNELS - 1, "not ascending numbers below 8"),
    ],
)
def test_channels_that_do_not_fit_are_named(tmp_path, channels, message):
    save_channels(tmp_path / "channels", [np.ascontiguousarray(x) for x in channels], MODEL)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "channels")


def test_files_of_something_else_are_told(tmp_path):
    file = tmp_path / "channels"
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(file)
    file.write_bytes(b"no safetensors")
    with pytest.raises(CheckpointError, match="is no file of channels, or damaged"):
        load(file)
    safetensors.numpy.save_file({"channels": CHANNELS}, file)
    with pytest.raises(CheckpointError, match=f"is no file of format '{FORMAT}'"):
        load(file)
    with pytest.raises(UserError, match="cannot be written"):
        save_channels(tmp_path / "nowhere" / "channels", list(CHANNELS), MODEL)

"""Lists of blocks: what they share, how far they reach, and that they hold what every list must."""

import numpy as np
import pytest

from asa_jax.data import prepare
from asa_jax.errors import ConfigError, DataError
from experiments import selection
from experiments.selection import (
    DECODED_TOKENS,
    NEIGHBOURS,
    describe_lists,
    read_lists,
    read_windows,
)
from tests.models import random_params, tiny_model_config


def test_lists_that_are_alike_and_lists_that_are_not():
    cfg = tiny_model_config(("local", "global"), selection_block_size=16, window_size=32)
    same = np.tile(np.array([0, 3, -1]), (NEIGHBOURS, 1))
    found = describe_lists(same, cfg, start=100)
    assert found["repeated"] == 1
    assert found["distinct"] == 2 / (2 * NEIGHBOURS)
    # Block 0 ends 85 tokens before position 100, block 3 ends 37 before; later queries see farther.
    assert found["beyond_window"] == 1
    step = cfg.queries_per_selection
    distances = [85 + step * i - 48 * j for i in range(NEIGHBOURS) for j in (0, 1)]
    assert found["median_distance"] == np.median(distances)

    other = np.arange(2 * NEIGHBOURS).reshape(NEIGHBOURS, 2)
    found = describe_lists(other, cfg, start=16 * 2 * NEIGHBOURS)
    assert (found["repeated"], found["distinct"]) == (0, 1)


@pytest.mark.usefixtures("fast_compilation")
@pytest.mark.parametrize(("kinds", "scan"), [(("local", "global"), False), (("nsa", "nsa"), True)])
def test_lists_hold_the_first_and_the_own_block(kinds, scan):
    cfg = tiny_model_config(kinds, scan_layers=scan)
    params = random_params(cfg)
    rows, prompt = 2, 4 * cfg.alignment
    tokens = np.random.default_rng(0).integers(1, 60, (rows, prompt + DECODED_TOKENS))
    lists = read_lists(cfg, params, tokens.astype(np.int32))
    groups = cfg.num_latent_groups if "global" in kinds else cfg.num_kv_heads
    layers = sum(kind != "local" for kind in kinds)
    number = DECODED_TOKENS // cfg.queries_per_selection
    assert lists.shape == (number, layers, rows, groups, cfg.num_selected_blocks)
    positions = prompt + cfg.queries_per_selection * np.arange(number)
    own = (positions // cfg.selection_block_size).reshape(-1, 1, 1, 1, 1)
    assert np.all(np.any(lists == 0, axis=-1)) and np.all(np.any(lists == own, axis=-1))
    assert np.all(lists <= own)


def test_windows_are_whole_and_evenly_spread(tmp_path):
    (tmp_path / "train.txt").write_text("x")
    (tmp_path / "held_out.txt").write_text("".join(map(chr, range(33, 83))))
    arguments = ["--tokenizer=bytes", f"--output={tmp_path}", f"--input={tmp_path}/train.txt"]
    prepare.main([*arguments, f"--validation-input={tmp_path}/held_out.txt"])
    windows = read_windows(str(tmp_path), length=16, most=2)
    assert [bytes(window.tolist()).decode()[0] for window in windows] == [chr(33), chr(65)]
    assert read_windows(str(tmp_path), length=16, most=9).shape == (3, 16)
    with pytest.raises(DataError, match="no validation document has 64 tokens"):
        read_windows(str(tmp_path), length=64, most=1)


def test_a_model_without_lists_is_one_line():
    options = type("Options", (), {"workdir": "runs/x", "length": 512, "windows": 0})
    with pytest.raises(ConfigError, match="--workdir=runs/x: its layers select no blocks"):
        selection._check(options, tiny_model_config(("full", "full")))
    options.length = DECODED_TOKENS
    with pytest.raises(ConfigError, match="--length=256: must be a multiple of"):
        selection._check(options, tiny_model_config(("local", "global")))
    options.length = 2 * DECODED_TOKENS
    with pytest.raises(ConfigError, match="--windows=0: must be positive"):
        selection._check(options, tiny_model_config(("local", "global")))

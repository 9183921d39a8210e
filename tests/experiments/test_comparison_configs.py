"""The models of the comparison: equal in parameters, data and training; grids that name them."""

import functools
from pathlib import Path

import pytest

from asa_jax.config import Config, config_from_dict
from asa_jax.errors import ConfigError
from asa_jax.model.transformer import count_params
from configs import comparison
from experiments.grid import load_grid

GRIDS = Path(__file__).resolve().parents[2] / "experiments" / "grids"


@functools.cache
def config(model: str) -> Config:
    return config_from_dict(comparison.get_config(model).to_dict())


def without_embedding(model: str) -> int:
    cfg = config(model).model
    return count_params(cfg) - cfg.vocab_size * cfg.hidden_size


@pytest.mark.parametrize(("size", "count"), [("15m", 15e6), ("45m", 45e6), ("110m", 107e6)])
def test_arms_of_a_size_are_within_a_percent(size: str, count: float) -> None:
    """Even without the embedding, which all share."""
    counts = {arm: without_embedding(f"{size}/{arm}") for arm in comparison.SIZES[size][2]}
    full = counts["full"]
    assert abs(full / count - 1) < 0.01
    assert all(abs(number / full - 1) < 0.01 for number in counts.values()), counts


@pytest.mark.parametrize("arm", comparison.SIZES["45m"][2])
def test_arms_differ_in_the_model_alone(arm: str) -> None:
    ours, full = config(f"45m/{arm}"), config("45m/full")
    for section in ("data", "optimizer", "training", "mesh", "evaluation"):
        assert getattr(ours, section) == getattr(full, section)
    # Packing aligns documents to it: another one would change the order of data.
    assert ours.model.alignment == full.model.alignment


def test_sizes_of_heads_and_budgets_are_those_of_the_340m_models() -> None:
    cfg = config("45m/asa").model
    assert (cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, cfg.window_size) == (16, 4, 64, 512)
    assert (cfg.kv_lora_rank, cfg.group_kv_lora_rank, cfg.num_latent_groups) == (256, 128, 2)
    assert (cfg.num_selected_blocks, config("45m/nsa").model.num_selected_blocks) == (64, 32)


@pytest.mark.parametrize("name", ["main", "short", "scaling"])
def test_grids_name_models_that_exist(name: str) -> None:
    grid = load_grid(GRIDS / f"{name}.py")
    for model in grid.seeds:
        assert grid.config.format(model=model) == f"configs/comparison.py:{model}"
        assert config(model).model.vocab_size == 32768


def test_the_main_grid_is_that_of_the_issue() -> None:
    grid = load_grid(GRIDS / "main.py")
    assert len(grid.seeds) == 9
    assert sum(len(seeds) for seeds in grid.seeds.values()) == 3 * 3 + 6
    data, steps = config("45m/full").data, config("45m/full").training.steps
    assert data.sequence_length == 8192
    assert data.batch_size * data.sequence_length * steps >= 150e6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("x = 1", "does not set GRID"),
        (
            "from experiments.grid import Grid\n"
            "GRID = Grid(config='c', seeds={'a': (0,)}, baseline='b', sources=(), weights=(),\n"
            "            learning_rates=(1,), evaluation={}, copying={})",
            "baseline: 'b' is not in seeds",
        ),
        (
            "from experiments.grid import Grid\n"
            "GRID = Grid(config='c', seeds={'a': (0, 0)}, baseline='a', sources=(), weights=(),\n"
            "            learning_rates=(1,), evaluation={}, copying={})",
            "seeds: of 'a' must be different",
        ),
        ("GRID = (", "grid.py: SyntaxError: '\\(' was never closed"),
        ("from experiments.grid import Grid\nGRID = Grid(config='c')", "missing 7 required"),
    ],
)
def test_a_bad_grid_is_one_line(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "grid.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_grid(path)

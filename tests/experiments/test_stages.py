"""The stages of a grid: their order, the flags of their commands, the choice of a learning rate."""

import dataclasses
import json
from pathlib import Path

import pytest

from asa_jax.data.shard_writer import locked
from asa_jax.errors import ConfigError, DataError
from asa_jax.flags import PROJECT
from experiments import compare
from experiments.grid import Grid, load_grid
from experiments.results import read_grid, read_result, write_grid, write_result
from experiments.runner import Runner, make_slots
from experiments.stages import Stage, learning_rate, make_stages

GRIDS = PROJECT / "experiments" / "grids"


@pytest.fixture(scope="module")
def main_grid() -> Grid:
    return load_grid(GRIDS / "main.py")


def by_key(grid: Grid, output: Path) -> dict[tuple[str, str], Stage]:
    return {stage.key: stage for stage in make_stages(grid, output)}


def test_stages_come_after_those_that_they_need(main_grid, tmp_path):
    for grid in (main_grid, dataclasses.replace(main_grid, by_stage=True)):
        seen: set[tuple[str, str]] = set()
        for stage in make_stages(grid, tmp_path):
            assert set(stage.needs) <= seen, stage.key
            seen.add(stage.key)


def test_first_seeds_of_all_models_come_first(main_grid, tmp_path):
    seeds = [stage.run[-1] for stage in make_stages(main_grid, tmp_path) if stage.name == "train"]
    assert seeds == ["0"] * 9 + ["1"] * 3 + ["2"] * 3


def test_a_seed_alone_keeps_the_sweep_of_the_first(main_grid, tmp_path):
    stages = make_stages(main_grid, tmp_path, ["45m/asa"], [1])
    assert {s.run for s in stages if not s.name.startswith("sweep")} == {"45m_asa_s1", "shared"}
    assert [s.key for s in stages[:4]] == [
        *(("45m_asa_s0", f"sweep_{rate:g}") for rate in main_grid.learning_rates),
        ("45m_asa_s1", "train"),
    ]
    assert {s.run for s in make_stages(main_grid, tmp_path, ["45m/full"], [0])} == {
        "45m_full_s0",
        "shared",
    }


def test_a_measured_run_is_left_alone_on_a_new_machine(main_grid, tmp_path):
    """All results without any checkpoint: nothing is begun, and none is taken back."""
    stages = make_stages(main_grid, tmp_path, ["45m/asa"], [0])
    for stage in stages:
        write_result(tmp_path, *stage.key, {"stage_seconds": 1.0, "validation_loss": 3.0})
    runner = Runner(stages, tmp_path, make_slots([]), {"PATH": "/nowhere"}, deadline=None)
    assert runner.run() == 0
    assert not (tmp_path / "logs").exists()
    # The other seeds begin with their training: the sweep is not repeated.
    later = make_stages(main_grid, tmp_path, ["45m/asa"], [1])
    assert next(s.name for s in later if read_result(tmp_path, *s.key) is None) == "train"


def test_results_of_other_settings_are_refused(main_grid, tmp_path):
    write_grid(tmp_path, main_grid)
    longer = dataclasses.replace(main_grid, settings={"training.steps": 9})
    write_grid(tmp_path, longer)  # nothing is measured yet
    write_result(tmp_path, "45m_asa_s0", "train", {})
    write_grid(tmp_path, dataclasses.replace(longer, by_stage=True, decode_lengths=()))
    for name, value in (("settings", {"training.steps": 8}), ("learning_rates", (1e-3,))):
        with pytest.raises(ConfigError, match=f"^{name} of the grid is not that of the results in"):
            write_grid(tmp_path, dataclasses.replace(longer, **{name: value}))
    assert read_grid(tmp_path)["by_stage"]


def test_a_young_grid_takes_all_models_through_a_stage(tmp_path):
    stages = make_stages(load_grid(GRIDS / "short.py"), tmp_path)
    names = [stage.name for stage in stages]
    assert names[:9] == ["train"] * 4 + ["evaluate"] * 4 + ["copying"]
    assert names.index("tasks") == names.index("fine_tune") - 1


def test_arms_of_a_seed_differ_in_the_model_alone(main_grid, tmp_path):
    for model in main_grid.seeds:
        name = f"{model.replace('/', '_')}_s0"
        for rate in main_grid.learning_rates:
            write_result(tmp_path, name, f"sweep_{rate:g}", {"validation_loss": rate})
    stages = by_key(main_grid, tmp_path)
    full, asa = (stages[f"45m_{arm}_s0", "train"].command() for arm in ("full", "asa"))
    differing = [pair for pair in zip(full, asa, strict=True) if pair[0] != pair[1]]
    assert [flag.split("=")[0] for flag, _ in differing] == ["--workdir", "--config"]
    assert "--config.data.seed=0" in full and "--config.training.seed=0" in full


def test_the_rate_of_the_least_loss_is_taken(main_grid, tmp_path):
    for rate, loss in zip(main_grid.learning_rates, (3.2, 3.0, 3.1), strict=True):
        write_result(tmp_path, "45m_asa_s0", f"sweep_{rate:g}", {"validation_loss": loss})
    assert learning_rate(main_grid, tmp_path, "45m/asa") == 2e-3
    # The other seeds take the rate of the first.
    command = by_key(main_grid, tmp_path)["45m_asa_s2", "train"].command()
    assert "--config.optimizer.learning_rate=0.002" in command


def test_speed_is_measured_with_the_program_of_the_training(main_grid, tmp_path):
    """Rates and schedule are constants of the program: with others it is compiled again."""
    for rate in main_grid.learning_rates:
        write_result(tmp_path, "45m_asa_s0", f"sweep_{rate:g}", {"validation_loss": rate})
    stages = by_key(main_grid, tmp_path)
    flags = [stages["45m_asa_s0", name].command()[2:] for name in ("train", "speed")]
    assert flags[0] == flags[1] and "--config.optimizer.learning_rate=0.001" in flags[0]
    assert stages["45m_asa_s0", "speed"].needs == stages["45m_asa_s0", "train"].needs


def test_choices_are_a_stage_of_the_first_seed(main_grid, tmp_path):
    grid = dataclasses.replace(main_grid, choices=("piqa.jsonl", "arc.jsonl"))
    found = [stage for stage in make_stages(grid, tmp_path) if stage.name == "choices"]
    assert len(found) == 9
    command = found[0].command()
    assert command[-3:] == [
        "--tasks=",
        "--multiple_choice=piqa.jsonl",
        "--multiple_choice=arc.jsonl",
    ]


@pytest.mark.parametrize(("evaluated", "kept"), [(4, {"2", "4"}), (2, {"2"})])
def test_a_last_checkpoint_without_its_evaluation_is_dropped(tmp_path, evaluated, kept):
    """Otherwise the run would be finished, and its last evaluation missing for ever."""
    stages = by_key(load_grid(GRIDS / "smoke.py"), tmp_path)
    stage = stages["full_s0", "sweep_0.01"]
    workdir = stage.workdir
    for step in (2, 4):
        (workdir / "checkpoints" / str(step)).mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps({"training": {"steps": 4}}))
    line = {"step": evaluated, "validation_loss": 1.0}
    (workdir / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    stage.command()
    assert {folder.name for folder in (workdir / "checkpoints").iterdir()} == kept


def test_a_comparison_is_worked_on_by_one_process(tmp_path):
    options = compare.parse([f"--grid={GRIDS / 'smoke.py'}", f"--output={tmp_path}"])
    with locked(tmp_path), pytest.raises(DataError, match="another process is writing to it"):
        compare.run(options, {})
    assert not (tmp_path / "results").exists()


def test_a_file_of_choices_that_is_not_there_is_found_before_any_work(tmp_path):
    flags = [f"--grid={GRIDS / 'smoke.py'}", f"--output={tmp_path}", "--choices=no.jsonl"]
    with pytest.raises(ConfigError, match=r"--choices=no\.jsonl: no such file"):
        compare.run(compare.parse(flags), {})

"""metrics.jsonl over resumes, rates, and the limit of skipped steps."""

import builtins
import json
import math
import sys
import time
import types

import jax
import jax.numpy as jnp
import pytest

from asa_jax.errors import ConfigError, UserError
from asa_jax.training.flops import flops_per_token
from asa_jax.training.goodput import Goodput
from asa_jax.training.metrics import MetricsWriter, read_metrics
from asa_jax.training.progress import ProgressDisplay
from asa_jax.training.run_directory import run_notes
from asa_jax.training.run_log import RunLog, bits_per_byte
from asa_jax.training.wandb_log import check_wandb


def _metrics(loss=2.0, in_a_row=0, grad_norm=1.0):
    return {
        "loss": jnp.float32(loss),
        "grad_norm": jnp.float32(grad_norm),
        "grad_norm_average": jnp.float32(1),
        "learning_rate": jnp.float32(0.1),
        "tokens": jnp.int32(100),
        "targets": jnp.int32(100),
        "target_bytes": jnp.int32(400),
        "skipped_steps": jnp.int32(in_a_row),
        "skipped_in_a_row": jnp.int32(in_a_row),
    }


def test_a_resumed_run_drops_the_lines_after_its_checkpoint(tmp_path):
    with MetricsWriter(tmp_path, 0) as writer:
        for step in range(1, 6):
            writer.write(step, {"loss": float(step)})
        writer.write(5, {"validation_loss": 5.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # a kill in the middle of a line
    with MetricsWriter(tmp_path, 3) as writer:
        writer.write(4, {"loss": 40.0})
    assert [(x["step"], x["loss"]) for x in read_metrics(tmp_path)] == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)
    ]  # fmt: skip


def test_a_new_run_drops_every_line(tmp_path):
    for _ in range(2):
        with MetricsWriter(tmp_path, 0) as writer:
            writer.write(1, {"loss": 1.0})
    assert len(read_metrics(tmp_path)) == 1
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_lines_are_json_whatever_the_loss(tmp_path):
    with MetricsWriter(tmp_path, 0) as writer:
        writer.write(1, {"loss": math.nan, "grad_norm": math.inf, "mfu": None})
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line.pop("time") == pytest.approx(time.time(), abs=600)
    assert line == {"step": 1, "loss": None, "grad_norm": None, "mfu": None}


def test_a_plot_shows_the_whole_run_and_reads_no_file_again(tmp_path, monkeypatch):
    with MetricsWriter(tmp_path, 0) as writer:
        writer.plot()  # a run without metrics yet
        writer.write(1, {"loss": 3.0})
        writer.write(2, {"loss": math.nan})
    (tmp_path / "loss.png").unlink()
    drawn = []
    with MetricsWriter(tmp_path, 2) as writer:
        (tmp_path / "metrics.jsonl").unlink()
        writer.write(3, {"loss": 2.0})
        writer.write(3, {"validation_loss": 2.5})
        monkeypatch.setattr(
            "matplotlib.axes.Axes.plot", lambda _, *args, **__: drawn.append(args[:2])
        )
        writer.plot()
    assert drawn == [((1, 3), (3.0, 2.0)), ((3,), (2.5,))]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_bits_per_byte():
    """A uniform choice among 16 tokens of 4 bytes is one bit a byte."""
    assert bits_per_byte(100 * math.log(16), 400) == pytest.approx(1)


def test_steps_are_completed_one_late_and_shown(tmp_path, make_config, capsys):
    config = make_config(**{"training.steps": 4, "training.log_every_steps": 2})
    with RunLog(tmp_path, config, 1000, 0, time.monotonic()) as log:
        for step in range(1, 5):
            log.push(step, _metrics(loss=step), 0.25)
            assert len(read_metrics(tmp_path)) == step - 1
        log.flush()
    lines = read_metrics(tmp_path)
    assert [line["loss"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert line["bits_per_byte"] == pytest.approx(line["loss"] / 4 / math.log(2))
        assert line["tokens_per_second"] == pytest.approx(100 / line["step_seconds"])
        assert line["data_wait_seconds"] == 0.25
    assert run_notes(tmp_path) == {"device": "1 cpu", "jax": jax.__version__}
    shown = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in shown] == ["step 2/4", "step 4/4"]
    assert "loss 4.0000" in shown[1] and "bits/byte 1.443" in shown[1]


def test_stops_after_the_limit_of_skipped_steps(tmp_path, make_config, capsys):
    config = make_config(**{"training.max_skipped_steps": 2})
    with RunLog(tmp_path, config, 1000, 0, time.monotonic()) as log:
        log.push(1, _metrics(in_a_row=1, grad_norm=37), 0)
        log.push(2, _metrics(math.nan, in_a_row=2), 0)
        with pytest.raises(UserError, match=r"step 2: 2 steps in a row skipped .* not finite"):
            log.flush()
    assert [line["loss"] for line in read_metrics(tmp_path)] == [2.0, None]
    shown = capsys.readouterr().out.splitlines()
    assert shown == [
        "step 1 skipped: gradient norm 37, average 1; 1 skipped so far",
        "step 2 skipped: loss or gradient not finite; 2 skipped so far",
    ]


def test_rates_do_not_follow_the_clock_on_the_wall(tmp_path, make_config, monkeypatch):
    """It is set back an hour between two steps."""
    with RunLog(tmp_path, make_config(), 1000, 0, time.monotonic()) as log:
        log.push(1, _metrics(), 0)
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now - 3600)
        log.push(2, _metrics(), 0)
        log.flush()
    assert all(0 < line["step_seconds"] < 600 for line in read_metrics(tmp_path))


def test_goodput_counts_updates_that_stay_and_the_time_between_processes(monkeypatch):
    """Two processes of 100 s with an hour between them; the second goes on from step 2."""
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "time", lambda: clock[0])
    first, lines = Goodput([], 0, clock[0]), []
    # Compilation, two steps that stay, a skipped one, one that is done again.
    for step, (seconds, updated) in enumerate(
        [(60, True), (10, True), (10, True), (10, False), (10, True)], start=0
    ):
        clock[0] += seconds
        first.add(seconds, updated=updated)
        lines.append({"step": step, "time": clock[0], **first.values()})
    assert lines[0]["goodput"] == 0
    assert lines[-1]["goodput"] == lines[-1]["run_goodput"] == pytest.approx(30 / 100)
    clock[0] += 3600
    second = Goodput(lines, 2, clock[0])
    clock[0] += 50
    second.add(50, updated=True)
    clock[0] += 50
    second.add(40, updated=True)
    assert second.values() == pytest.approx(
        {
            "run_seconds": 3800,
            "productive_seconds": 60,
            "goodput": 40 / 100,
            "run_goodput": 60 / 3800,
        }
    )
    # The clock was set back a day before the third; lines of older versions have no times.
    clock[0] -= 86_400
    third = Goodput([{"step": 1}, *lines], 2, clock[0])
    clock[0] += 10
    assert third.values()["run_seconds"] == pytest.approx(110)
    assert Goodput([{"step": 1}], 1, clock[0] - 5).values()["run_seconds"] == pytest.approx(5)
    # The first process ended before it wrote a line, a minute before the second began.
    after_nothing = Goodput([], 0, clock[0] - 5, run_began=clock[0] - 65)
    assert after_nothing.values()["run_seconds"] == pytest.approx(65)
    assert Goodput([], 0, clock[0] - 5, clock[0] + 99).values()["run_seconds"] == pytest.approx(5)


class _FakeWandb(types.ModuleType):
    """What the writer uses of the package; nothing leaves the machine."""

    Error = RuntimeError
    Settings = dict

    def __init__(self):
        super().__init__("wandb")
        self.asked, self.logged, self.codes = [], [], []

    def init(self, **options):
        self.asked.append(options)
        return types.SimpleNamespace(
            define_metric=lambda *_, **__: None,
            log=self.logged.append,
            finish=lambda exit_code: self.codes.append(exit_code),
        )


def test_wandb_gets_the_lines_and_goes_on_with_its_run(tmp_path, make_config, monkeypatch):
    fake = _FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = make_config(**{"training.wandb_project": "asa"})
    for start in (0, 1):
        with RunLog(tmp_path, config, 1000, start, time.monotonic()) as log:
            log.push(start + 1, _metrics(), 0)
            log.flush()
            log.evaluation(start + 1, {"validation_loss": 2.0})
    first, second = fake.asked
    assert first["project"] == "asa" and first["resume"] == "allow"
    assert first["id"] == second["id"] == (tmp_path / "wandb_run_id").read_text()
    assert first["config"]["training"]["wandb_project"] == "asa"
    assert [x["step"] for x in fake.logged] == [1, 1, 2, 2]
    assert fake.logged[0]["loss"] == 2 and "mfu" not in fake.logged[0]
    assert fake.codes == [0, 0]

    def refuse(**_):
        raise fake.Error("not logged in")

    monkeypatch.setattr(fake, "init", refuse)
    with pytest.raises(UserError, match=r"wandb_project: not logged in; .*WANDB_MODE=offline"):
        RunLog(tmp_path, config, 1000, 0, time.monotonic())


def test_wandb_is_neither_imported_nor_asked_for_by_default(tmp_path, make_config, monkeypatch):
    imported, real = [], builtins.__import__

    def watch(name, *args, **kwargs):
        imported.append(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", watch)
    with RunLog(tmp_path, make_config(), 1000, 0, time.monotonic()) as log:
        log.push(1, _metrics(), 0)
        log.flush()
    assert "wandb" not in imported and not (tmp_path / "wandb_run_id").exists()


def test_a_missing_wandb_is_one_line_that_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    (tmp_path / "wandb").mkdir()  # what an earlier run left behind is no package
    check_wandb("")
    with pytest.raises(
        ConfigError, match=r"wandb_project = 'asa': .* pip install 'asa-jax\[wandb\]'"
    ):
        check_wandb("asa")


def test_a_terminal_that_goes_away_does_not_end_the_run(monkeypatch):
    def gone(*_, **__):
        raise BrokenPipeError

    with ProgressDisplay(0, 10, 1) as display:
        monkeypatch.setattr("builtins.print", gone)
        display.update(1, {"loss": 1.0}, 5.0)
        display.print("line")


def test_flops_of_a_full_model_by_hand(make_config):
    """6 a weight, and 6 * N * 2H for each of (T + 1) / 2 keys in each of two layers."""
    model = make_config(**{"model.layer_kinds": ("full", "full")}).model
    weights = 10_000
    table = model.vocab_size * model.hidden_size
    expected = 6 * (weights - table) + 2 * 6 * 4 * 16 * (64 + 1) / 2
    assert flops_per_token(model, weights, 64) == expected


def test_flops_of_sparse_layers_grow_with_what_they_see(make_config):
    def flops(kind, length):
        return flops_per_token(make_config(**{"model.layer_kinds": (kind,)}).model, 0, length)

    assert flops("sliding", 2**16) == pytest.approx(flops("sliding", 2**15), rel=1e-3)
    assert flops("global", 2**16) < flops("mla", 2**16) / 7
    # All of a short row is in the window and in the selected blocks.
    assert flops("local", 16) == flops("mla", 16)

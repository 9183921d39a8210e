"""The runner of a comparison: order, what is finished, failures, kills, shared GPUs."""

import dataclasses
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from experiments.results import read_result, write_result
from experiments.runner import Runner, make_slots
from experiments.stages import Stage

# Appends to a file when it begins and when it ends, so that order and overlap can be read there.
PROGRAM = """
import os, signal, sys, time
name, seconds, log = sys.argv[1], float(sys.argv[2]), sys.argv[3]
def say(word):
    with open(log, "a") as file:
        file.write(f"{word} {name}\\n")
def save(*_):
    say("saved")
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
say("begin")
time.sleep(seconds)
say("end")
print(os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("XLA_CLIENT_MEM_FRACTION"))
"""


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def stage(log: Path):  # type: ignore[no-untyped-def]
    def make(name: str, seconds: float = 0.0, **fields) -> Stage:  # type: ignore[no-untyped-def]
        fields.setdefault("command", lambda: ["-c", PROGRAM, name, str(seconds), str(log)])
        return Stage(run="run", name=name, collect=lambda said: {"said": said.strip()}, **fields)

    return make


def run(tmp_path: Path, stages: list[Stage], gpus: tuple[str, ...] = (), seconds=None) -> int:  # type: ignore[no-untyped-def]
    deadline = None if seconds is None else time.monotonic() + seconds
    return Runner(stages, tmp_path, make_slots(gpus), os.environ, deadline).run()


def test_order_is_that_of_the_list_and_of_needs(tmp_path, log, stage):
    waiting = stage("second", needs=(("run", "third"),))
    assert run(tmp_path, [stage("first"), waiting, stage("third")]) == 0
    assert begun(log) == ["first", "third", "second"]


def test_finished_stages_are_skipped(tmp_path, log, stage):
    write_result(tmp_path, "run", "first", {"stage_seconds": 1.0})
    assert run(tmp_path, [stage("first"), stage("second")]) == 0
    assert log.read_text() == "begin second\nend second\n"
    assert run(tmp_path, [stage("first"), stage("second")]) == 0
    assert log.read_text() == "begin second\nend second\n"


def test_a_failure_stops_only_what_needs_it(tmp_path, log, stage, capfd):
    bad = stage("bad", command=lambda: ["-c", "import sys; sys.exit('error: no such thing')"])
    after = stage("after", needs=(("run", "bad"),))
    assert run(tmp_path, [bad, after, stage("other")]) == 1
    assert log.read_text() == "begin other\nend other\n"
    assert "failed: run bad: exit 1: error: no such thing" in capfd.readouterr().out
    assert read_result(tmp_path, "run", "bad") is None


def test_time_is_up(tmp_path, log, stage, capfd):
    """A process gets the signal on which trainers save, and is no result."""
    assert run(tmp_path, [stage("long", 60), stage("later")], seconds=1.5) == 0
    assert log.read_text() == "begin long\nsaved long\n"
    assert "2 of 2 stages are left; the same command goes on" in capfd.readouterr().out
    assert run(tmp_path, [stage("long"), stage("later")]) == 0


def test_a_signal_stops_it(tmp_path, log, stage):
    timer = threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    assert run(tmp_path, [stage("long", 60)]) == 128 + signal.SIGTERM
    assert log.read_text() == "begin long\nsaved long\n"


def test_each_gpu_has_its_processes(tmp_path, stage):
    stages = [stage(str(i), 0.2) for i in range(3)]
    assert run(tmp_path, stages, ("0", "0", "1")) == 0
    said = sorted(read_result(tmp_path, "run", str(i))["said"] for i in range(3))
    assert said == ["0 0.450", "0 0.450", "1 0.900"]


def test_what_is_timed_has_its_gpu_alone(tmp_path, log, stage):
    stages = [stage("a", 0.5), stage("timed", 0.3, alone=True), stage("b")]
    assert run(tmp_path, stages, ("0", "0")) == 0
    lines = log.read_text().splitlines()
    assert lines == ["begin a", "end a", "begin timed", "end timed", "begin b", "end b"]


@pytest.fixture
def carried(tmp_path, stage) -> list[Stage]:  # type: ignore[no-untyped-def]
    """A run whose results came from another machine, without the one that is read last."""
    trained, tuned = tmp_path / "train", tmp_path / "fine_tune"
    of_train = {"needs": (("run", "train"),), "checkpoint": trained}
    of_tuned = {"needs": (("run", "fine_tune"),), "checkpoint": tuned}
    stages = [
        stage("sweep", workdir=tmp_path / "sweep"),
        stage("train", needs=(("run", "sweep"),), workdir=trained, leaves=trained / "checkpoints"),
        stage("evaluate", **of_train),
        stage("speed"),
        stage("fine_tune", workdir=tuned, leaves=tuned / "checkpoints", **of_train),
        stage("retrieval", **of_tuned),
    ]
    for finished in stages[:-1]:
        write_result(tmp_path, "run", finished.name, {"stage_seconds": 1.0})
    return stages


def begun(log: Path) -> list[str]:
    lines = log.read_text().splitlines() if log.exists() else []
    return [line.split()[1] for line in lines if line.startswith("begin")]


def test_results_are_enough_where_nothing_reads_parameters(tmp_path, log, carried):
    write_result(tmp_path, "run", "retrieval", {"stage_seconds": 1.0})
    assert run(tmp_path, carried) == 0
    assert begun(log) == []


def test_parameters_that_are_gone_are_trained_again(tmp_path, log, carried, capfd):
    """And all that was read from them, but not the sweep nor what needs none."""
    assert run(tmp_path, carried) == 0
    assert begun(log) == ["train", "evaluate", "fine_tune", "retrieval"]
    assert "run train is done again: files of this run are gone" in capfd.readouterr().out


def test_results_of_a_training_that_is_gone_do_not_outlast_a_kill(tmp_path, log, carried):
    assert run(tmp_path, carried, seconds=-1) == 0
    (tmp_path / "train" / "checkpoints").mkdir(parents=True)  # of the first steps alone
    assert run(tmp_path, carried) == 0
    assert begun(log)[:2] == ["train", "evaluate"]


def test_a_checkpoint_that_is_there_is_read(tmp_path, log, carried):
    for name in ("train", "fine_tune"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    assert run(tmp_path, carried) == 0
    assert begun(log) == ["retrieval"]


def test_what_a_stage_left_is_made_again_only_if_it_is_read(tmp_path, log, stage):
    write_result(tmp_path, "run", "tasks", {"stage_seconds": 1.0})
    tasks = stage("tasks", leaves=tmp_path / "gone")
    reader = stage("reader", needs=(("run", "tasks"),))
    assert run(tmp_path, [tasks, reader]) == 0
    assert log.read_text() == "begin tasks\nend tasks\nbegin reader\nend reader\n"
    assert run(tmp_path, [tasks, reader]) == 0
    assert len(log.read_text().splitlines()) == 4


def test_a_result_that_cannot_be_read_is_a_failure(tmp_path, stage):
    odd = dataclasses.replace(stage("odd"), collect=lambda said: {"value": int("x")})
    assert run(tmp_path, [odd]) == 1
    assert read_result(tmp_path, "run", "odd") is None

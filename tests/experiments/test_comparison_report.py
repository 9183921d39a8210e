"""The report of a comparison: means, paired differences and noise, figures, what is missing."""

import dataclasses
import json
from pathlib import Path

import pytest

from asa_jax.config import config_from_dict, config_to_dict
from asa_jax.errors import DataError
from configs import comparison
from experiments import report
from experiments.grid import Grid, Training
from experiments.measured import load_comparison
from experiments.power_law import fit_power_law
from experiments.results import RESULTS, write_grid, write_result
from experiments.stages import run_name

GRID = Grid(
    config="configs/comparison.py:{model}",
    seeds={"15m/full": (0, 1, 2), "15m/asa": (0, 1, 2), "15m/nsa": (0, 1, 2), "15m/sliding": (0,)},
    baseline="15m/full",
    sources=("tokens/code", "tokens/books"),
    weights=(0.75, 0.25),
    learning_rates=(1e-3,),
    evaluation={},
    copying={},
    fine_tuning=Training(settings={}),
    speed={},
    decode_lengths=(8192,),
    continued=("15m/asa",),
)
# Bits per byte of code: each seed shifts all models alike, the models differ by about a constant.
BASE = {0: 1.0, 1: 1.1, 2: 1.2}
OFFSET = {
    "15m/full": (0.0, 0.0, 0.0),
    "15m/asa": (-0.050, -0.051, -0.049),
    "15m/nsa": (0.02, -0.02, 0.001),
    "15m/sliding": (0.2,),
}


def perplexity(source: str, bits: float) -> dict[str, object]:
    buckets = [
        {"first": first, "last": first + 1023, "bits_per_byte": bits + 0.1 / (1 + first / 1024)}
        for first in range(0, 8192, 1024)
    ]
    return {
        "source": source, "bits_per_byte": bits, "nats": 2 * bits, "tokens": 1, "buckets": buckets,
    }  # fmt: skip


def write_run(output: Path, model: str, seed: int) -> None:
    name, bits = run_name(model, seed), BASE[seed] + OFFSET[model][seed]
    config = config_to_dict(config_from_dict(comparison.get_config(model).to_dict()))
    loss = [[step, 10 - step / 10] for step in range(1, 31)]
    train = {"config": config, "loss": loss, "tokens": 3e6, "steps": 30, "parameters": 25e6}
    write_result(output, name, "train", train)
    results = [perplexity("code", bits), perplexity("books", bits / 2)]
    write_result(output, name, "evaluate", {"perplexity": results})
    groups = [
        {"distance": None, "count": 10, "exact": 0.0},
        {"distance": [512, 1024], "count": 10, "exact": 0.5},
        {"distance": [1024, 2048], "count": 30, "exact": 0.2},
        {"distance": [2048, 4096], "count": 10, "exact": 0.6},
    ]
    write_result(output, name, "copying", {"groups": groups})
    if model != "15m/sliding":
        answers = [
            {"task": "single_noise", "length": length, "depth": depth, "samples": 4,
             "exact_match": depth}
            for length in (1024, 2048) for depth in (0.0, 1.0)
        ]  # fmt: skip
        write_result(output, name, "retrieval", {"answers": answers})


@pytest.fixture
def output(tmp_path: Path) -> Path:
    write_grid(tmp_path, GRID)
    for model, seeds in GRID.seeds.items():
        for seed in seeds:
            write_run(tmp_path, model, seed)
    speed = {"device": "1 H100", "tokens_per_second": 1234567.0, "memory_bytes": 2**31}
    write_result(tmp_path, run_name("15m/asa", 0), "speed", speed)
    layers = [
        {"repeated": share, "distinct": 0.25, "beyond_window": 0.5, "median_distance": 1500.0}
        for share in (0.5, 0.75)
    ]
    lists = {"sources": [{"source": "code", "layers": layers}]}
    write_result(tmp_path, run_name("15m/asa", 0), "selection", lists)
    return tmp_path


def test_differences_are_paired_by_seed(output):
    """Seeds shift all models by tenths; differences of hundredths stand out by pairing alone."""
    found = load_comparison(output).differences("code")
    assert found["15m/asa"].mean == pytest.approx(-0.05)
    assert found["15m/asa"].spread == pytest.approx(0.001)
    assert found["15m/asa"].verdict == "lower"
    assert found["15m/nsa"].verdict == "within noise"
    # One seed alone: judged by the spread of the others.
    assert found["15m/sliding"].spread is None
    assert found["15m/sliding"].verdict == "higher"


def test_one_seed_of_all_models_says_nothing_of_noise(output):
    seeds = {model: (0,) for model in GRID.seeds}
    write_grid(output, dataclasses.replace(GRID, seeds=seeds))
    found = load_comparison(output).differences("code")
    assert {difference.verdict for difference in found.values()} == {"one seed"}


def test_losses_are_mixed_as_in_training(output):
    data = load_comparison(output)
    run = data.of("15m/full")[0]
    assert data.mixed_loss(run) == pytest.approx(0.75 * 2 * 1.0 + 0.25 * 2 * 0.5)
    assert run.far_copies() == pytest.approx((30 * 0.2 + 10 * 0.6) / 40)
    assert run.exact_matches() == {"single_noise": 0.5}


def test_cache_of_asa_is_smaller_than_that_of_full_attention(output):
    data = load_comparison(output)
    full = data.cache_bytes("15m/full", 8192)
    assert full == 8 * 1024  # layers, and 2 x 4 heads of 64 in bfloat16
    assert data.cache_bytes("15m/asa", 8192) < full / 2


def test_page(output, tmp_path):
    path = tmp_path / "docs" / "page.md"
    path.parent.mkdir()
    path.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.main([str(output), f"--output={path}"])
    text = path.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if "|" in line}
    assert "-0.0500 ± 0.0010 (lower)" in text
    assert "| 15m/asa | 62.5% " in text and "| 1,500 " in text
    assert "1,234,567" in text and "Timed on: 1 H100." in text
    assert "- evaluate_long: 15m_asa_s0" in text
    assert "- retrieval: 15m_sliding_s0" in text
    assert "15m/sliding" in rows
    for name in ("losses", "positions", "needles", "cache"):
        assert f"(results/page_{name}.png)" in text
        assert (path.parent / "results" / f"page_{name}.png").stat().st_size > 10_000
    raw = json.loads((path.parent / "results" / "page.json").read_text())
    assert len(raw["runs"]) == 10


def test_nothing_measured_yet_is_a_page_too(tmp_path):
    write_grid(tmp_path, GRID)
    path = tmp_path / "page.md"
    report.main([str(tmp_path), f"--output={path}"])
    text = path.read_text()
    assert "Training loss: not measured." in text
    assert text.count("- train: 15m_full_s0, 15m_full_s1") == 1


def test_arms_that_were_not_run_are_shown_as_missing(tmp_path):
    """One run alone, which is not of the baseline: no differences, a curve and positions of it."""
    write_grid(tmp_path, GRID)
    write_run(tmp_path, "15m/asa", 1)
    path = tmp_path / "page.md"
    report.main([str(tmp_path), f"--output={path}"])
    text = path.read_text()
    rows = {
        line.split("|")[1].strip(): line.split("|") for line in text.splitlines() if "|" in line
    }
    assert "1 of 3" in text and "minus 15m/full" not in text
    assert {cell.strip() for cell in rows["15m/nsa"][2:-1]} == {report.NOTHING}
    assert "- train: 15m_full_s0, 15m_full_s1, 15m_full_s2, 15m_asa_s0, 15m_asa_s2" in text
    for name in ("losses", "positions"):
        assert (tmp_path / "results" / f"page_{name}.png").stat().st_size > 10_000


def test_no_results_and_no_marks_are_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        report.main([str(tmp_path), "--output=page.md"])
    assert "grid.json: missing; give the --output of an" in capsys.readouterr().err
    page = tmp_path / "page.md"
    page.write_text("mine\n")
    with pytest.raises(DataError, match="to write between"):
        report.insert(page, "text")
    assert page.read_text() == "mine\n"


def test_a_damaged_result_is_named(output):
    file = output / RESULTS / run_name("15m/asa", 1) / "train.json"
    file.write_text("{")
    with pytest.raises(DataError, match=r"train\.json: broken JSON"):
        load_comparison(output)


def test_power_law():
    sizes = [15e6, 45e6, 110e6]
    law = fit_power_law(sizes, [20 * n**-0.1 for n in sizes])
    assert law.exponent == pytest.approx(0.1)
    assert law.exponent_error == pytest.approx(0, abs=1e-9)
    assert law.predict(302e6)[0] == pytest.approx(20 * 302e6**-0.1)
    noisy = fit_power_law(sizes, [3.0, 2.7, 2.55])
    assert noisy.predict(302e6)[1] > noisy.predict(60e6)[1] > 0
    with pytest.raises(DataError, match="three sizes, there are 2"):
        fit_power_law([1e6, 2e6], [3.0, 2.0])


def test_three_sizes_give_a_power_law(tmp_path):
    sizes = {"15m/full": 1.0, "45m/full": 0.9, "110m/full": 0.82}
    grid = dataclasses.replace(
        GRID, seeds={model: (0,) for model in sizes}, baseline="45m/full", continued=()
    )
    write_grid(tmp_path, grid)
    for model, bits in sizes.items():
        config = config_to_dict(config_from_dict(comparison.get_config(model).to_dict()))
        write_result(tmp_path, run_name(model, 0), "train", {"config": config})
        write_result(
            tmp_path, run_name(model, 0), "evaluate", {"perplexity": [perplexity("code", bits)]}
        )
    (line,) = report.scaling_lines(load_comparison(tmp_path))
    assert line.startswith("- full: loss ~ N^-0.1") and "over 3 runs" in line

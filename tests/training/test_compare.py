"""The comparison of runs reads what they wrote."""

import json

import pytest

from asa_jax.training import compare
from asa_jax.training.run_directory import note_run
from configs import tiny


def _write_run(folder, losses):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny.get_config().to_dict()))
    lines = [
        {"step": i, "loss": loss, "tokens": 10, "tokens_per_second": 5.0, "step_seconds": 2.0}
        for i, loss in enumerate(losses, 1)
    ]
    lines.append({"step": len(losses), "validation_loss": 3.0, "validation_bits_per_byte": 1.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    note_run(folder, device=f"8 GPUs of {folder.name}")


def test_summary_and_files(tmp_path, capsys):
    _write_run(tmp_path / "a", [5.0, 4.0, 3.5])
    _write_run(tmp_path / "b", [5.0, 4.5])
    output = tmp_path / "out" / "both"
    compare.main([str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(output)])
    report = json.loads(output.with_suffix(".json").read_text())
    first, second = report["runs"]
    assert (first["run"], first["steps"], first["tokens"]) == ("a", 3, 30)
    assert first["step_seconds"] == 6.0
    assert (first["device"], second["device"]) == ("8 GPUs of a", "8 GPUs of b")
    assert second["loss"] == [[1, 5.0], [2, 4.5]]
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "1.5000" in capsys.readouterr().out


def test_a_folder_without_a_run_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        compare.main([str(tmp_path / "none")])
    (line,) = capsys.readouterr().err.splitlines()
    assert error.value.code == 1 and line.startswith("error: ") and "none/metrics.jsonl" in line

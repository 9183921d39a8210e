"""Processes that measure: what becomes of what they say."""

import pytest

from pallas_kernels.measurement import Measurement, run_benchmark

SAYS = """
import sys, time
print("progress: half", file=sys.stderr, flush=True)
print("a warning", file=sys.stderr, flush=True)
"""


@pytest.mark.parametrize(
    ("end", "seconds", "error"),
    [
        ("time.sleep(60)", 2, "no end in 2 s: a warning"),
        ("sys.exit('no memory')", 30, "exit 1: no memory"),
        ("", 30, None),
    ],
)
def test_progress_is_passed_on_and_the_last_line_tells_of_an_end(end, seconds, error, capsys):
    results = Measurement(["-c", f"{SAYS}print(1)\nsys.stdout.flush()\n{end}"]).results(seconds)
    assert results == [1] + ([{"error": error}] if error else [])
    assert capsys.readouterr().err == "progress: half\n"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (
            PermissionError(13, "Permission denied", "f.md"),
            1,
            "error: [Errno 13] Permission denied",
        ),
    ],
)
def test_an_interrupt_and_a_file_that_cannot_be_written_are_one_line(error, code, line, capsys):
    def main() -> int:
        raise error

    with pytest.raises(SystemExit) as exit:
        run_benchmark(main)
    assert exit.value.code == code
    said = capsys.readouterr().err
    assert said.startswith(line) and len(said.splitlines()) == 1

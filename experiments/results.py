"""What a comparison has measured: one JSON file for each finished stage of each run.

    OUTPUT/results/45m_asa_s0/train.json

They are written whole or not at all, and are all that the report reads.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asa_jax.errors import DataError

RESULTS = "results"


def result_path(output: Path, run: str, stage: str) -> Path:
    """Where the result of a stage lies."""
    return output / RESULTS / run / f"{stage}.json"


def write_result(output: Path, run: str, stage: str, content: Mapping[str, Any]) -> None:
    """Writes the result of a stage, which is then finished."""
    path = result_path(output, run, stage)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(content) + "\n")
    temporary.replace(path)


def read_result(output: Path, run: str, stage: str) -> dict[str, Any] | None:
    """The result of a stage; None where it is not finished.

    Raises:
        DataError: the file is damaged.
    """
    path = result_path(output, run, stage)
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path}: broken JSON ({error}); delete it to measure again") from None

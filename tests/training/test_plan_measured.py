"""Plans against what was measured on an H100, and compiled for some.

Several models and ways to run them: memory within 10%, rate within 20%, collectives within 6%.
"""

import importlib
import json
from pathlib import Path

import pytest

from asa_jax.config import config_from_dict
from asa_jax.training.plan import make_plan
from tests.training.plan_steps import by_axis

STEPS = json.loads(Path(__file__).with_name("plan_steps.json").read_text())["steps"]


def name(step):
    fields = (f"{path.split('.')[-1]}={value}" for path, value in step["fields"].items())
    return ",".join([step["config"], *fields])


def marks(step):
    """Of those that take longest to trace and tell least beside the others."""
    quick = "full" in step["config"] or "measured_gib" in step or step["devices"] > 1
    return () if quick else pytest.mark.slow


def config_of(step):
    module, *arm = step["config"].split(":")
    values = importlib.import_module(f"configs.{module}").get_config(*arm)
    values.update_from_flattened_dict(step["fields"])
    return config_from_dict(values.to_dict())


@pytest.mark.parametrize(
    "step", [pytest.param(step, id=name(step), marks=marks(step)) for step in STEPS]
)
def test_the_plan_is_near(step):
    documents = {int(tokens): number for tokens, number in step.get("documents", {}).items()}
    plan = make_plan(config_of(step), step["devices"], "H100", documents)
    for size in (step["compiled_gib"], step.get("measured_gib", step["compiled_gib"])):
        assert plan["peak_bytes"] / 2**30 == pytest.approx(size, rel=0.1)
    if "tokens_per_second" in step:
        assert plan["tokens_per_second"] == pytest.approx(step["tokens_per_second"], rel=0.2)
    compiled = step.get("collective_bytes", {})
    planned = by_axis((each["op"], each["axes"], each["bytes"]) for each in plan["collectives"])
    for kind in compiled | planned:
        limit = 0.06 * max(compiled.get(kind, 0.0), 1e-3 * sum(compiled.values()))
        assert planned.get(kind, 0.0) == pytest.approx(compiled.get(kind, 0.0), abs=limit), kind

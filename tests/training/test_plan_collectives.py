"""The planned list of collectives is that of the compiled step."""

from pathlib import Path

import pytest

from asa_jax.config import config_from_dict
from asa_jax.training.plan_collectives import Planned, link_bytes, planned_collectives
from configs import asa_340m
from tests.simulated_devices import run_on_eight_devices

SCRIPT = Path(__file__).parent / "plan_steps.py"
# tests/test_collectives.py holds the plan of an ASA model to larger steps on other meshes.
STEPS = [("full", (2, 2, 2, 1))]


def test_the_compiled_step_moves_what_the_plan_says():
    for step, (compiled, planned) in zip(STEPS, run_on_eight_devices(SCRIPT, STEPS), strict=True):
        for kind, size in planned.items():
            assert compiled.pop(kind) == pytest.approx(size, rel=0.02), (step, kind)
        # What is left: a resharding here and there, and single numbers.
        assert sum(compiled.values()) < 0.02 * sum(planned.values()), (step, compiled)


def test_a_gradient_that_every_device_needs_goes_there_and_back():
    """Summed over `data` it is held whole, over `fsdp` divided."""
    config = config_from_dict(asa_340m.get_config().to_dict())
    for axis, ways in (("data", 2), ("fsdp", 1)):
        mesh = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1, axis: 8}
        found = planned_collectives(config, mesh)
        reduce = max((each for each in found if each.op == "reduce"), key=lambda each: each.bytes)
        assert reduce.axes == (axis,)
        assert link_bytes(reduce, mesh, 8)["nvlink"] == pytest.approx(ways * reduce.bytes * 7 / 8)


def test_links_by_hand():
    """64 devices of 8 hosts: fsdp within a host, data between them."""
    mesh = {"data": 8, "fsdp": 8, "tensor": 1, "context": 1}
    gather = Planned("all-gather", ("fsdp",), 800.0, "weights")
    assert link_bytes(gather, mesh, 8) == {"nvlink": 700.0, "network": 0.0}
    reduce = Planned("reduce", ("data",), 800.0, "gradients, each its part of fsdp")
    assert link_bytes(reduce, mesh, 8) == {"nvlink": 0.0, "network": 2 * 700.0}
    # One ring over all: each of the 8 ports of a host brings an eighth of what the host lacks.
    whole = link_bytes(Planned("all-gather", ("data", "fsdp"), 800.0, "weights"), mesh, 8)
    assert whole == {"nvlink": 700.0, "network": 87.5}
    halo = Planned("collective-permute", ("context",), 800.0, "halos")
    inside = {"data": 1, "fsdp": 16, "tensor": 1, "context": 4}
    assert link_bytes(halo, inside, 8) == {"nvlink": 800.0, "network": 0.0}

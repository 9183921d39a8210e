"""Compiles small steps for 8 simulated devices and plans them; started by test_plan_collectives.

Reads JSON: for each step an arm of configs/asa_340m.py and the sizes of the mesh axes. Prints for
each step the bytes by kind of collective and mesh axis, as compiled and as planned.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any

from asa_jax.collectives import collectives
from asa_jax.config import config_from_dict
from asa_jax.sharding import MESH_AXES, make_mesh
from asa_jax.training.compile_time import lower_step
from asa_jax.training.plan_collectives import planned_collectives
from configs import asa_340m

# Small enough that nothing is walked in chunks, which takes long to compile.
SMALL = {
    "model.hidden_size": 64, "model.mlp_size": 128, "model.vocab_size": 256,
    "model.window_size": 32, "model.num_selected_blocks": 4, "data.batch_size": 8,
    "data.sequence_length": 256,
    "model.compute_dtype": "float32",  # XLA on a CPU has no bfloat16 to travel
}  # fmt: skip


def by_axis(found: Iterable[tuple[str, tuple[str, ...], float]]) -> dict[str, float]:
    """Bytes by kind and axis: whether sums go over two axes at once or in turn is XLA's choice."""
    totals: Counter[str] = Counter()
    for op, axes, size in found:
        for axis in axes:
            totals[f"{op} {axis}"] += size
    return totals


def compiled_kind(op: str, axes: tuple[str, ...]) -> str:
    """CPUs compile a reduce-scatter of weights as sum and slice."""
    if op == "reduce-scatter" and axes == ("context",):
        return "scatter"
    return "reduce" if op in ("all-reduce", "reduce-scatter") else op


def compare(arm: str, sizes: list[int]) -> list[dict[str, float]]:
    values: Any = asa_340m.get_config(arm)
    values.update_from_flattened_dict(SMALL)
    values.model.layer_kinds = values.model.layer_kinds[:4]
    values.mesh = dict(zip(MESH_AXES, sizes, strict=True))
    config = config_from_dict(values.to_dict())
    mesh = make_mesh(config.mesh)
    hlo = lower_step(config, mesh).compile().as_text()
    compiled = (
        (compiled_kind(each.op, each.axes), each.axes, each.bytes * each.times)
        for each in collectives(hlo, mesh.shape)
    )
    planned = ((each.op, each.axes, each.bytes) for each in planned_collectives(config, mesh.shape))
    return [by_axis(compiled), by_axis(planned)]


if __name__ == "__main__":
    print(json.dumps([compare(*step) for step in json.load(sys.stdin)]))

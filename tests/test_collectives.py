"""Collectives in HLO text; those of the compiled training step are the ones the design names."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from asa_jax.collectives import collectives
from asa_jax.sharding import MESH_AXES
from asa_jax.training.plan_collectives import planned_collectives
from tests.compiled_step import config_340m

PROJECT = Path(__file__).resolve().parent.parent
MESH = {"data": 1, "fsdp": 2, "tensor": 2, "context": 2}
HLO = """
HloModule jit_step

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%body (state: (s32[], f32[4])) -> (s32[], f32[4]) {
  %small = f32[8,16]{1,0} all-gather(%w), replica_groups=[4,2]<=[2,2,2]T(0,2,1), dimensions={0}
  %rs = bf16[4,32]{1,0} reduce-scatter(%x), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  ROOT %t = (s32[], f32[4]) tuple(%i, %small)
}

ENTRY %main (p: f32[4]) -> f32[] {
  %ar = (f32[3]{0}, s32[]) all-reduce(%a, %b), \
replica_groups=mesh['fsdp'=2,'tensor'=2,'context'=2] {'fsdp','context'}, to_apply=%add, \
metadata={op_name="jit(step)/psum"}
  %one = f32[99] all-reduce(%a), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
  %part = f32[7] all-reduce(%a), replica_groups=mesh['a'=8] {'a':(2)2}, to_apply=%add
  %halo = f32[5] collective-permute(%c), source_target_pairs={{0,1},{2,3},{4,5},{6,7}}
  %start = (bf16[2], bf16[4]) all-gather-start(%c), replica_groups=[2,4]<=[4,2]T(1,0)
  %done = bf16[4] all-gather-done(%start)
  %loop = (s32[], f32[4]) while(%s), condition=%add, body=%body, \
backend_config={"known_trip_count":{"n":"12"}}
}
"""


def test_reads_every_form_of_groups_and_loops():
    found = {
        (each.op, each.axes, each.shapes): (each.bytes, each.times)
        for each in collectives(HLO, MESH)
    }
    assert found == {
        ("all-gather", ("tensor",), ("f32[8,16]",)): (512, 12),
        ("reduce-scatter", ("context",), ("bf16[4,32]",)): (512, 12),
        ("all-reduce", ("fsdp", "context"), ("f32[3]", "s32[]")): (16, 1),
        ("all-reduce", ("tensor",), ("f32[7]",)): (28, 1),
        ("collective-permute", ("context",), ("f32[5]",)): (20, 1),
        ("all-gather", ("fsdp", "tensor"), ("bf16[4]",)): (8, 1),
    }
    (psum,) = (each for each in collectives(HLO, MESH) if each.axes == ("fsdp", "context"))
    assert psum.source == "jit(step)/psum"


def expected_bytes(sizes):
    """Bytes of a step on one device by (kind, axis), as docs/parallelism.md counts them."""
    mesh = dict(zip(MESH_AXES, sizes, strict=True))
    expected = Counter()
    for each in planned_collectives(config_340m(sizes, {}), mesh):
        for axis in each.axes:
            expected[each.op, axis] += each.bytes
    return expected


def kind_of(each):
    """What a reduction is for: CPUs compile a reduce-scatter of weights as sum and slice."""
    axes = "fsdp" if "fsdp" in each["axes"] else "+".join(each["axes"])
    if each["op"] == "reduce-scatter" and axes == "context":
        return "scatter", axes
    op = "reduce" if each["op"] in ("all-reduce", "reduce-scatter") else each["op"]
    return op, axes


def compile_steps(*meshes, xla_flags="", **fields):
    done = subprocess.run(
        [sys.executable, "-m", "tests.compiled_step", json.dumps([meshes, fields])],
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8 "
            "--xla_backend_optimization_level=0 "
            f"--xla_llvm_disable_expensive_passes=true {xla_flags}",
        },
        cwd=PROJECT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(*meshes):
    found = compile_steps(*meshes)
    for sizes in meshes:
        bytes_by_kind = Counter()
        for each in found[str(list(sizes))]:
            op, axes = kind_of(each)
            bytes_by_kind[op, axes] += each["bytes"] * each["times"]
            if op == "reduce" and {"fsdp", "context"} <= set(each["axes"]):
                bytes_by_kind[op, "context"] += each["bytes"] * each["times"]
        expected = expected_bytes(sizes)
        for kind, count in expected.items():
            assert bytes_by_kind.pop(kind) == pytest.approx(count, rel=1e-3), (sizes, kind)
        assert sum(bytes_by_kind.values()) < 0.02 * expected["reduce", "fsdp"], bytes_by_kind


def test_the_step_moves_what_the_design_names():
    check((1, 4, 1, 2))


@pytest.mark.slow
def test_the_step_moves_what_the_design_names_on_other_meshes():
    check((1, 8, 1, 1), (1, 4, 2, 1))


def test_what_travels_has_the_compute_dtype_and_gradients_are_divided_at_once(tmp_path):
    """Read where XLA has divided the program, before a CPU widens it."""
    compile_steps(
        (1, 4, 1, 2),
        xla_flags=f"--xla_dump_to={tmp_path} --xla_dump_hlo_pass_re=spmd-partitioning "
        "--xla_dump_hlo_module_re=jit_step",
        **{
            "model.compute_dtype": "bfloat16",
            "model.layer_kinds": ("local", "global"),
            "data.sequence_length": 1024,
            "data.batch_size": 8,
        },
    )
    (dump,) = tmp_path.glob("*after_spmd-partitioning*.txt")
    hlo = dump.read_text()
    mesh = dict(zip(MESH_AXES, (1, 4, 1, 2), strict=True))
    wide = {
        shape
        for each in collectives(hlo, mesh)
        for shape in each.shapes
        if shape.startswith("f32[") and "," in shape
    }
    assert not wide
    # A GPU makes a reduce-scatter of a sum that is only sliced.
    sums = re.findall(r"(%all-reduce[.\d]*) = bf16\[[^ ]* all-reduce\(%dot", hlo)
    users = [re.findall(rf"= .* ([a-z-]+)\({re.escape(name)}[,)]", hlo) for name in sums]
    assert users.count(["dynamic-slice"]) == 13
    assert users.count(["all-reduce"]) == len(users) - 13  # latents, whole on every device

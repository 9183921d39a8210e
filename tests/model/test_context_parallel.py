"""Rows shared by several devices: how they are cut, and that every layer computes what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType

from asa_jax.context_parallel import place_rows, placement, row_multiple, row_order
from asa_jax.errors import ConfigError
from asa_jax.sharding import MESH_AXES, check_groups
from pallas_kernels import dispatch
from tests.model.layer_cases import inputs, make_case

PROJECT = Path(__file__).resolve().parent.parent.parent
# Layers of context_mesh.py, and meshes (data, fsdp, tensor, context).
FIRST = {
    "full": [[1, 1, 1, 8]],
    "mla": [[1, 1, 2, 4]],
    "sliding": [[1, 1, 1, 8]],
    "local": [[1, 2, 2, 2]],
    "global": [[1, 1, 2, 4]],
    "nsa_paper": [[2, 1, 1, 2]],
}
REST = {
    "full": [[1, 1, 1, 2], [1, 1, 2, 4]],
    "mla": [[1, 1, 1, 2], [1, 1, 1, 8]],
    "sliding": [[1, 2, 2, 2], [1, 1, 2, 4]],
    "sliding_far": [[1, 1, 1, 8]],
    "local": [[1, 1, 1, 8], [2, 1, 1, 4]],
    "local_far": [[1, 1, 1, 8]],
    "global": [[1, 1, 4, 2], [1, 1, 1, 8]],
    "global_one_latent": [[2, 1, 4, 1]],
    "global_eight_heads": [[1, 1, 2, 2]],
    "nsa": [[1, 2, 2, 2], [1, 1, 1, 8]],
    "nsa_shared": [[1, 1, 1, 4]],
    "nsa_paper": [[1, 1, 2, 4], [1, 1, 1, 8]],
    "nsa_no_window": [[1, 1, 1, 8]],
    "nsa_no_selection": [[1, 1, 1, 8]],
    "nsa_window_only": [[1, 1, 1, 4]],
}


def check(cases):
    done = subprocess.run(
        [sys.executable, "-m", "tests.model.context_mesh", json.dumps(cases)],
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8 "
            "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        },
        cwd=PROJECT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results) == sum(map(len, cases.values()))
    wrong = {
        name: errors
        for name, errors in results.items()
        if not all(error < 1e-5 for error in errors.values())
    }
    assert not wrong


def test_each_kind_of_layer_equals_one_device():
    check(FIRST)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_layer_equals_one_device_on_2_4_and_8():
    check(REST)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("local", (1, 2, 2, 1)),
        ("local", (1, 1, 2, 2)),
        ("mla", (1, 1, 2, 2)),
        ("global", (2, 1, 2, 1)),
        ("global", (1, 1, 2, 2)),
    ],
)
def test_kernels_lower_for_the_part_of_a_device(kind, sizes, monkeypatch):
    fallbacks = []
    monkeypatch.setattr(dispatch, "is_hopper", lambda: True)
    monkeypatch.setattr(dispatch, "_log_fallback", lambda *reason: fallbacks.append(reason))
    case = make_case(
        kind,
        compute_dtype="bfloat16",
        num_heads=16,
        kv_lora_rank=64,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        group_kv_lora_rank=128,
    )

    def of(array, dtype=None):
        return jax.ShapeDtypeStruct(array.shape, dtype or array.dtype)

    x, row = inputs(case, 2, 128), jax.ShapeDtypeStruct((2, 128), jnp.int32)
    mesh = AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(case.apply).trace(
            jax.tree.map(of, case.params), of(x, jnp.bfloat16), row, row
        )
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "@mosaic_gpu" in text
    assert not fallbacks


class PlacementTest(parameterized.TestCase):
    def test_a_device_holds_an_early_and_a_late_chunk(self):
        parts = placement(16, 4).reshape(4, 2, 2)
        np.testing.assert_array_equal(parts[1], [[2, 3], [12, 13]])
        np.testing.assert_array_equal(parts[3], [[6, 7], [8, 9]])

    @given(context=st.integers(1, 9), size=st.integers(1, 7))
    def test_every_device_has_as_much_causal_work_as_any_other(self, context, size):
        length = 2 * context * size
        visible = (placement(length, context) + 1).reshape(context, -1).sum(axis=1)
        if context > 1:
            np.testing.assert_array_equal(visible, visible[0])
        rows = np.arange(2 * length).reshape(2, -1)
        back = place_rows(rows, context)[:, row_order(length, context)]
        np.testing.assert_array_equal(back, rows)

    def test_chunks_hold_whole_blocks(self):
        self.assertEqual([row_multiple(16, context) for context in (1, 2, 4)], [16, 64, 128])


class LatentGroupsTest(parameterized.TestCase):
    @parameterized.parameters((2, 1), (2, 2), (2, 8), (4, 2), (1, 4))
    def test_groups_that_can_be_shared(self, groups, shards):
        check_groups(groups, shards)

    @parameterized.parameters((3, 2), (2, 3), (4, 6))
    def test_groups_that_cannot(self, groups, shards):
        message = rf"config\.mesh\.tensor = {shards}: .*num_latent_groups = {groups}, .*multiple"
        with self.assertRaisesRegex(ConfigError, message):
            check_groups(groups, shards)

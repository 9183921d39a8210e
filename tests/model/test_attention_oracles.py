"""The attention layers against float64 definitions, and against one another where they must agree.

Global layers work on latents (absorbed), the definition on keys and values of every head; `mla` and
`local` layers expand, the definition absorbs.
"""

import chex
import jax
import numpy as np
from absl.testing import parameterized

from tests.model import naive_attention
from tests.model.layer_cases import (
    LayerCase,
    inputs,
    layer_case,
    make_case,
    run,
)

LENGTH = 118


def _layer_and_oracle(name: str):
    kind = name.split("_")[0]
    case = layer_case(name)
    window = case.cfg.window_size
    oracle = {
        "full": lambda *a: naive_attention.grouped_query(*a, None),
        "sliding": lambda *a: naive_attention.grouped_query(*a, window),
        "mla": lambda *a: naive_attention.absorbed_latent(*a, None),
        "local": lambda *a: naive_attention.absorbed_latent(*a, window),
        "global": naive_attention.expanded_global,
        "nsa": naive_attention.native_sparse,
    }[kind]
    return case, oracle


class OracleTest(parameterized.TestCase):
    @parameterized.named_parameters(
        (name, name)
        for name in (
            "full", "sliding", "mla", "local", "global", "global_one_latent", "nsa", "nsa_shared",
            "nsa_paper",
        )
    )  # fmt: skip
    def test_equals_the_definition(self, name):
        """The layer in float64, save for rotary angles and the softmax of full attention."""
        case, oracle = _layer_and_oracle(name)
        x = inputs(case, 2, LENGTH).astype(np.float64)
        with jax.enable_x64(True):
            outputs = run(case, x)
        assert outputs.dtype == np.float64
        expected = np.stack([oracle(case.params, row, case.cfg) for row in x])
        chex.assert_trees_all_close(outputs, expected, atol=1e-5)


class EquivalenceTest(parameterized.TestCase):
    """Layers of two kinds with the same weights, where one is a special case of the other."""

    @parameterized.product(kinds=(("sliding", "full"), ("local", "mla")), window_size=(LENGTH, 500))
    def test_window_over_the_whole_document_is_full_attention(self, kinds, window_size):
        case, whole = (make_case(kind, window_size=window_size) for kind in kinds)
        x = inputs(case, 2, LENGTH)
        chex.assert_trees_all_close(run(case, x), run(whole, x), atol=1e-5)

    def test_global_layer_that_selects_every_block_is_mla(self):
        case = _all_selected("global", num_latent_groups=1, group_kv_lora_rank=16)
        mla = make_case("mla")
        params = {name: case.params[name] for name in mla.params}
        params["down"] = {"weight": params["down"]["weight"][:, 0]}
        x, case = _open_branch(case, 1)
        chex.assert_trees_all_close(run(case, x), run(mla._replace(params=params), x), atol=1e-5)

    @parameterized.parameters(("selection", 1, "full"), ("window", 2, "sliding"))
    def test_nsa_with_one_open_gate(self, _, branch, kind):
        """Selection of every block is full attention, the window is a sliding window."""
        case = _all_selected("nsa")
        other = make_case(kind)
        params = {name: case.params[name] for name in other.params}
        pair = case.params["key_value"]["weight"][2 * branch : 2 * branch + 2]
        params["key_value"] = {"weight": pair}
        x, case = _open_branch(case, branch)
        chex.assert_trees_all_close(run(case, x), run(other._replace(params=params), x), atol=1e-5)


def _all_selected(kind: str, **overrides: int) -> LayerCase:
    return make_case(kind, num_selected_blocks=-(-LENGTH // 16), **overrides)


def _open_branch(case: LayerCase, branch: int) -> tuple[np.ndarray, LayerCase]:
    """Inputs and a layer whose gates are 1 for the branch and 0 for the others."""
    x = inputs(case, 2, LENGTH)
    x[..., 0] = 1
    gates = np.zeros_like(case.params["gates"]["weight"])
    gates[0] = -100
    gates[0, :, branch] = 100
    return x, case._replace(params={**case.params, "gates": {"weight": gates}})

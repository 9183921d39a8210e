"""The committed configurations: sizes of the tables, equal parameter counts, what they import."""

import functools
import subprocess
import sys
from collections import Counter
from pathlib import Path

import chex
import jax
from absl.testing import parameterized
from flax import nnx

from asa_jax.config import Config, config_from_dict
from asa_jax.model.transformer import abstract_model, count_params
from configs import (
    arms,
    asa_1b,
    asa_340m,
    base,
    full_1b,
    full_340m,
    nsa_1b,
    nsa_340m,
    tiny,
)

PROJECT = Path(__file__).resolve().parent.parent
SIZES = {"tiny": tiny, "340m": asa_340m, "1b": asa_1b}
ALL = [(size, arm) for size, module in SIZES.items() for arm in module.MLP_SIZES]
LARGE = [(size, arm) for size, arm in ALL if size != "tiny"]


@functools.cache
def _config(size: str, arm: str) -> Config:
    return config_from_dict(SIZES[size].get_config(arm).to_dict())


@functools.cache
def _num_params(size: str, arm: str) -> int:
    return count_params(_config(size, arm).model)


class EveryConfigTest(parameterized.TestCase):
    @parameterized.parameters(*ALL)
    def test_is_built_abstractly(self, size, arm):
        """One logical axis name a dimension; the model maps tokens to hidden states."""
        cfg = _config(size, arm).model
        graphdef, shapes, axes = abstract_model(cfg)
        chex.assert_trees_all_equal(
            jax.tree.map(lambda leaf: leaf.ndim, shapes),
            jax.tree.map(len, axes, is_leaf=lambda node: isinstance(node, tuple)),
        )
        self.assertEqual({leaf.dtype.name for leaf in jax.tree.leaves(shapes)}, {"float32"})
        row = jax.ShapeDtypeStruct((1, 128), "int32")
        hidden = jax.eval_shape(
            lambda params, *batch: nnx.merge(graphdef, params)(*batch), shapes, row, row, row
        )
        chex.assert_shape(hidden, (1, 128, cfg.hidden_size))
        self.assertEqual(hidden.dtype, cfg.compute_dtype)

    @parameterized.parameters(*SIZES)
    def test_every_arm_has_every_size(self, size):
        self.assertEqual(set(SIZES[size].MLP_SIZES), set(arms.ARMS))

    @parameterized.parameters(*SIZES)
    def test_unknown_arm(self, size):
        with self.assertRaisesRegex(ValueError, "arm 'fulll': must be one of asa, "):
            SIZES[size].get_config("fulll")

    def test_arms_with_files_of_their_own(self):
        files = {
            ("340m", "full"): full_340m, ("340m", "nsa"): nsa_340m,
            ("1b", "full"): full_1b, ("1b", "nsa"): nsa_1b,
        }  # fmt: skip
        for (size, arm), module in files.items():
            self.assertEqual(config_from_dict(module.get_config().to_dict()), _config(size, arm))

    def test_base_is_a_whole_run(self):
        self.assertEqual(config_from_dict(base.get_config().to_dict()).model.num_layers, 24)

    @parameterized.parameters(*ALL)
    def test_arms_differ_in_the_model_alone(self, size, arm):
        config, asa = _config(size, arm), _config(size, "asa")
        for section in ("data", "optimizer", "training", "mesh", "evaluation"):
            self.assertEqual(getattr(config, section), getattr(asa, section))


class ParameterCountTest(parameterized.TestCase):
    @parameterized.parameters(("340m", 0.01), ("1b", 0.01), ("tiny", 0.03))
    def test_arms_of_a_size_are_equally_large(self, size, tolerance):
        """The paper's NSA summarises blocks with MLPs that a tiny model cannot make up for."""
        counts = {
            arm: _num_params(size, arm)
            for arm in SIZES[size].MLP_SIZES
            if (size, arm) != ("tiny", "nsa_paper")
        }
        self.assertLessEqual(max(counts.values()), (1 + tolerance) * min(counts.values()), counts)

    @parameterized.parameters(("340m", 336.1e6), ("1b", 1213e6))
    def test_full_attention_has_the_stated_number(self, size, expected):
        """Of asa.md, section 3; by hand: embeddings, projections, MLP and norms of each layer."""
        cfg = _config(size, "full").model
        count = _num_params(size, "full")
        self.assertAlmostEqual(count / expected, 1, delta=5e-4)
        width, heads = cfg.hidden_size, 2 * cfg.num_heads + 2 * cfg.num_kv_heads
        layer = width * (heads * cfg.head_dim + 3 * cfg.mlp_size + 2)
        self.assertEqual(count, cfg.num_layers * layer + width * (2 * cfg.vocab_size + 1))

    def test_tiny_has_a_few_million(self):
        self.assertBetween(_num_params("tiny", "asa"), 2e6, 6e6)


class TableTest(parameterized.TestCase):
    """The decisions of the tables for the two sizes of the paper."""

    @parameterized.parameters(
        ("340m", {"hidden_size": 1024, "head_dim": 64, "kv_lora_rank": 256, "qk_nope_head_dim": 64,
                  "qk_rope_head_dim": 32, "v_head_dim": 64, "group_kv_lora_rank": 128}),
        ("1b", {"hidden_size": 2048, "head_dim": 128, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
                "qk_rope_head_dim": 64, "v_head_dim": 128, "group_kv_lora_rank": 256}),
    )  # fmt: skip
    def test_widths(self, size, widths):
        cfg = _config(size, "asa").model
        self.assertEqual({name: getattr(cfg, name) for name in widths}, widths)
        self.assertEqual(cfg.kv_lora_rank, 4 * cfg.head_dim)
        self.assertEqual(cfg.group_kv_lora_rank, 2 * cfg.head_dim)

    @parameterized.parameters(*LARGE)
    def test_what_all_arms_share(self, size, arm):
        config = _config(size, arm)
        cfg = config.model
        self.assertEqual(
            (cfg.num_layers, cfg.num_heads, cfg.num_kv_heads, cfg.vocab_size, cfg.window_size),
            (24, 16, 4, 32000, 512),
        )
        self.assertEqual((cfg.q_lora_rank, cfg.tie_embeddings), (0, False))
        self.assertEqual((cfg.rope_theta, config.data.sequence_length), (1e4, 8192))
        self.assertEqual(
            (cfg.compute_dtype, cfg.norm_epsilon, cfg.init_stddev), ("bfloat16", 1e-6, 0.02)
        )

    @parameterized.parameters(("340m", 15e9), ("1b", 100e9))
    def test_tokens_of_a_run(self, size, tokens):
        config = _config(size, "asa")
        step = config.data.batch_size * config.data.sequence_length
        self.assertAlmostEqual(step * config.training.steps / tokens, 1, delta=0.01)

    @parameterized.parameters(*LARGE)
    def test_blocks(self, size, arm):
        cfg = _config(size, arm).model
        blocks = (cfg.compression_block_size, cfg.compression_stride, cfg.selection_block_size)
        self.assertEqual(blocks, (32, 16, 64) if arm == "nsa_paper" else (16, 16, 16))
        shared = 1 if arm in ("nsa_paper", "asa_one_query") else 4
        self.assertEqual(cfg.queries_per_selection, shared)

    @parameterized.parameters("asa", "asa_latent_per_head", "asa_one_query")
    def test_asa_alternates_from_local_to_global(self, arm):
        for size in SIZES:
            kinds = _config(size, arm).model.layer_kinds
            self.assertEqual(set(kinds[0::2]), {"local"})
            self.assertEqual(set(kinds[1::2]), {"global"})
            self.assertEqual(kinds[-1], "global")

    @parameterized.parameters(
        ("asa", "nsa"), ("asa_latent_per_head", "nsa_shared"), ("alternating", "nsa_no_window")
    )
    def test_selected_tokens_of_the_whole_model_are_equal(self, alternating, every_layer):
        """Half the layers select twice as many blocks: n_ASA = 2 n_NSA."""
        for size in SIZES:
            totals = []
            for arm in (alternating, every_layer):
                cfg = _config(size, arm).model
                kinds = Counter(cfg.layer_kinds)
                totals.append((kinds["global"] + kinds["nsa"]) * cfg.num_selected_blocks)
            self.assertEqual(totals[0], totals[1])
        self.assertEqual(_config("340m", alternating).model.num_selected_blocks, 64)

    def test_latents(self):
        for size in ("340m", "1b"):
            self.assertEqual(_config(size, "asa").model.num_latent_groups, 2)
            self.assertEqual(_config(size, "asa_latent_per_head").model.num_latent_groups, 4)

    @parameterized.parameters(
        ("nsa", ("compression", "selection", "window")),
        ("nsa_no_window", ("compression", "selection")),
        ("nsa_no_selection", ("compression", "window")),
        ("nsa_no_compression", ("window",)),
        ("alternating", ("compression", "selection")),
    )
    def test_branches(self, arm, branches):
        for size in SIZES:
            self.assertEqual(_config(size, arm).model.nsa_branches, branches)

    def test_the_papers_nsa(self):
        cfg = _config("1b", "nsa_paper").model
        self.assertEqual((cfg.num_selected_blocks, cfg.window_size), (16, 512))
        self.assertEqual((cfg.nsa_compression, cfg.nsa_share_kv), ("mlp", False))


def test_config_files_import_ml_collections_alone():
    """A wrong flag is told before jax is loaded, so a config file must not load it."""
    program = """
import sys
from configs import asa_1b, asa_340m, full_1b, full_340m, nsa_1b, nsa_340m, tiny
for module in (asa_1b, asa_340m, full_1b, full_340m, nsa_1b, nsa_340m, tiny):
    module.get_config()
loaded = {name.split('.')[0] for name in sys.modules}
print(*sorted(loaded & {'jax', 'flax', 'asa_jax', 'pallas_kernels'}))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=PROJECT, check=True
    )
    assert result.stdout.strip() == ""

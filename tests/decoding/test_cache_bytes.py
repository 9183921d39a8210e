"""The cache report against allocated arrays, and what it must say of ASA."""

import json

import jax
import pytest
from absl.testing import parameterized
from flax import nnx

from asa_jax.decoding import cache
from asa_jax.decoding.cache_bytes import allocated_bytes, cache_report
from asa_jax.decoding.cache_options import Options, preset_comparisons, with_baselines
from asa_jax.model.transformer import abstract_model
from tests.decoding.kind_cases import CASES
from tests.models import random_params, tiny_model_config

PRESETS = preset_comparisons()
LENGTHS = tuple(2**n for n in range(11, 21))


class CacheBytesTest(parameterized.TestCase):
    @parameterized.named_parameters((name, *case) for name, case in CASES.items())
    def test_equals_allocated_arrays(self, kinds, overrides):
        cfg = tiny_model_config(kinds, **overrides)
        model = nnx.merge(abstract_model(cfg)[0], random_params(cfg))
        for length in (7, 40, 64):
            arrays = jax.tree.leaves(model.init_cache(1, length))
            nbytes = sum(array.nbytes for array in arrays)
            size = cache_report(cfg, [length])[0].whole.allocated
            self.assertEqual(size.total + size.lists, nbytes)
            self.assertEqual(allocated_bytes(cfg, 3, length), 3 * nbytes)

    @parameterized.product(size=("asa_340m", "asa_1b"), arm=("nsa", "nsa_shared"))
    def test_asa_is_at_most_half_of_nsa_and_soon_less(self, size, arm):
        asa, nsa = (cache_report(PRESETS[size][name], LENGTHS) for name in ("asa", arm))
        for ours, theirs in zip(asa, nsa, strict=True):
            ratio = ours.whole.allocated.total / theirs.whole.allocated.total
            self.assertLessEqual(ratio, 0.3 if ours.length >= 2**16 else 0.5, ours.length)

    @parameterized.parameters("asa_340m", "asa_1b")
    def test_readings_of_the_paper(self, size):
        (asa, per_head, shared, full) = (
            cache_report(PRESETS[size][name], LENGTHS[:1])[0].whole.unevicted
            for name in ("asa", "asa_latent_per_head", "nsa_shared", "full")
        )
        for baseline in (shared, full):
            self.assertEqual(asa.without_compression, 0.5625 * baseline.without_compression)
            self.assertEqual(asa.tokens, 0.5 * baseline.tokens)
        # Reading (b): a latent for each key/value head, so that a global layer saves nothing.
        self.assertEqual(per_head.tokens, 0.75 * full.tokens)

    def test_bytes_of_a_layer(self):
        """The table of bytes of the 340M model, worked by hand."""
        report = cache_report(PRESETS["asa_340m"]["asa"], [4096])[0]
        layers, tokens = 12, 4096
        each = {kind: size.unevicted for kind, size in report.kinds.items()}
        self.assertEqual(each["local"].without_compression, 576 * layers * tokens)
        self.assertEqual(each["global"].without_compression, 576 * layers * tokens)
        self.assertEqual(each["global"].total, (576 + 36) * layers * tokens)
        self.assertEqual(report.kinds["local"].allocated.total, 576 * layers * 512)
        # 2 latents a layer, 64 blocks each, int32
        self.assertEqual(each["global"].lists, layers * 2 * 64 * 4)

    def test_nothing_is_evicted_within_the_window(self):
        inside, outside = cache_report(tiny_model_config(("sliding",)), [12, 13])
        self.assertEqual(inside.whole.allocated, inside.whole.unevicted)
        self.assertEqual(outside.whole.allocated, inside.whole.allocated)
        self.assertGreater(outside.whole.unevicted.total, outside.whole.allocated.total)


def test_command_prints_and_writes_the_same_numbers(tmp_path, capsys):
    models = with_baselines(tiny_model_config(("local", "global")))
    options = Options({"tiny": models}, (64, 128), tmp_path / "c.json", tmp_path / "c.png")
    cache.main(options)
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "c.json").read_text())
    assert [(row["model"], row["length"]) for row in rows] == [
        (name, length) for name in ("this", "nsa", "nsa_shared", "full") for length in (64, 128)
    ]
    report = cache_report(models["this"], [128])[0]
    assert rows[1]["all_layers"]["allocated"] == report.whole.allocated._asdict()
    assert f"{report.whole.allocated.total / 128 / 2:.1f}" in printed
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("size", PRESETS)
def test_presets_are_compared_with_arms_of_their_size(size):
    derived = with_baselines(PRESETS[size]["asa"])
    for arm in ("nsa", "nsa_shared", "full"):
        ours, theirs = (cache_report(cfg, [8192])[0] for cfg in (derived[arm], PRESETS[size][arm]))
        assert ours.whole.allocated.total == theirs.whole.allocated.total

"""The logits that other tests compare with are those of the transformers at hand."""

import shutil

import chex
import numpy as np
import pytest

from asa_jax.interop.huggingface import load_model
from tests.interop.reference_cases import CASES, REFERENCE, write_model

pytest.importorskip("torch", reason="needs the extra 'hf'")
pytest.importorskip("transformers", reason="needs the extra 'hf'")


@pytest.mark.parametrize("name", CASES)
def test_reference_is_what_transformers_gives(tmp_path, name):
    from tests.interop.make_reference_logits import reference

    tokens, logits = reference(write_model(tmp_path, CASES[name]))
    with np.load(REFERENCE) as arrays:
        np.testing.assert_array_equal(arrays[f"{name}/tokens"], tokens)
        np.testing.assert_allclose(arrays[f"{name}/logits"], logits, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_what_transformers_saves_is_imported(tmp_path, name):
    import transformers

    given, saved = tmp_path / "given", tmp_path / "saved"
    given.mkdir()
    write_model(given, CASES[name])
    model = transformers.AutoModelForCausalLM.from_pretrained(given, dtype="float32")
    model.save_pretrained(saved)
    shutil.copy(given / "tokenizer.json", saved)
    cfg, params, _ = load_model(given)
    saved_cfg, saved_params, _ = load_model(saved)
    assert saved_cfg == cfg
    chex.assert_trees_all_equal(saved_params, params)

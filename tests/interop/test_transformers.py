"""The logits that other tests compare with are those of the transformers at hand."""

import numpy as np
import pytest

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

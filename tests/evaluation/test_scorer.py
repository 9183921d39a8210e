"""Packed, bucketed, chunked scoring against plain logits of one sequence at a time."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from asa_jax.config import MeshConfig
from asa_jax.decoding.generate import Generator
from asa_jax.decoding.settings import Sampling
from asa_jax.errors import ConfigError, DataError
from asa_jax.evaluation.samples import Sample, score_samples
from asa_jax.evaluation.scorer import Scorer, fill_batch, pack_rows
from asa_jax.model.transformer import abstract_model
from asa_jax.sharding import make_mesh
from tests.models import random_params

pytestmark = pytest.mark.usefixtures("fast_compilation")
SIZES = (2, 17, 18, 40, 65, 120, 5)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=1, fsdp=-1, tensor=1, context=1))


@pytest.fixture(scope="module")
def sequences():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 257, size).astype(np.int32) for size in SIZES]


def _direct_scores(model_config, params, sequences):
    """The definition: whole logits of an unpacked row, padded at its end."""
    graphdef, _, _ = abstract_model(model_config)

    @jax.jit
    def logits(params, inputs):
        model = nnx.merge(graphdef, params)
        segment_ids = jnp.ones_like(inputs)
        hidden = model(inputs, jnp.arange(inputs.shape[1])[None], segment_ids)
        return hidden @ model.unembedding()

    results = []
    for sequence in sequences:
        size = len(sequence) - 1
        inputs = np.zeros((1, 128), np.int32)
        inputs[0, :size] = sequence[:-1]
        own, targets = logits(params, inputs)[0, :size], sequence[1:]
        nll = optax.softmax_cross_entropy_with_integer_labels(own, targets)
        results.append((np.asarray(nll), np.asarray(jnp.argmax(own, axis=-1) == targets)))
    return results


@pytest.mark.parametrize("kinds", [("local", "global"), ("full",)])
def test_equals_plain_logits(kinds, make_config, tokenizer, mesh, sequences):
    config = make_config(kinds)
    params = random_params(config.model)
    scorer = Scorer(config, params, tokenizer, mesh)
    counted = []
    scorer.on_tokens = counted.append
    found = scorer.score(sequences)
    expected = _direct_scores(config.model, params, sequences)
    for score, (nll, correct), size in zip(found, expected, SIZES, strict=True):
        chex.assert_shape([score.nll, score.correct], (size - 1,))
        chex.assert_trees_all_close(score.nll, nll, rtol=1e-4, atol=1e-4)
        chex.assert_trees_all_equal(score.correct, correct)
    assert any(score.correct.any() for score in found)
    assert sum(counted) == sum(SIZES) - len(SIZES)

    # Other sequences that fill as many rows run what is compiled.
    scorer.score([sequences[5][:size] for size in (110, 90, 100, 20)])
    assert scorer._score._cache_size() == 1


def test_an_answer_is_right_exactly_if_greedy_decoding_gives_it(make_config, tokenizer, mesh):
    """The claim that lets retrieval do without a decoder, against the cached decoder."""
    config = make_config(("local",))
    params = random_params(config.model)
    prompt = list(b"a prompt of some length")
    generator = Generator(config, params, tokenizer)
    drawn = generator.stream_tokens([prompt], max_tokens=20, sampling=Sampling(temperature=0))
    answer = np.concatenate([tokens[0] for tokens in drawn])
    chex.assert_shape(answer, (20,))

    samples = []
    for wrong in (None, 0, 11, 19):
        tokens = np.array([*prompt, *answer], np.int32)
        if wrong is not None:
            tokens[len(prompt) + wrong] = (tokens[len(prompt) + wrong] + 1) % 257
        samples.append(Sample(tokens, (slice(len(prompt), len(tokens)),)))
    scores = score_samples(Scorer(config, params, tokenizer, mesh), samples)
    assert [score.exact for score in scores] == [1, 0, 0, 0]


def test_a_token_outside_the_vocabulary_is_named(make_config, tokenizer, mesh):
    scorer = Scorer(make_config(), {}, tokenizer, mesh)
    for bad in (-1, 260):
        with pytest.raises(DataError, match=f"sequence 1: token id {bad}"):
            scorer.score([np.array([1, 2]), np.array([3, bad])])
    assert scorer.score([]) == []


def test_a_tokenizer_larger_than_the_model_is_refused(make_config, mesh, tokenizer):
    config = make_config()
    larger = type("Larger", (), {"vocab_size": 261})()
    with pytest.raises(ConfigError, match=r"config\.model\.vocab_size = 260: must be at least 261"):
        Scorer(config, {}, larger, mesh)


@given(
    sizes=st.lists(st.integers(1, 64), min_size=1, max_size=40),
    alignment=st.sampled_from([1, 8, 16]),
)
def test_rows_hold_every_sequence_once_aligned_and_apart(sizes, alignment):
    rows = pack_rows(sizes, 64, alignment)
    assert sorted(index for row in rows for index, _ in row) == list(range(len(sizes)))
    for row in rows:
        taken = np.zeros(64, int)
        for index, start in row:
            assert start % alignment == 0
            assert start + sizes[index] <= 64
            taken[start : start + sizes[index]] += 1
        assert taken.max() == 1


def test_a_batch_holds_inputs_targets_and_positions_of_each_segment():
    batch = fill_batch([np.array([5, 6, 7]), np.array([8, 9])], [[(0, 0), (1, 4)], []], 8)
    chex.assert_trees_all_equal(batch.inputs[0], np.array([5, 6, 0, 0, 8, 0, 0, 0]))
    chex.assert_trees_all_equal(batch.targets[0], np.array([6, 7, 0, 0, 9, 0, 0, 0]))
    chex.assert_trees_all_equal(batch.positions[0], np.array([0, 1, 0, 0, 0, 0, 0, 0]))
    chex.assert_trees_all_equal(batch.segment_ids[0], np.array([1, 1, 0, 0, 2, 0, 0, 0]))
    assert not batch.segment_ids[1].any()

"""The generator: greedy text against the forward pass, seeds, ends of documents, limits."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from asa_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from asa_jax.decoding import steps
from asa_jax.decoding.generate import Generator
from asa_jax.decoding.settings import Sampling
from asa_jax.decoding.steps import Drawn
from asa_jax.errors import ConfigError, UserError
from asa_jax.flags import PROJECT
from asa_jax.model.transformer import abstract_model
from tests.models import QUICK_COMPILE, random_params

TOKENIZER = ByteTokenizer()
END = TOKENIZER.end_of_document_id
GREEDY = Sampling(temperature=0)
LONG = "\u00e9" * 40
# One batch shape for all tests of the generator.
PROMPTS = ("", "It", "It is a truth", "universally acknowledged, that", LONG)


@pytest.fixture(scope="module")
def generator(make_config):
    config = make_config()
    return Generator(config, random_params(config.model), TOKENIZER)


class Scripted(Generator):
    """Draws the bytes it is told."""

    def __init__(self, *rows, chunk=3):
        self.tokenizer, self._rows, self._chunk = TOKENIZER, rows, chunk

    def _draw(self, prompts, max_tokens, sampling, seed, **kwargs):
        rows = np.array([(*row, *[ord("x")] * max_tokens)[:max_tokens] for row in self._rows])
        for first in range(0, max_tokens, self._chunk):
            tokens = rows[:, first : first + self._chunk]
            nothing = np.zeros((*tokens.shape, 0))
            yield Drawn(tokens, tokens / -256, nothing, nothing, tokens.shape[1])


def _tokens(generator, prompts, max_tokens, **kwargs):
    drawn = generator.stream_tokens(prompts, max_tokens=max_tokens, **kwargs)
    return np.concatenate(list(drawn), axis=1)


def test_greedy_tokens_and_log_probabilities_are_those_of_full_forwards(make_config, generator):
    # From before the first complete block to behind the second.
    request = {"max_tokens": 40, "sampling": GREEDY, "num_alternatives": 2}
    completions = generator.complete(PROMPTS, **request)

    cfg = make_config().model
    prompts = [generator.encode_prompt(text) for text in PROMPTS]
    rows = [
        [*prompt, *completion.tokens]
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    length = max(map(len, rows))
    inputs = jnp.array([row + [0] * (length - len(row)) for row in rows])
    positions = jnp.broadcast_to(jnp.arange(length), inputs.shape)

    def predict(params):
        model = nnx.merge(abstract_model(cfg)[0], params)
        logits = model(inputs, positions, jnp.ones_like(inputs)) @ model.unembedding()
        return jax.lax.top_k(jax.nn.log_softmax(logits[..., : TOKENIZER.vocab_size]), 2)

    jitted = jax.jit(predict, compiler_options=QUICK_COMPILE)
    logs, tokens = map(np.asarray, jitted(random_params(cfg)))
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        count = len(completion.tokens)
        assert completion.finish_reason == ("end" if completion.tokens[-1] == END else "length")
        assert count == 40 or completion.finish_reason == "end"
        places = slice(len(prompt) - 1, len(prompt) - 1 + count)
        assert completion.tokens == tokens[row, places, 0].tolist()
        np.testing.assert_allclose(completion.log_probabilities, logs[row, places, 0], atol=1e-4)
        likely = np.array(completion.alternatives)
        np.testing.assert_array_equal(likely[..., 0], tokens[row, places])
        np.testing.assert_allclose(likely[..., 1], logs[row, places], atol=1e-4)


def test_row_depends_on_its_prompt_and_its_seed(generator):
    def draw(*prompts, seed=0):
        sampling = Sampling(0.9, top_p=0.9)
        return generator.generate(prompts, max_tokens=20, sampling=sampling, seed=seed)

    first = draw(*["It"] * 4, LONG)
    assert len(set(first)) == 5  # seeds 0 to 4
    assert draw("Is", LONG, "It", "Is", "It", seed=[9, 4, 3, 7, 1])[1:5:3] == [first[4], first[1]]
    assert draw("Is", LONG, "It", "Is", "It", seed=[9, 4, 3, 7, 1])[2] == first[3]
    assert not set(draw(*["It"] * 4, LONG, seed=5)) & set(first)


def test_more_tokens_begin_with_the_same(generator):
    prompts = [generator.encode_prompt(text) for text in PROMPTS]
    short, long = (_tokens(generator, prompts, n, sampling=Sampling()) for n in (18, 30))
    chex.assert_trees_all_equal(short, long[:, :18])


def test_model_tokens_without_text_are_never_drawn(generator):
    prompts = [generator.encode_prompt(text) for text in PROMPTS]
    drawn = _tokens(generator, prompts, 40, sampling=Sampling(temperature=1e4))
    assert drawn.max() < TOKENIZER.vocab_size


def test_few_programs_are_compiled(make_config, monkeypatch):
    traced = []

    def counted(cfg):
        traced.append(cfg)
        return abstract_model(cfg)

    monkeypatch.setattr(steps, "abstract_model", counted)
    config = make_config(("full",))
    for seed, (length, max_tokens) in enumerate([(1, 5), (3, 33), (17, 30), (31, 17), (48, 1)]):
        generator = Generator(config, random_params(config.model), TOKENIZER)
        sampling = Sampling(0.1 * seed, seed, 1 - 0.1 * seed)
        _tokens(generator, [[7] * length], max_tokens, sampling=sampling, seed=seed)
    assert len(traced) == 3  # `empty_state`, `read_chunk` and `draw_tokens`


def test_text_ends_with_the_document():
    generator = Scripted([*b"one", END, *b"more"], [*b"and another", END])
    parts = list(generator.stream(["a", "b"], max_tokens=30))
    assert ["".join(row) for row in zip(*parts, strict=True)] == ["one", "and another"]
    assert len(parts) == 4  # the last chunk drawn is the one with the last end


def test_text_ends_with_max_tokens():
    assert Scripted(b"abcdef").generate(["-"], max_tokens=5) == ["abcde"]


@pytest.mark.parametrize("chunk", range(1, 6))
@pytest.mark.parametrize(
    ("drawn", "stop", "want", "reason"),
    [
        ("one STOP two", ["STOP"], "one ", "stop"),
        ("one SSTOP two", ["STOP", "one SSTOPS"], "one S", "stop"),
        ("one two two", ["x", "two", "o tw"], "one ", "stop"),  # the first in the text
        ("STOP", ["STOP"], "", "stop"),
        ("one ST", ["STOP"], "one ST", "length"),  # a stop string that never comes is text
        ("one STO|", ["STOP"], "one STO", "end"),
        ("aaab", ["aab"], "a", "stop"),
        ("\u20acb", ["b"], "\u20ac", "stop"),
    ],
)
def test_stop_strings_and_their_parts_are_not_given(chunk, drawn, stop, want, reason):
    text, bar, _ = drawn.partition("|")
    tokens = [*text.encode(), *([END] if bar else [])]
    generator = Scripted(tokens, chunk=chunk)
    parts = [part for (part,) in generator.stream(["-"], max_tokens=len(tokens), stop=stop)]
    assert "".join(parts) == want
    (completion,) = generator.complete(["-"], max_tokens=len(tokens), stop=stop)
    assert (completion.text, completion.finish_reason) == (want, reason)
    # What ended the text belongs to the tokens, what follows does not.
    ends = [drawn.find(text) + len(text) for text in stop if text in drawn]
    taken = drawn[: min(ends)].encode() if ends else tokens
    assert completion.tokens == [*taken]
    assert completion.log_probabilities == [token / -256 for token in completion.tokens]


def test_everything_is_one_dispatch_where_nothing_streams(generator, monkeypatch):
    dispatched, draw = [], generator.runner.draw

    def counted(state, draws, num_steps, **kwargs):
        dispatched.append(num_steps)
        return draw(state, draws, num_steps, **kwargs)

    monkeypatch.setattr(generator.runner, "draw", counted)
    generator.complete(PROMPTS, max_tokens=40, sampling=GREEDY, num_alternatives=2)
    assert dispatched == [40]
    parts = generator.stream(PROMPTS, max_tokens=40, sampling=GREEDY)
    next(parts)
    assert dispatched == [40, 16, 16]  # the next is under way while the caller has the first
    list(parts)
    assert dispatched == [40, 16, 16, 8]


def test_no_more_alternatives_than_tokens():
    few = Scripted([])
    few.tokenizer = ByteTokenizer()
    few.tokenizer.vocab_size = 3
    with pytest.raises(ConfigError, match="alternatives = 4: must be at most 3, the tokens of"):
        few.complete(["-"], max_tokens=1, num_alternatives=4)


@pytest.mark.parametrize("chunk", range(1, 6))
def test_characters_come_whole(chunk):
    text = "a\u00e9\u20ac\U0001f600z"
    parts = list(Scripted(text.encode(), chunk=chunk).stream(["\u00e9"], max_tokens=11))
    assert "".join(part for (part,) in parts) == text
    assert not any("\ufffd" in part for (part,) in parts)


def test_character_that_never_ends_is_replaced():
    assert Scripted("a\u20ac".encode()).generate(["-"], max_tokens=3) == ["a\ufffd"]
    cut = [*"\u20ac".encode()[:2], END]
    assert Scripted(cut).generate(["-"], max_tokens=9) == ["\ufffd"]


def test_continuation_keeps_its_first_space(make_config):
    tokenizer = load_tokenizer(PROJECT / "texts" / "tokenizer.json")
    generator = Scripted(tokenizer.encode(" word"))
    generator.tokenizer = tokenizer
    count = len(tokenizer.encode(" word"))
    assert generator.generate(["a"], max_tokens=count) == [" word"]


def test_empty_prompt_is_a_line_break(generator):
    assert generator.encode_prompt("") == list(b"\n")


def test_tokenizer_must_fit_the_model(make_config):
    with pytest.raises(ConfigError, match=r"config\.model\.vocab_size = 256: must be at least 257"):
        Generator(make_config(("full",), vocab_size=256), {}, TOKENIZER)


@pytest.mark.parametrize(
    ("rows", "max_tokens", "error", "message"),
    [
        (1, 2**20 - 1, ConfigError, "max_tokens = 1048575: must be at most 1048576 together"),
        (100_000, 2**19, UserError, r"out of memory: caches of 100000 x 557056 tokens take"),
        (1, 0, ConfigError, "max_tokens = 0"),
    ],
)
def test_requests_that_cannot_be_met(generator, rows, max_tokens, error, message):
    with pytest.raises(error, match=message):
        generator.stream(["It"] * rows, max_tokens=max_tokens)


def test_memory_that_gives_out_is_told(generator, monkeypatch):
    def exhausted(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

    monkeypatch.setattr("asa_jax.decoding.runner.read_chunk", exhausted)
    with pytest.raises(UserError, match="out of memory: shorten the prompt"):
        next(generator.stream(["It"], max_tokens=3))

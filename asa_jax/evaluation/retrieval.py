"""Needles in haystacks, in the manner of RULER (Hsieh et al., 2024), with texts of our own.

Each task makes one sample of a given length from a random generator; `single_*` and `multi_key` put
the needle that is asked for at a given depth, the others spread theirs.
"""

import glob
import itertools
import random
import re
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from asa_jax.data.sources import find_files, read_documents
from asa_jax.data.tokenizer import Tokenizer
from asa_jax.errors import DataError
from asa_jax.evaluation.samples import Needle, Question, Sample, assemble

NUM_KEYS = 4
NUM_VALUES = 4
CHAIN_VARIABLES = 4
NUM_FREQUENT_WORDS = 3
# Each round of words holds the frequent ones 3, 2 and 1 times among as many rare ones. After three
# rounds a cut anywhere in the next leaves their order by count strict.
ROUND_COUNTS = (3, 2, 1)
ROUND_RARE_WORDS = 6
MIN_ROUNDS = 3
NUM_RARE_WORDS = 200

_NOISE = (
    " The tide comes in.",
    " The tide goes out.",
    " Rain falls on the roof and runs into the barrel.",
    " A cart passes, and then it is quiet again.",
    " Nothing else happens.",
)
_ADJECTIVES = (
    "amber", "azure", "brittle", "bronze", "calm", "clever", "copper", "crooked", "dusty",
    "eager", "faded", "frosty", "gentle", "gilded", "hidden", "hollow", "humble", "idle",
    "ivory", "jolly", "lonely", "lucky", "marble", "mellow", "misty", "narrow", "nimble",
    "noble", "pale", "patient", "purple", "quiet", "restless", "rusty", "scarlet", "silent",
    "silver", "sleepy", "solemn", "spotted", "stubborn", "sturdy", "tangled", "velvet",
    "wandering", "weary", "wooden", "yellow",
)  # fmt: skip
_NOUNS = (
    "anchor", "bakery", "basket", "beacon", "bridge", "candle", "carriage", "castle", "cellar",
    "chapel", "compass", "cottage", "fountain", "garden", "goose", "harbour", "hedgehog",
    "horse", "kettle", "ladder", "lantern", "library", "lighthouse", "meadow", "mill", "mirror",
    "monastery", "orchard", "otter", "owl", "parcel", "piano", "quarry", "raven", "river",
    "saddle", "sailor", "shepherd", "spindle", "station", "tailor", "teapot", "tower",
    "umbrella", "violin", "wagon", "walnut", "windmill",
)  # fmt: skip
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"

_INTRO = "Some facts to remember are hidden in the following text.\n\n"
_FACT = " Remember this: the {kind} of the {key} is {value}."
_QUESTION = "\n\nQuestion: What is the {kind} of the {key}?\nAnswer: The {kind} of the {key} is"


class Haystack:
    """Filler for needles: sentences of a text, or noise.

    Attributes:
        tokenizer: of the run.
    """

    def __init__(self, tokenizer: Tokenizer, text: str, name: str) -> None:
        """Splits and tokenizes the text.

        Args:
            tokenizer: of the run.
            text: prose; its sentences are the filler.
            name: where the text is from, for messages.

        Raises:
            DataError: the text holds no words.
        """
        sentences = re.split(r"(?<=[.!?\"\u201d\u2019])\s+", text.strip())
        if not sentences[0]:
            raise DataError(f"{name}: is empty; give a text of some pages as filler")
        self.tokenizer = tokenizer
        spaced = [" " + " ".join(sentence.split()) for sentence in sentences]
        self._sentences = [ids.astype(np.int32) for ids in tokenizer.encode_batch(spaced)]
        self._noise = [ids.astype(np.int32) for ids in tokenizer.encode_batch(_NOISE)]

    def text(self, rng: random.Random) -> Iterator[np.ndarray]:
        """Sentences from a random one on, from the start again after the last, without end."""
        start = rng.randrange(len(self._sentences))
        return itertools.chain(self._sentences[start:], itertools.cycle(self._sentences))

    def noise(self) -> Iterator[np.ndarray]:
        """The same few sentences over and over."""
        return itertools.cycle(self._noise)


def read_haystack(path: Path, tokenizer: Tokenizer) -> Haystack:
    """Reads the filler from a .txt, .jsonl (field `text`) or .parquet file.

    Raises:
        DataError: it cannot be read or holds no words.
    """
    (file,) = find_files([glob.escape(str(path))])
    texts = [document.text for document in read_documents(file, "text")]
    return Haystack(tokenizer, "\n".join(texts), str(path))


def single_noise(rng: random.Random, haystack: Haystack, length: int, depth: float) -> Sample:
    """One number in repeated noise."""
    return _ask_one(rng, haystack.noise(), haystack.tokenizer, length, "number", [depth])


def single_text(rng: random.Random, haystack: Haystack, length: int, depth: float) -> Sample:
    """One number in prose."""
    return _ask_one(rng, haystack.text(rng), haystack.tokenizer, length, "number", [depth])


def single_word(rng: random.Random, haystack: Haystack, length: int, depth: float) -> Sample:
    """One invented word in prose."""
    return _ask_one(rng, haystack.text(rng), haystack.tokenizer, length, "word", [depth])


def single_uuid(rng: random.Random, haystack: Haystack, length: int, depth: float) -> Sample:
    """One UUID in prose."""
    return _ask_one(rng, haystack.text(rng), haystack.tokenizer, length, "code", [depth])


def multi_key(rng: random.Random, haystack: Haystack, length: int, depth: float) -> Sample:
    """One number among others of other keys, in prose."""
    depths = [depth] + [rng.random() for _ in range(NUM_KEYS - 1)]
    return _ask_one(rng, haystack.text(rng), haystack.tokenizer, length, "number", depths)


def multi_value(rng: random.Random, haystack: Haystack, length: int, depth: float) -> Sample:
    """All numbers of one key, in the order of the text."""
    (key,) = _keys(rng, 1)
    values = [_number(rng) for _ in range(NUM_VALUES)]
    depths = sorted(rng.random() for _ in values)
    needles = [
        Needle(depth, _FACT.format(kind="number", key=key, value=value))
        for depth, value in zip(depths, values, strict=True)
    ]
    prompt = f"\n\nQuestion: Which numbers does the text give for the {key}, in its order?\nAnswer:"
    return assemble(
        haystack.tokenizer, intro=_INTRO, filler=haystack.text(rng), needles=needles,
        questions=_list_questions(prompt, values), length=length,
    )  # fmt: skip


def multi_query(rng: random.Random, haystack: Haystack, length: int, depth: float) -> Sample:
    """The numbers of several keys, asked for one after the other."""
    facts = [(key, _number(rng)) for key in _keys(rng, NUM_KEYS)]
    needles = [
        Needle(rng.random(), _FACT.format(kind="number", key=key, value=value))
        for key, value in facts
    ]
    questions = [
        Question(_QUESTION.format(kind="number", key=key), f" {value}") for key, value in facts
    ]
    return assemble(
        haystack.tokenizer, intro=_INTRO, filler=haystack.text(rng), needles=needles,
        questions=questions, length=length,
    )  # fmt: skip


def variable_tracking(rng: random.Random, haystack: Haystack, length: int, depth: float) -> Sample:
    """The variables that a chain of assignments gives one value, beside a chain of another."""
    names = ["".join(rng.sample("BCDFGHJKLMNPQRSTVWXZ", 3)) for _ in range(2 * CHAIN_VARIABLES)]
    if len(set(names)) < len(names):
        return variable_tracking(rng, haystack, length, depth)
    chains = names[:CHAIN_VARIABLES], names[CHAIN_VARIABLES:]
    values = rng.sample(range(10_000, 100_000), 2)
    needles = [
        Needle(depth, f" Let {name} equal {source}.")
        for chain, value in zip(chains, values, strict=True)
        for depth, name, source in zip(
            sorted(rng.random() for _ in chain), chain, [value, *chain], strict=False
        )
    ]
    prompt = f"\n\nQuestion: Which variables equal {values[0]}?\nAnswer:"
    return assemble(
        haystack.tokenizer, intro="Variables are set in the following text.\n\n",
        filler=haystack.noise(), needles=needles,
        questions=_list_questions(prompt, chains[0]), length=length,
    )  # fmt: skip


def frequent_words(rng: random.Random, haystack: Haystack, length: int, depth: float) -> Sample:
    """The most frequent of many invented words, from the first on."""
    words = invented_words(rng, NUM_FREQUENT_WORDS + NUM_RARE_WORDS)
    frequent, rare = words[:NUM_FREQUENT_WORDS], words[NUM_FREQUENT_WORDS:]
    spaced = haystack.tokenizer.encode_batch([f" {word}" for word in words])
    tokens = {word: ids.astype(np.int32) for word, ids in zip(words, spaced, strict=True)}
    longest = max(map(len, spaced))
    prompt = "\n\nQuestion: Which three words are the most frequent?\nAnswer:"
    return assemble(
        haystack.tokenizer, intro="Count how often each of these words occurs.\n\n",
        filler=(tokens[word] for word in _word_rounds(rng, frequent, rare)), needles=(),
        questions=_list_questions(prompt, frequent), length=length,
        min_filler_tokens=MIN_ROUNDS * (sum(ROUND_COUNTS) + ROUND_RARE_WORDS) * longest,
    )  # fmt: skip


def invented_words(rng: random.Random, count: int) -> list[str]:
    """Different words of three open syllables, in random order."""
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(3))] = None
    return list(words)


def random_uuid(rng: random.Random) -> str:
    """A random UUID from the given generator."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _ask_one(
    rng: random.Random,
    filler: Iterator[np.ndarray],
    tokenizer: Tokenizer,
    length: int,
    kind: str,
    depths: list[float],
) -> Sample:
    """Hides one fact at each depth and asks for the first."""
    keys = _keys(rng, len(depths))
    values = [_value(rng, kind) for _ in keys]
    needles = [
        Needle(depth, _FACT.format(kind=kind, key=key, value=value))
        for depth, key, value in zip(depths, keys, values, strict=True)
    ]
    question = Question(_QUESTION.format(kind=kind, key=keys[0]), f" {values[0]}")
    return assemble(
        tokenizer, intro=_INTRO, filler=filler, needles=needles, questions=[question], length=length
    )


def _keys(rng: random.Random, count: int) -> list[str]:
    pairs = rng.sample(range(len(_ADJECTIVES) * len(_NOUNS)), count)
    return [f"{_ADJECTIVES[pair // len(_NOUNS)]} {_NOUNS[pair % len(_NOUNS)]}" for pair in pairs]


def _value(rng: random.Random, kind: str) -> str:
    match kind:
        case "code":
            return random_uuid(rng)
        case "word":
            return invented_words(rng, 1)[0]
        case _:
            return _number(rng)


def _number(rng: random.Random) -> str:
    return str(rng.randrange(1_000_000, 10_000_000))


def _list_questions(prompt: str, answers: list[str]) -> list[Question]:
    """One question whose answers follow one another, the commas given."""
    prompts = [prompt] + [","] * (len(answers) - 1)
    return [Question(text, f" {answer}") for text, answer in zip(prompts, answers, strict=True)]


def _word_rounds(rng: random.Random, frequent: list[str], rare: list[str]) -> Iterator[str]:
    rare_words = itertools.cycle(rare)
    while True:
        words = [
            word for word, count in zip(frequent, ROUND_COUNTS, strict=True) for _ in range(count)
        ]
        words += itertools.islice(rare_words, ROUND_RARE_WORDS)
        rng.shuffle(words)
        yield from words

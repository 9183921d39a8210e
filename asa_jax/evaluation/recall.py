"""Associative recall: key-value pairs, then the values of some keys.

Multi-query associative recall (MQAR; Arora et al., 2023) as text, and the key-value retrieval over
UUIDs of "Lost in the Middle" (Liu et al., 2023), generated or from its published files.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from asa_jax.data.tokenizer import Tokenizer
from asa_jax.evaluation.json_lines import Line, read_lines
from asa_jax.evaluation.retrieval import Haystack, invented_words, random_uuid
from asa_jax.evaluation.samples import Needle, Question, Sample, assemble, encode, join

NUM_QUERIES = 8

_JSON_INTRO = "The following JSON object maps keys to values.\n\n{"
_JSON_RECORD = '\n"{key}": "{value}",'
_JSON_QUESTION = '\n}}\n\nThe value of the key "{key}" is "'


class KeyValueRecord(NamedTuple):
    """One line of a published file: pairs in order, and the pair that is asked for."""

    pairs: list[tuple[str, str]]
    key: str
    value: str


def associative_recall(rng: random.Random, haystack: Haystack, length: int, depth: float) -> Sample:
    """Pairs of an invented word and a number, then several of the words, each with its number."""
    pairs = _word_pairs(rng)
    queried = [next(pairs) for _ in range(NUM_QUERIES)]
    tokenizer = haystack.tokenizer
    return assemble(
        tokenizer, intro="Words and their numbers:\n",
        filler=(encode(tokenizer, f"\n{word}:{number}") for word, number in pairs),
        needles=[Needle(rng.random(), f"\n{word}:{number}") for word, number in queried],
        questions=[Question(f"\n{word}:", number) for word, number in queried],
        length=length, cut_filler=False,
    )  # fmt: skip


def key_value(rng: random.Random, haystack: Haystack, length: int, depth: float) -> Sample:
    """A JSON object of UUIDs, then the value of the one at `depth`."""
    tokenizer = haystack.tokenizer
    key, value = random_uuid(rng), random_uuid(rng)
    return assemble(
        tokenizer, intro=_JSON_INTRO,
        filler=(encode(tokenizer, record) for record in _random_json_records(rng)),
        needles=[Needle(depth, _JSON_RECORD.format(key=key, value=value))],
        questions=[Question(_JSON_QUESTION.format(key=key), value)],
        length=length, cut_filler=False,
    )  # fmt: skip


def key_value_sample(tokenizer: Tokenizer, record: KeyValueRecord) -> Sample:
    """The prompt of `key_value` for the pairs of a published file."""
    context = [_JSON_INTRO] + [_JSON_RECORD.format(key=k, value=v) for k, v in record.pairs]
    question = Question(_JSON_QUESTION.format(key=record.key), record.value)
    return join(tokenizer, [encode(tokenizer, text) for text in context], [question])


def read_key_value_file(path: Path) -> list[KeyValueRecord]:
    """Reads a .jsonl or .jsonl.gz file with `ordered_kv_records`, `key` and `value` in each line.

    Raises:
        DataError: the file or a line of it is not of that form; names file, line and field.
    """
    return [_key_value_record(line) for line in read_lines(path)]


def _key_value_record(line: Line) -> KeyValueRecord:
    record = KeyValueRecord(line.pairs("ordered_kv_records"), line.text("key"), line.text("value"))
    line.check(
        (record.key, record.value) in record.pairs, "key", "in ordered_kv_records, with the value"
    )
    return record


def _word_pairs(rng: random.Random) -> Iterator[tuple[str, str]]:
    """Words that do not repeat, each with a number of three digits."""
    seen: set[str] = set()
    while True:
        (word,) = invented_words(rng, 1)
        if word not in seen:
            seen.add(word)
            yield word, str(rng.randrange(100, 1000))


def _random_json_records(rng: random.Random) -> Iterator[str]:
    while True:
        yield _JSON_RECORD.format(key=random_uuid(rng), value=random_uuid(rng))

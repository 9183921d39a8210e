"""Trains a byte-level BPE tokenizer on text.

python -m asa_jax.data.train_tokenizer --input 'texts/train/*' --vocab-size 4096 \\
    --output texts/tokenizer.json
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from asa_jax.data.shard_writer import whole_file
from asa_jax.data.sources import find_inputs, read_documents
from asa_jax.errors import ConfigError, DataError, exit_on_user_error

END_OF_DOCUMENT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # the 256 bytes and the end of document


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Byte-level BPE as in GPT-2 (same splitting of text into words), end of document first.

    Args:
        documents: the text to learn merges from.
        vocab_size: tokens, the 256 bytes and the end of document included.

    Returns:
        The tokenizer; the same documents give the same one.

    Raises:
        ConfigError: the vocabulary has no room for every byte.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ConfigError(f"--vocab-size {vocab_size}: must be at least {SMALLEST_VOCABULARY}")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m asa_jax.data.train_tokenizer")
    parser.add_argument("--input", nargs="+", required=True, help="files or quoted globs")
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True, help="the tokenizer.json to write")
    parser.add_argument("--text-field", default="text", help="field of JSONL and Parquet records")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    options = _parse(arguments)
    texts = (
        record.text
        for file in find_inputs(options.input)
        for record in read_documents(file.name, options.text_field)
    )
    tokenizer = train_tokenizer(texts, options.vocab_size)
    learned = tokenizer.get_vocab_size()
    if learned < options.vocab_size:
        raise DataError(f"the text gives only {learned} tokens: add text or lower --vocab-size")
    try:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(options.output) as file:
            file.write(tokenizer.to_str().encode())
    except OSError as error:
        raise DataError(f"{options.output}: cannot be written ({error.strerror})") from None
    print(f"{options.output}: {learned} tokens")


if __name__ == "__main__":
    with exit_on_user_error():
        main()

"""Prompts from files; imports no jax."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from asa_jax.data.tokenizer import Tokenizer
from asa_jax.decoding.settings import MAX_SEED, check_length
from asa_jax.errors import ConfigError, DataError

# Far more text than a model can read; a larger file was not meant.
MAX_PROMPT_BYTES = 2**26
MAX_PROMPTS_BYTES = 2**30


class Prompt(NamedTuple):
    """A line of a file of prompts.

    Attributes:
        line: its number, from 1.
        text: to continue.
        seed: of its draws; None: none is given.
    """

    line: int
    text: str
    seed: int | None


def read_prompt(path: Path, max_bytes: int = MAX_PROMPT_BYTES) -> str:
    """Reads a text as it stands.

    Raises:
        DataError: it cannot be read, is too large or is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if len(content) > max_bytes:
        raise DataError(f"{path}: larger than {max_bytes} bytes, too long for a prompt")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8") from None


def read_prompts(path: Path) -> list[Prompt]:
    """Reads JSON lines such as {"prompt": "It is a truth", "seed": 3}; the seed may be left out.

    Raises:
        DataError: the file cannot be read, or a line is no such object.
    """
    lines = read_prompt(path, MAX_PROMPTS_BYTES).split("\n")
    prompts = [
        _parse(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()
    ]
    if not prompts:
        raise DataError(f"{path}: has no line with a prompt")
    return prompts


def check_prompts(
    path: Path, prompts: Sequence[Prompt], tokenizer: Tokenizer, max_tokens: int
) -> None:
    """Raises a ConfigError that names the first line that is too long to be continued."""
    lengths = map(len, tokenizer.encode_batch([prompt.text for prompt in prompts]))
    for prompt, length in zip(prompts, lengths, strict=True):
        try:
            check_length(len(tokenizer.start_ids) + length, max_tokens)
        except ConfigError as error:
            raise ConfigError(f"{path}:{prompt.line}: {error}") from None


def _parse(path: Path, number: int, line: str) -> Prompt:
    where = f"{path}:{number}"
    try:
        values: Any = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: broken JSON ({error})") from None
    if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
        raise DataError(f'{where}: must be an object with a text, such as {{"prompt": "It is"}}')
    unknown = sorted(set(values) - {"prompt", "seed"})
    if unknown:
        raise DataError(f"{where}: {unknown[0]!r} is not known; known are 'prompt' and 'seed'")
    seed = values.get("seed")
    if seed is not None and (type(seed) is not int or not 0 <= seed <= MAX_SEED):
        raise DataError(f"{where}: seed = {seed!r}: must be an int from 0 to {MAX_SEED}")
    try:
        values["prompt"].encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: character {error.start} of the prompt is no text") from None
    return Prompt(number, values["prompt"], seed)

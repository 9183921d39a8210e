"""Training data of the synthetic tasks: a token folder of samples like those of `eval.py`.

    python -m experiments.tasks --tokens=tokens/long/code --tasks=single_noise,associative_recall \\
        --output=tokens/tasks

Samples are of random lengths and depths, and seeded apart from those of the evaluation; their
filler is `texts/train/emma.txt`, which the evaluation does not use. Lengths are drawn evenly on a
logarithmic scale. What stands before the first answer is a prompt, which is read and not learnt:
most of it is filler and random keys, and answers are a hundredth of a long sample.
"""

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from asa_jax.data import prepare
from asa_jax.data.shards import open_token_folder
from asa_jax.data.tokenizer import Tokenizer
from asa_jax.errors import ConfigError, exit_on_user_error
from asa_jax.evaluation.generated import GENERATED_TASKS
from asa_jax.evaluation.retrieval import read_haystack
from asa_jax.flags import PROJECT

FILLER = PROJECT / "texts" / "train" / "emma.txt"
VALIDATION_SAMPLES = 64


def make_records(
    tokenizer: Tokenizer, tasks: Sequence[str], numbers: range, lengths: tuple[int, int], seed: int
) -> Iterator[dict[str, str]]:
    """Samples of each task in turn.

    Args:
        tokenizer: lengths are in its tokens.
        tasks: names of generated tasks.
        numbers: of the samples, each of which is seeded by its own.
        lengths: the shortest and the longest, in tokens.
        seed: of all samples.

    Returns:
        For each, `prompt` and, from the first answer on, `text`.

    Raises:
        ConfigError: a length is too short for a task.
    """
    haystack = read_haystack(FILLER, tokenizer)
    shortest, longest = lengths
    for number in numbers:
        name = tasks[number % len(tasks)]
        # The evaluation seeds with a number and a name: never with the same text.
        rng = random.Random(f"training {seed} {name} {number}")
        length = round(shortest * (longest / shortest) ** rng.random())
        sample = GENERATED_TASKS[name](rng, haystack, length, rng.random())
        parts = np.split(sample.tokens, [sample.answers[0].start])
        prompt, text = (tokenizer.decode(part.tolist()) for part in parts)
        yield {"prompt": prompt, "text": text}


def run(options: argparse.Namespace) -> None:
    """Writes the texts of both splits and the token folder."""
    tasks = options.tasks.split(",")
    if unknown := sorted(set(tasks) - set(GENERATED_TASKS)):
        raise ConfigError(f"--tasks: '{unknown[0]}' must be of {', '.join(GENERATED_TASKS)}")
    if options.samples < 1 or not 0 < options.min_length <= options.max_length:
        raise ConfigError("--samples and --min_length must be positive, --max_length not below it")
    tokenizer = open_token_folder(options.tokens).tokenizer()
    lengths = (options.min_length, options.max_length)
    options.output.mkdir(parents=True, exist_ok=True)
    splits = {"train": range(options.samples)}
    splits["validation"] = range(options.samples, options.samples + VALIDATION_SAMPLES)
    files = {name: options.output / f"{name}.jsonl" for name in splits}
    for name, numbers in splits.items():
        records = make_records(tokenizer, tasks, numbers, lengths, options.seed)
        files[name].write_text("".join(json.dumps(record) + "\n" for record in records))
    arguments = [
        "--input", str(files["train"]), "--validation-input", str(files["validation"]),
        "--tokenizer", str(options.tokens / "tokenizer.json"), "--output", str(options.output),
        "--prompt-field", "prompt", "--overwrite",
    ]  # fmt: skip
    print(prepare.prepare(prepare.parse(arguments)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m experiments.tasks")
    parser.add_argument("--tokens", type=Path, required=True, help="folder with the tokenizer")
    parser.add_argument("--tasks", required=True, help="names, with commas between")
    parser.add_argument("--output", type=Path, required=True, help="the token folder")
    parser.add_argument("--samples", type=int, default=4000, help="samples of all tasks together")
    parser.add_argument("--min_length", type=int, default=256, help="tokens of a sample")
    parser.add_argument("--max_length", type=int, default=8192, help="tokens of a sample")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    with exit_on_user_error():
        run(parser.parse_args(arguments))


if __name__ == "__main__":
    main()

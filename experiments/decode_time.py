"""Time of a token while one text is continued, with the caches of given contexts.

    python -m experiments.decode_time --config=configs/comparison.py:45m/asa --lengths=8192,32768

Prints JSON. Parameters and the text read are random: neither changes what is computed. Needs the
run's token folders, for their tokenizer.
"""

from absl import flags

from asa_jax.config import Config
from asa_jax.flags import exit_on_error, parse_config_flag, run_command

if __name__ == "__main__":
    flags.DEFINE_list("lengths", ["8192"], "contexts in tokens")
    CONFIG = exit_on_error(parse_config_flag)
    LENGTHS = flags.FLAGS.lengths

import itertools
import json
import statistics
import time

import jax
import numpy as np

from asa_jax.decoding.generate import Generator
from asa_jax.decoding.rows import STREAM_TOKENS
from asa_jax.errors import ConfigError
from asa_jax.model.transformer import init_params
from asa_jax.training.compilation_cache import use_compilation_cache
from asa_jax.training.run_directory import open_sources

WARM_PARTS, TIMED_PARTS = 2, 8


def seconds_per_token(generator: Generator, length: int, vocab_size: int) -> float:
    """Median over dispatches of some tokens each, the first ones left out."""
    prompt = np.random.default_rng(0).integers(0, vocab_size, length).tolist()
    tokens = (WARM_PARTS + TIMED_PARTS) * STREAM_TOKENS
    ends = []
    for _ in generator.stream_tokens([prompt], max_tokens=tokens):
        ends.append(time.perf_counter())
    seconds = [end - start for start, end in itertools.pairwise(ends[WARM_PARTS - 1 :])]
    return statistics.median(seconds) / STREAM_TOKENS


def main(config: Config, lengths: list[str]) -> None:
    """Times each context and prints the record."""
    if not lengths or not all(text.isdecimal() and int(text) for text in lengths):
        raise ConfigError(f"--lengths={','.join(lengths)}: must be positive numbers")
    use_compilation_cache()
    tokenizer = open_sources(config)[0].tokenizer()
    params = jax.jit(init_params, static_argnums=0)(config.model, jax.random.key(0))
    generator = Generator(config, params, tokenizer)
    record = {
        "device": f"{jax.device_count()} {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "seconds_per_token": {
            length: seconds_per_token(generator, int(length), tokenizer.vocab_size)
            for length in lengths
        },
    }
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    run_command(lambda: main(CONFIG, LENGTHS))

"""The command line of `asa_jax.decoding.speed`, checked without jax."""

from typing import NamedTuple

from absl import flags

from asa_jax.config import ModelConfig
from asa_jax.errors import ConfigError
from asa_jax.flags import parse_config_flag

Size = tuple[int, int]  # rows, tokens of each


class Options(NamedTuple):
    """What to measure of an architecture; 0 for what is not asked for."""

    cfg: ModelConfig
    sizes: tuple[Size, ...]
    prefill_tokens: int
    largest_context: int


def parse_options() -> Options:
    """Parses and checks the command line.

    Raises:
        ConfigError: a flag is wrong.
    """
    flags.DEFINE_list("sizes", [], "rows x tokens, such as 32x65536, of steps of decoding")
    flags.DEFINE_integer("prefill_tokens", 0, "tokens of a row to read by chunks", lower_bound=0)
    flags.DEFINE_integer("largest_context", 0, "find the most rows of so many tokens that fit",
                         lower_bound=0)  # fmt: skip
    cfg, given = parse_config_flag().model, flags.FLAGS
    sizes = tuple(map(_size, given.sizes))
    return Options(cfg, sizes, given.prefill_tokens, given.largest_context)


def _size(text: str) -> Size:
    rows, _, tokens = text.partition("x")
    if not (rows.isdecimal() and tokens.isdecimal() and int(rows) > 0 and int(tokens) > 64):
        raise ConfigError(f"--sizes={text}: must be ROWSxTOKENS, more than 64 tokens")
    return int(rows), int(tokens)

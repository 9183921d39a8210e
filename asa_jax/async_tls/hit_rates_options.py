"""The command line of `asa_jax.async_tls.hit_rates`, checked without jax."""

import dataclasses
from pathlib import Path

from absl import flags

from asa_jax.async_tls.command_line import (
    channels_file,
    define_config_flag,
    given_config,
)
from asa_jax.async_tls.fidelity_options import multiples, prefix
from asa_jax.async_tls.settings import NUM_ALWAYS_KEPT, DecodingConfig
from asa_jax.data.tokenizer import Tokenizer
from asa_jax.errors import ConfigError
from asa_jax.flags import parse_arguments
from asa_jax.launch import refuse_many_processes
from asa_jax.run_flags import given_files, given_workdir
from asa_jax.trained_run import load_run_tokenizer, read_run_config

# In front of the steps that are counted: pools start empty. As many as the speed benchmark takes.
WARM_STEPS = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure.

    Attributes:
        workdir: run directory or model folder.
        step: of the checkpoint; None: the newest.
        tokenizer: of the model.
        settings: of AsyncTLS; numbers of blocks are those of `shares`.
        channels: file of calibrated channels.
        text: files of text.
        lengths: tokens of a context, ascending.
        shares: of the blocks of a context, that level 1 keeps.
        num_contexts: of each length.
        tail_tokens: decoded at the end of a context.
        output: path of the report without its suffix.
    """

    workdir: Path
    step: int | None
    tokenizer: Tokenizer
    settings: DecodingConfig
    channels: Path
    text: list[Path]
    lengths: tuple[int, ...]
    shares: tuple[float, ...]
    num_contexts: int
    tail_tokens: int
    output: Path


def parse_options() -> Options:
    """Parses and checks the command line.

    Raises:
        ConfigError: a flag is missing or wrong, or the model is not served.
        CheckpointError: --workdir holds no run.
    """
    _define_flags()
    parse_arguments()
    refuse_many_processes("asa_jax.async_tls.hit_rates")
    given = flags.FLAGS
    workdir = given_workdir()
    settings = given_config(read_run_config(workdir).model)
    block = settings.sizes.block_size
    if not given.text:
        raise ConfigError("--text: missing; give text files to decode")
    if block % 4:
        raise ConfigError(f"config.async_tls.block_size = {block}: must be a multiple of 4 here")
    least = (NUM_ALWAYS_KEPT + 1) * block + given.tail_tokens
    return Options(
        workdir=workdir,
        step=given.step,
        tokenizer=load_run_tokenizer(workdir),
        settings=settings,
        channels=Path(given.channels).expanduser() if given.channels else channels_file(workdir),
        text=given_files("text"),
        lengths=tuple(sorted(multiples("lengths", given.lengths, block, least))),
        shares=_shares(given.shares),
        num_contexts=given.num_contexts,
        tail_tokens=given.tail_tokens,
        output=prefix(given.output or str(workdir / "async_tls_hit_rates")),
    )


def _define_flags() -> None:
    flags.DEFINE_string("workdir", None, "run directory, or model folder")
    flags.DEFINE_integer("step", None, "checkpoint to use; default: the newest", lower_bound=0)
    flags.DEFINE_string("channels", None, "file of channels; default: that of the workdir")
    flags.DEFINE_multi_string("text", [], "text file to decode; may be repeated")
    flags.DEFINE_list("lengths", ["2048", "4096", "8192"], "tokens of a context")
    flags.DEFINE_list("shares", ["0.085", "0.125", "0.25"], "of all blocks, that level 1 keeps")
    flags.DEFINE_integer("num_contexts", 2, "contexts of each length", lower_bound=1)
    flags.DEFINE_integer(
        "tail_tokens", 256, "decoded at the end of a context", lower_bound=2 * WARM_STEPS
    )
    flags.DEFINE_string("output", None, "report without suffix; default: in the workdir")
    define_config_flag()


def _shares(given: list[str]) -> tuple[float, ...]:
    try:
        shares = tuple(map(float, given))
    except ValueError:
        shares = ()
    if not shares or not all(0 < share < 1 for share in shares):
        raise ConfigError(f"--shares={','.join(given)}: must be numbers between 0 and 1")
    return shares

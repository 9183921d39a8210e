"""The command line of `asa_jax.async_tls.calibrate`, checked without jax."""

from pathlib import Path
from typing import NamedTuple

from absl import flags

from asa_jax.async_tls.command_line import (
    channels_file,
    define_config_flag,
    given_config,
)
from asa_jax.async_tls.settings import DecodingConfig
from asa_jax.data.tokenizer import Tokenizer
from asa_jax.errors import ConfigError
from asa_jax.flags import parse_arguments
from asa_jax.launch import refuse_many_processes
from asa_jax.run_flags import define_run_flags, given_files, given_output, given_workdir
from asa_jax.trained_run import load_run_tokenizer, read_run_config


class Options(NamedTuple):
    """What to calibrate, and on what.

    Attributes:
        workdir: run directory or model folder.
        step: of the checkpoint; None: the newest.
        tokenizer: of the model.
        settings: the number of channels is used.
        text: files of sample text.
        num_samples: pieces of the text, of each file.
        sample_tokens: of a piece.
        output: the file to write.
    """

    workdir: Path
    step: int | None
    tokenizer: Tokenizer
    settings: DecodingConfig
    text: list[Path]
    num_samples: int
    sample_tokens: int
    output: Path


def parse_options() -> Options:
    """Parses and checks the command line.

    Raises:
        ConfigError: a flag is missing or wrong, or the model is not served.
        CheckpointError: --workdir holds no run.
    """
    define_run_flags()
    flags.DEFINE_multi_string("text", [], "file of sample text; may be repeated")
    flags.DEFINE_integer("num_samples", 64, "pieces of each file, evenly spread", lower_bound=1)
    flags.DEFINE_integer("sample_tokens", 512, "tokens of a piece", lower_bound=2)
    flags.DEFINE_string("output", None, "file to write; default: in the workdir")
    define_config_flag()
    parse_arguments()
    refuse_many_processes("asa_jax.async_tls.calibrate")
    given = flags.FLAGS
    workdir = given_workdir()
    cfg = read_run_config(workdir).model
    if not given.text:
        raise ConfigError("--text: missing; give a text file of some pages")
    if given.sample_tokens % cfg.alignment:
        raise ConfigError(
            f"--sample_tokens={given.sample_tokens}: must be a multiple of {cfg.alignment} "
            "(model.selection_block_size)"
        )
    return Options(
        workdir=workdir,
        step=given.step,
        tokenizer=load_run_tokenizer(workdir),
        settings=given_config(cfg),
        text=given_files("text"),
        num_samples=given.num_samples,
        sample_tokens=given.sample_tokens,
        output=given_output("output") or channels_file(workdir),
    )

"""The part of generate.py's command line that chooses a decoder, checked without jax."""

import re
import sys
from pathlib import Path
from typing import NamedTuple

from absl import flags

from asa_jax.async_tls.command_line import channels_file, define_config_flag, given_config
from asa_jax.async_tls.settings import DecodingConfig
from asa_jax.config import ModelConfig
from asa_jax.errors import ConfigError

FULL, ASYNC_TLS = "full", "async_tls"
DECODERS = (FULL, ASYNC_TLS, "quest", "double_sparsity", "oracle_topk")
# Those that read labels, and so need calibrated channels.
LABELLED = (ASYNC_TLS, "double_sparsity")
_ONE_READING = ("chat", "load_cache", "save_cache")


class SparseOptions(NamedTuple):
    """How a model is decoded other than by full attention.

    Attributes:
        decoder: one of DECODERS but the first.
        settings: sizes, and what only async_tls has.
        channels: file of calibrated channels; None: the decoder needs none.
        show_engine: whether what the engine did is printed at the end.
    """

    decoder: str
    settings: DecodingConfig
    channels: Path | None
    show_engine: bool


def define_decoder_flags() -> None:
    """Defines the flags.

    Raises:
        ConfigError: the command line names a field of --config that does not exist.
    """
    flags.DEFINE_enum("decoder", FULL, DECODERS, "how tokens to attend to are chosen")
    flags.DEFINE_string("channels", None, "calibrated channels; default: those of the workdir")
    flags.DEFINE_bool("show_engine", False, "print what async_tls moved between host and device")
    define_config_flag()


def given_decoder(workdir: Path, cfg: ModelConfig) -> SparseOptions | None:
    """What the parsed command line says of the decoder; None: full attention.

    Raises:
        ConfigError: flags do not go together, or the model's layers are not served.
    """
    given = flags.FLAGS
    if given.show_engine and given.decoder != ASYNC_TLS:
        raise ConfigError(f"--show_engine: goes with --decoder={ASYNC_TLS}")
    if given.decoder == FULL:
        changed = any(re.match("--?(no)?config[.]", argument) for argument in sys.argv[1:])
        if changed or given.channels is not None:
            name = "config.async_tls" if changed else "channels"
            raise ConfigError(f"--{name}: goes with another --decoder than {FULL}")
        return None
    for name in _ONE_READING:
        if given[name].value not in (None, False):
            raise ConfigError(f"--{name}: goes with --decoder={FULL} alone")
    settings = given_config(cfg)
    if given.decoder == "quest" and settings.sizes.token_budget < settings.sizes.block_size:
        raise ConfigError(
            f"config.async_tls.token_budget = {settings.sizes.token_budget}: must be at least "
            f"config.async_tls.block_size = {settings.sizes.block_size} for --decoder=quest"
        )
    channels = None
    if given.decoder in LABELLED:
        named = given.channels
        channels = Path(named).expanduser() if named is not None else channels_file(workdir)
        if not channels.is_file():
            raise ConfigError(
                f"{channels}: no such file; make it with python -m asa_jax.async_tls.calibrate "
                f"--workdir={workdir} --text=FILE"
            )
    return SparseOptions(given.decoder, settings, channels, given.show_engine)

"""Flags that the commands of AsyncTLS share, checked without jax: `--config.async_tls.*`."""

import re
import sys
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from asa_jax.async_tls.settings import DEFAULTS, SECTION, DecodingConfig, decoding_config
from asa_jax.config import ModelConfig
from asa_jax.errors import ConfigError
from asa_jax.flags import check_field

CHANNELS_FILE = "async_tls_channels.safetensors"


def define_config_flag() -> None:
    """Defines `--config.async_tls.*`.

    Raises:
        ConfigError: the command line names a field that does not exist.
    """
    values = ConfigDict({SECTION: DEFAULTS})
    for argument in sys.argv[1:]:
        if field := re.match(r"--?(?:no)?config\.([^=]*)", argument):
            check_field(values, field[1])
    config_flags.DEFINE_config_dict("config", values)


def given_config(cfg: ModelConfig) -> DecodingConfig:
    """The settings that the parsed command line gives for a model; errors as `decoding_config`."""
    return decoding_config(flags.FLAGS.config[SECTION], cfg)


def channels_file(workdir: Path) -> Path:
    """Where the calibrated channels of a run or model folder lie."""
    return workdir / CHANNELS_FILE


def given_workdir() -> Path:
    """The folder that `--workdir` names.

    Raises:
        ConfigError: it names none.
    """
    if not flags.FLAGS.workdir:
        raise ConfigError("--workdir: missing; give a run directory or a model folder")
    return Path(flags.FLAGS.workdir).expanduser()


def given_files(flag: str) -> list[Path]:
    """The files that a flag names, of those that may be repeated.

    Raises:
        ConfigError: one does not exist.
    """
    given: list[str] = flags.FLAGS[flag].value or []
    paths = [Path(path).expanduser() for path in given]
    for path in paths:
        if not path.is_file():
            raise ConfigError(f"--{flag}={path}: no such file")
    return paths


def given_output(flag: str) -> Path | None:
    """The file that a flag names, to be written; None: the flag was not given.

    Raises:
        ConfigError: no file can be there.
    """
    text = flags.FLAGS[flag].value
    if text is None:
        return None
    path = Path(text).expanduser()
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ConfigError(f"--{flag}={text}: must name a file in a folder that exists")
    return path

"""The command line of `asa_jax.decoding.cache`, checked without jax."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

from absl import flags
from ml_collections import config_flags

from asa_jax.config import ModelConfig, config_from_dict
from asa_jax.config_model import NSA_BRANCHES
from asa_jax.errors import ConfigError
from asa_jax.flags import parse_optional_config_flag
from configs import asa_1b, asa_340m

LENGTHS = (4096, 16384, 65536, 262144, 1048576)
ARMS = ("asa", "asa_latent_per_head", "nsa", "nsa_shared", "full")
MAX_LENGTH = 2**30

# Architectures to compare, by name; 'nsa' and 'full' are among them.
Models = dict[str, ModelConfig]


class Options(NamedTuple):
    """What to measure.

    Attributes:
        comparisons: models that stand side by side, by title.
        lengths: tokens of a sequence.
        json: file for the numbers; None: no file.
        png: file for the chart; None: no file.
    """

    comparisons: dict[str, Models]
    lengths: tuple[int, ...]
    json: Path | None
    png: Path | None


def parse_options() -> Options:
    """Parses and checks the command line.

    Raises:
        ConfigError: a flag is wrong.
    """
    flags.DEFINE_list("lengths", [str(n) for n in LENGTHS], "lengths of a sequence in tokens")
    flags.DEFINE_string("json", None, "file for the numbers")
    flags.DEFINE_string("png", None, "file for a chart of bytes by length")
    config = parse_optional_config_flag()
    given = flags.FLAGS
    return Options(
        comparisons=preset_comparisons() if config is None else _compare_given(config.model),
        lengths=_lengths(given.lengths),
        json=_output("json", given.json),
        png=_output("png", given.png),
    )


def preset_comparisons() -> dict[str, Models]:
    """The arms of both sizes."""
    return {
        module.__name__.rpartition(".")[2]: {
            arm: config_from_dict(module.get_config(arm).to_dict()).model for arm in ARMS
        }
        for module in (asa_340m, asa_1b)
    }


def with_baselines(cfg: ModelConfig) -> Models:
    """A model beside NSA and grouped-query attention of the same sizes in every layer."""
    nsa = dataclasses.replace(
        cfg,
        layer_kinds=("nsa",) * cfg.num_layers,
        nsa_branches=NSA_BRANCHES,
        nsa_share_kv=False,
    )
    shared = dataclasses.replace(nsa, nsa_share_kv=True)
    full = dataclasses.replace(cfg, layer_kinds=("full",) * cfg.num_layers)
    return {"this": cfg, "nsa": nsa, "nsa_shared": shared, "full": full}


def _compare_given(cfg: ModelConfig) -> dict[str, Models]:
    return {config_flags.get_config_filename(flags.FLAGS["config"]): with_baselines(cfg)}


def _lengths(texts: list[str]) -> tuple[int, ...]:
    given = f"--lengths={','.join(texts)}"
    try:
        lengths = tuple(map(int, texts))
    except ValueError:
        raise ConfigError(f"{given}: must be whole numbers with commas between") from None
    if not lengths or not all(1 <= length <= MAX_LENGTH for length in lengths):
        raise ConfigError(f"{given}: must be from 1 to {MAX_LENGTH}")
    return lengths


def _output(flag: str, path: str | None) -> Path | None:
    if not path:
        return None
    file = Path(path).expanduser().absolute()
    if file.is_dir() or not file.parent.is_dir():
        raise ConfigError(f"--{flag}={path}: must name a file in a folder that exists")
    return file

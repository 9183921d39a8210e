"""What a run or a model folder holds for its users: configuration and tokenizer. Without jax."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from asa_jax.config import Config, config_from_dict
from asa_jax.data.shards import TOKENIZER, read_json
from asa_jax.data.tokenizer import BYTES, Tokenizer, load_tokenizer
from asa_jax.errors import CheckpointError
from asa_jax.interop.architectures import read_architecture
from asa_jax.interop.folder_tokenizer import load_folder_tokenizer
from configs import base

# Under the names that Hugging Face has for them.
TOKENIZER_CONFIG = "tokenizer_config.json"
END_OF_DOCUMENT = "eos_token"


def read_run_config(workdir: Path) -> Config:
    """Reads the configuration that a run left as JSON, or the model of a model folder.

    Raises:
        CheckpointError: there is no run, or its config.json is broken.
        ConfigError: a field is not known to this version.
        ImportedModelError: the architecture of the folder is not supported.
    """
    values = _read_config(workdir)
    if "model_type" not in values:
        return config_from_dict(values)
    config = config_from_dict(base.get_config().to_dict())
    return dataclasses.replace(config, model=read_architecture(workdir)[0])


def is_model_folder(workdir: Path) -> bool:
    """Whether this is a model folder, as other programs and the export write it, and no run."""
    return (workdir / "config.json").exists() and "model_type" in _read_config(workdir)


def _read_config(workdir: Path) -> dict[str, Any]:
    path = workdir / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); give the --workdir of a trained run"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path}: broken JSON ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return values


def load_run_tokenizer(workdir: Path) -> Tokenizer:
    """Loads the tokenizer that a run was trained with; a run of bytes has no file for it."""
    path, settings = workdir / TOKENIZER, workdir / TOKENIZER_CONFIG
    if is_model_folder(workdir):
        return load_folder_tokenizer(workdir)
    if not path.exists():
        return load_tokenizer(BYTES)
    end_of_document = read_json(settings).get(END_OF_DOCUMENT) if settings.exists() else None
    return load_tokenizer(path, end_of_document)

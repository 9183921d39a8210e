"""What a run left for those who use it: its configuration and tokenizer. Imports no jax."""

import json
from pathlib import Path

from asa_jax.config import Config, config_from_dict
from asa_jax.data.shards import TOKENIZER, read_json
from asa_jax.data.tokenizer import BYTES, Tokenizer, load_tokenizer
from asa_jax.errors import CheckpointError

# Under the names that Hugging Face has for them.
TOKENIZER_CONFIG = "tokenizer_config.json"
END_OF_DOCUMENT = "eos_token"


def read_run_config(workdir: Path) -> Config:
    """Reads the configuration that a run left as JSON.

    Raises:
        CheckpointError: there is no run, or its config.json is broken.
        ConfigError: a field is not known to this version.
    """
    path = workdir / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); give the --workdir of a trained run"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path}: broken JSON ({error})") from None
    return config_from_dict(values)


def load_run_tokenizer(workdir: Path) -> Tokenizer:
    """Loads the tokenizer that a run was trained with; a run of bytes has no file for it."""
    path, settings = workdir / TOKENIZER, workdir / TOKENIZER_CONFIG
    if not path.exists():
        return load_tokenizer(BYTES)
    end_of_document = read_json(settings).get(END_OF_DOCUMENT) if settings.exists() else None
    return load_tokenizer(path, end_of_document)

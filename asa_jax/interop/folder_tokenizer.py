"""The tokenizer of a model folder. Imports no jax."""

from pathlib import Path

from asa_jax.data.tokenizer import JsonTokenizer, Tokenizer, load_tokenizer
from asa_jax.errors import ImportedModelError, UserError
from asa_jax.interop.safetensors_files import read_json_object


def load_folder_tokenizer(folder: Path) -> Tokenizer:
    """Loads the tokenizer.json of a model folder; tokenizer_config.json names its last token.

    Prompts begin with the special tokens that the tokenizer.json puts before a text.

    Raises:
        ImportedModelError: it is missing, no tokenizer, or the end of a document is not known.
    """
    settings = folder / "tokenizer_config.json"
    end = read_json_object(settings).get("eos_token") if settings.exists() else None
    if isinstance(end, dict):
        end = end.get("content")
    if end is not None and not isinstance(end, str):
        raise ImportedModelError(f"{settings}: eos_token = {end!r}: must be a token")
    try:
        tokenizer = load_tokenizer(folder / "tokenizer.json", end)
    except UserError as error:
        raise ImportedModelError(str(error)) from None
    assert isinstance(tokenizer, JsonTokenizer)
    tokenizer.start_ids = tokenizer.published_start()
    return tokenizer

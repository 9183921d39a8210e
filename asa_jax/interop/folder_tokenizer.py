"""The tokenizer of a model folder. Imports no jax."""

from pathlib import Path

from asa_jax.data.tokenizer import JsonTokenizer, Tokenizer, load_tokenizer
from asa_jax.errors import ImportedModelError, UserError
from asa_jax.interop.safetensors_files import read_json_object

GENERATION_CONFIG = "generation_config.json"


def load_folder_tokenizer(folder: Path) -> Tokenizer:
    """Loads the tokenizer.json of a model folder, with the tokens that begin and end its texts.

    A text is begun with what tokenizer.json puts before one, and ended by the `eos_token` of
    tokenizer_config.json or any `eos_token_id` of generation_config.json, else of config.json.

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
    try:
        tokenizer.start_ids = tokenizer.published_start()
    except Exception as error:  # the library raises bare Exception
        raise ImportedModelError(f"{folder / 'tokenizer.json'}: reads no text ({error})") from None
    ends = (tokenizer.end_of_document_id, *_end_ids(folder, tokenizer.vocab_size))
    tokenizer.end_ids = tuple(dict.fromkeys(ends))
    return tokenizer


def _end_ids(folder: Path, vocab_size: int) -> list[int]:
    for path in (folder / GENERATION_CONFIG, folder / "config.json"):
        found = read_json_object(path).get("eos_token_id") if path.exists() else None
        if found is not None:
            ids = found if isinstance(found, list) else [found]
            if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
                raise ImportedModelError(
                    f"{path}: eos_token_id = {found!r}: must be a token of tokenizer.json, or a "
                    "list of such"
                )
            return ids
    return []

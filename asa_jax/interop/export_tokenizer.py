"""tokenizer.json and tokenizer_config.json of an exported model."""

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from asa_jax.data.shards import TOKENIZER
from asa_jax.data.tokenizer import ByteTokenizer, Tokenizer
from asa_jax.interop.chat import TEMPLATE_FILE, ChatTemplate
from asa_jax.trained_run import END_OF_DOCUMENT, TOKENIZER_CONFIG


def write_tokenizer(
    folder: Path, tokenizer: Tokenizer, template: ChatTemplate | None, max_tokens: int
) -> None:
    """Writes the tokenizer of a model as `transformers` reads it.

    Args:
        folder: of the model.
        tokenizer: its tokenizer; plain bytes are spelled as a byte-level BPE without merges.
        template: of its chats; None: it has none.
        max_tokens: length of the rows that the model was trained on.
    """
    source = tokenizer.source
    (folder / TOKENIZER).write_bytes((byte_level() if source is None else source).encode())
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **(template.special_tokens if template else {}),
        END_OF_DOCUMENT: tokenizer.end_of_document,
        "model_max_length": max_tokens,
        "clean_up_tokenization_spaces": False,
    }
    if template:
        (folder / TEMPLATE_FILE).write_text(template.source)
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


def byte_level() -> str:
    """The tokenizer.json of `ByteTokenizer`: token i is byte i."""
    # GPT-2 spells printable bytes as themselves, and the others from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (i for i in range(256) if i not in printable)
    spelled = {i: chr(i) for i in printable} | {i: chr(256 + n) for n, i in enumerate(others)}
    made = tokenizers.Tokenizer(models.BPE({spelled[i]: i for i in range(256)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([ByteTokenizer.end_of_document])
    return made.to_str()

"""Tokenizer and chat template in the metadata of a GGUF file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from asa_jax.data.tokenizer import JsonTokenizer, load_tokenizer
from asa_jax.errors import ImportedModelError, UserError
from asa_jax.interop.chat import ChatTemplate

TOKENS, TEMPLATE = "tokenizer.ggml.tokens", "tokenizer.chat_template"
# How text is cut before byte-level BPE, by `tokenizer.ggml.pre`.
PRE_TOKENIZERS = {"gpt-2": (), "smollm": (pre_tokenizers.Digits(individual_digits=True),)}
# What ends a document, a turn and a message; a text ends with any.
ENDS = ("eos", "eot", "eom")
CONTROL, USER_DEFINED = 3, 4


def read_tokenizer(path: Path, values: Mapping[str, Any]) -> JsonTokenizer:
    """Makes the tokenizer of a file, or loads tokenizer.json beside it where that one is not known.

    Args:
        path: of the file.
        values: its metadata.

    Raises:
        ImportedModelError: metadata are wrong, or the tokenizer is not supported and none beside.
    """
    _check(path, values)
    kind = values.get("tokenizer.ggml.model"), values.get("tokenizer.ggml.pre", "gpt-2")
    tokens, beside = values[TOKENS], path.parent / "tokenizer.json"
    ids = [_id(path, values, role) for role in ENDS]
    if ids[0] is None:
        raise ImportedModelError(f"{path}: tokenizer.ggml.eos_token_id is missing")
    ends = [i for i in ids if i is not None]
    try:
        tokenizer = _load(path, values, kind, beside, tokens[ends[0]])
    except UserError as error:
        raise ImportedModelError(str(error)) from None
    tokenizer.end_ids = tuple(dict.fromkeys(ends))
    tokenizer.start_ids = tokenizer.published_start()
    return tokenizer


def read_chat_template(path: Path, values: Mapping[str, Any]) -> ChatTemplate | None:
    """The chat template of a file, with the special tokens that it may write; None: it has none.

    Args:
        path: of the file.
        values: its metadata.

    Raises:
        ImportedModelError: metadata are wrong.
    """
    source = values.get(TEMPLATE)
    if source is None:
        return None
    if not isinstance(source, str):
        raise ImportedModelError(f"{path}: {TEMPLATE} = {source!r}: must be a string")
    found = {f"{role}_token": _id(path, values, role) for role in ("bos", "eos")}
    special = {role: values[TOKENS][i] for role, i in found.items() if i is not None}
    return ChatTemplate(path, source, special)


def _check(path: Path, values: Mapping[str, Any]) -> None:
    for name in (TOKENS, "tokenizer.ggml.merges"):
        found = values.get(name, [])
        if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
            raise ImportedModelError(f"{path}: {name}: must be a list of strings")


def _id(path: Path, values: Mapping[str, Any], role: str) -> int | None:
    name = f"tokenizer.ggml.{role}_token_id"
    index = values.get(name)
    if index is not None and (type(index) is not int or not 0 <= index < len(values[TOKENS])):
        raise ImportedModelError(f"{path}: {name} = {index!r}: is no token")
    return index


def _load(
    path: Path, values: Mapping[str, Any], kind: tuple[Any, Any], beside: Path, end: str
) -> JsonTokenizer:
    if kind[0] == "gpt2" and kind[1] in PRE_TOKENIZERS:
        return JsonTokenizer(_byte_level(path, values, kind[1]), str(path), end)
    if not beside.exists():
        raise ImportedModelError(
            f"{path}: tokenizer {kind[0]!r} with tokenizer.ggml.pre {kind[1]!r} is not supported; "
            f"put its tokenizer.json at {beside}"
        )
    tokenizer = load_tokenizer(beside, end)
    assert isinstance(tokenizer, JsonTokenizer)
    return tokenizer


def _byte_level(path: Path, values: Mapping[str, Any], pre: str) -> str:
    """The tokenizer.json of a byte-level BPE."""
    tokens = values[TOKENS]
    merges = [tuple(merge.split(" ", 1)) for merge in values.get("tokenizer.ggml.merges", ())]
    try:
        bpe = models.BPE({token: i for i, token in enumerate(tokens)}, merges)
    except Exception as error:  # the library raises bare Exception
        raise ImportedModelError(f"{path}: tokenizer.ggml.merges: {error}") from None
    made = tokenizers.Tokenizer(bpe)
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [*PRE_TOKENIZERS[pre], pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    kinds = values.get("tokenizer.ggml.token_type", ())
    for token, kind in zip(tokens, kinds, strict=False):
        if kind in (CONTROL, USER_DEFINED):
            made.add_tokens([AddedToken(token, special=kind == CONTROL, normalized=False)])
    start = _id(path, values, "bos")
    if start is not None and values.get("tokenizer.ggml.add_bos_token") is True:
        token = tokens[start]
        made.post_processor = processors.TemplateProcessing(
            single=[token, "$A"], special_tokens=[(token, start)]
        )
    return made.to_str()

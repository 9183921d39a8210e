"""Loads Llama models from GGUF files, quantised or not, by the `gguf` package (the extra `gguf`).

A GGUF file holds hyperparameters, tokenizer and tensors. Quantised tensors become float32; rows of
queries and keys, which llama.cpp stores for pairs of neighbouring features, are put back in halves.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from asa_jax.config import ModelConfig
from asa_jax.data.tokenizer import Tokenizer
from asa_jax.errors import ConfigError, ImportedModelError
from asa_jax.interop.chat import ChatTemplate
from asa_jax.interop.gguf_tokenizer import TOKENS, read_chat_template, read_tokenizer
from asa_jax.interop.hugging_face_config import HuggingFaceConfig
from asa_jax.interop.huggingface import read_params
from asa_jax.interop.llama import llama_table, read_llama
from asa_jax.interop.tensor_table import Place, Table, all_places
from asa_jax.model.param_layout import layer_places

# Names in a config.json of Hugging Face, and in GGUF.
FIELDS = {
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "num_hidden_layers": "llama.block_count",
    "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "rope_theta": "llama.rope.freq_base",
}
TENSORS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Heads of these tensors are rows of neighbouring pairs, the value is their number's name.
PERMUTED = {"self_attn.q_proj.weight": "num_heads", "self_attn.k_proj.weight": "num_kv_heads"}


class GgufModel(NamedTuple):
    """What a file holds.

    Attributes:
        cfg: the architecture.
        params: nested dict of parameters.
        tokenizer: of the model.
        template: of chats; None: there is none.
    """

    cfg: ModelConfig
    params: Any
    tokenizer: Tokenizer
    template: ChatTemplate | None


class GgufTensor(NamedTuple):
    """A tensor of a file, with the interface of `safetensors_files.Tensor`.

    Attributes:
        path: of the file.
        name: in the file.
        shape: its dimensions, the slowest first.
        data: as stored.
        kind: how it is quantised.
        heads: whose features are stored in pairs; 0: none.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    data: np.ndarray
    kind: Any
    heads: int
    dtype: str = "F32"

    def view(self) -> np.ndarray:
        """The tensor in float32."""
        import gguf

        values = gguf.dequantize(self.data, self.kind).reshape(self.shape)
        if self.heads:
            pairs = values.reshape(self.heads, -1, 2, self.shape[1])
            values = pairs.swapaxes(1, 2).reshape(self.shape)
        return values.astype(np.float32, copy=False)


def load_gguf(path: str | Path) -> GgufModel:
    """Loads a Llama model from a GGUF file, in float32, to one device.

    Raises:
        ConfigError: the extra `gguf` is not installed.
        ImportedModelError: the file is damaged, or its architecture or tokenizer not supported.
    """
    path = Path(path).expanduser()
    values, stored = _open(path)
    cfg = read_llama(_config(path, values, stored))
    _check(path, values, cfg)
    table = llama_table(cfg)
    places = all_places(table, layer_places(cfg))
    tensors = _tensors(path, stored, places, table, cfg)
    tokenizer, template = read_tokenizer(path, values), read_chat_template(path, values)
    params = read_params(tensors, places, table, cfg)
    return GgufModel(cfg, params, tokenizer, template)


def _open(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The metadata and the tensors of a file, by name."""
    try:
        import gguf
    except ImportError:
        raise ConfigError(
            f"{path}: the package gguf is not installed; run pip install -e '.[gguf]'"
        ) from None
    try:
        reader = gguf.GGUFReader(path)
        values = {name: field.contents() for name, field in reader.fields.items()}
        return values, {tensor.name: tensor for tensor in reader.tensors}
    except OSError as error:
        raise ImportedModelError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # whatever a damaged file makes of its offsets
        raise ImportedModelError(f"{path}: is no intact GGUF file ({error!r})") from None


def _config(path: Path, values: Mapping[str, Any], stored: Mapping[str, Any]) -> HuggingFaceConfig:
    """The file's hyperparameters under the names of Hugging Face."""
    if values.get("general.architecture") != "llama":
        found = values.get("general.architecture")
        raise ImportedModelError(
            f"{path}: general.architecture = {found!r}: must be 'llama'; others are not supported"
        )
    for name in (*FIELDS.values(), TOKENS):
        if name not in values:
            raise ImportedModelError(f"{path}: {name} is missing")
    fields = {name: values[field] for name, field in FIELDS.items()}
    return HuggingFaceConfig(
        path,
        fields | {
            "vocab_size": len(values[TOKENS]),
            "head_dim": values.get("llama.attention.key_length"),
            "tie_word_embeddings": "output.weight" not in stored,
            "hidden_act": "silu",
        },
    )  # fmt: skip


def _check(path: Path, values: Mapping[str, Any], cfg: ModelConfig) -> None:
    """Refuses what Llama files may hold and this reader does not."""
    allowed = {
        "llama.rope.scaling.type": "none",
        "llama.expert_count": 0,
        "llama.rope.dimension_count": cfg.head_dim,
        "llama.attention.value_length": cfg.head_dim,
    }
    for name, value in allowed.items():
        if values.get(name, value) != value:
            raise ImportedModelError(
                f"{path}: {name} = {values[name]!r}: must be {value!r}; others are not supported"
            )


def _tensors(
    path: Path, stored: Mapping[str, Any], places: list[Place], table: Table, cfg: ModelConfig
) -> dict[str, GgufTensor]:
    """The tensors by their names in Hugging Face's layout, checked against the table."""
    tensors = {}
    for place in places:
        name, shape = _gguf_name(place.tensor), place.row.tensor_shape(table.sizes)
        if name not in stored:
            raise ImportedModelError(f"{path}: tensor {name} is missing")
        found = tuple(int(size) for size in reversed(stored[name].shape))
        if found != shape:
            raise ImportedModelError(
                f"{path}: tensor {name}: shape {list(found)} must be {list(shape)}"
            )
        _check_kind(path, name, stored[name].tensor_type)
        heads = next((n for end, n in PERMUTED.items() if place.tensor.endswith(end)), None)
        tensors[place.tensor] = GgufTensor(
            path, name, shape, stored[name].data, stored[name].tensor_type,
            getattr(cfg, heads) if heads else 0,
        )  # fmt: skip
    extra = sorted(stored.keys() - {tensor.name for tensor in tensors.values()})
    if extra:
        raise ImportedModelError(f"{path}: tensor {extra[0]} is not part of a Llama model")
    return tensors


def _check_kind(path: Path, name: str, kind: Any) -> None:
    """Undoes a block of zeros, to refuse what cannot be undone before any array is made."""
    import gguf

    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        raise ImportedModelError(
            f"{path}: tensor {name}: quantisation {kind.name} is not supported by the package gguf"
        ) from None


def _gguf_name(tensor: str) -> str:
    for there, here in TENSORS.items():
        tensor = tensor.replace(f"{there}.", f"{here}.")
    return tensor

"""Loads Llama models from GGUF files, quantised or not, by the `gguf` package (the extra `gguf`).

A GGUF file holds hyperparameters, tokenizer and tensors. Quantised tensors become float32; rows of
queries and keys, which llama.cpp stores for pairs of neighbouring features, are put back in halves.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from jax.sharding import Mesh
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from asa_jax.config import ModelConfig
from asa_jax.data.tokenizer import JsonTokenizer, Tokenizer, load_tokenizer
from asa_jax.errors import ConfigError, ImportedModelError
from asa_jax.interop.hugging_face_config import HuggingFaceConfig
from asa_jax.interop.huggingface import read_params
from asa_jax.interop.llama import llama_table, read_llama
from asa_jax.interop.tensor_table import Place, Table, all_places
from asa_jax.model.transformer import layer_places

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
# How text is cut before byte-level BPE, by `tokenizer.ggml.pre`.
PRE_TOKENIZERS = {"gpt-2": (), "smollm": (pre_tokenizers.Digits(individual_digits=True),)}
CONTROL, USER_DEFINED = 3, 4


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


def load_gguf(
    path: str | Path, mesh: Mesh | None = None, param_dtype: str | None = None
) -> tuple[ModelConfig, Any, Tokenizer]:
    """Loads a Llama model from a GGUF file.

    Args:
        path: of the file.
        mesh: devices to hold the parameters; None: one device.
        param_dtype: of the parameters; None: float32.

    Returns:
        The architecture, the parameters as a nested dict, and the tokenizer.

    Raises:
        ConfigError: the extra `gguf` is not installed, or the mesh does not divide the parameters.
        ImportedModelError: the file is damaged, or its architecture or tokenizer not supported.
    """
    path = Path(path).expanduser()
    reader = _open(path)
    values = {name: field.contents() for name, field in reader.fields.items()}
    stored = {tensor.name: tensor for tensor in reader.tensors}
    cfg = read_llama(_config(path, values, stored))
    _check(path, values, cfg)
    table = llama_table(cfg)
    places = all_places(table, layer_places(cfg))
    tensors = _tensors(path, stored, places, table, cfg)
    tokenizer = _tokenizer(path, values)
    return cfg, read_params(tensors, places, table, cfg, mesh, param_dtype), tokenizer


def _open(path: Path) -> Any:
    try:
        import gguf
    except ImportError:
        raise ConfigError(
            f"{path}: the package gguf is not installed; run pip install -e '.[gguf]'"
        ) from None
    try:
        return gguf.GGUFReader(path)
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
    for name in (*FIELDS.values(), "tokenizer.ggml.tokens"):
        if name not in values:
            raise ImportedModelError(f"{path}: {name} is missing")
    fields = {name: values[field] for name, field in FIELDS.items()}
    return HuggingFaceConfig(
        path,
        fields | {
            "vocab_size": len(values["tokenizer.ggml.tokens"]),
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
        heads = next((n for end, n in PERMUTED.items() if place.tensor.endswith(end)), None)
        tensors[place.tensor] = GgufTensor(
            path, name, shape, stored[name].data, stored[name].tensor_type,
            getattr(cfg, heads) if heads else 0,
        )  # fmt: skip
    extra = sorted(stored.keys() - {tensor.name for tensor in tensors.values()})
    if extra:
        raise ImportedModelError(f"{path}: tensor {extra[0]} is not part of a Llama model")
    return tensors


def _gguf_name(tensor: str) -> str:
    for there, here in TENSORS.items():
        tensor = tensor.replace(f"{there}.", f"{here}.")
    return tensor


def _tokenizer(path: Path, values: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer in the file, or tokenizer.json beside it where that one is not known."""
    kind = values.get("tokenizer.ggml.model"), values.get("tokenizer.ggml.pre", "gpt-2")
    tokens, beside = values["tokenizer.ggml.tokens"], path.parent / "tokenizer.json"
    end = values.get("tokenizer.ggml.eos_token_id", -1)
    if not 0 <= end < len(tokens):
        raise ImportedModelError(f"{path}: tokenizer.ggml.eos_token_id = {end}: is no token")
    if kind[0] == "gpt2" and kind[1] in PRE_TOKENIZERS:
        return JsonTokenizer(_byte_level(values, kind[1]), str(path), tokens[end])
    if beside.exists():
        return load_tokenizer(beside, tokens[end])
    raise ImportedModelError(
        f"{path}: tokenizer {kind[0]!r} with tokenizer.ggml.pre {kind[1]!r} is not supported; "
        f"put its tokenizer.json at {beside}"
    )


def _byte_level(values: Mapping[str, Any], pre: str) -> str:
    """The tokenizer.json of a byte-level BPE."""
    tokens = values["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in values.get("tokenizer.ggml.merges", ())]
    made = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [*PRE_TOKENIZERS[pre], pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    kinds = values.get("tokenizer.ggml.token_type", ())
    added = [(token, kind) for token, kind in zip(tokens, kinds, strict=False) if kind > 1]
    for token, kind in added:
        if kind in (CONTROL, USER_DEFINED):
            made.add_tokens([AddedToken(token, special=kind == CONTROL, normalized=False)])
    return made.to_str()

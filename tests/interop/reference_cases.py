"""Tiny models of each architecture and RoPE kind, whose logits transformers has given."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from asa_jax.interop.architectures import read_architecture
from asa_jax.interop.tensor_table import all_places

REFERENCE = Path(__file__).parent / "reference_logits.npz"
PROMPT = np.arange(3, 15) * 7 % 48
NUM_GREEDY_TOKENS = 64
# The words w0 .. w46 and an end of document.
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "pre_tokenizer": {"type": "WhitespaceSplit"},
    "model": {
        "type": "WordLevel",
        "vocab": {f"w{i}": i for i in range(47)} | {"</s>": 47},
        "unk_token": "w0",
    },
}

_COMMON = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "dtype": "float32",
}
_LLAMA = {**_COMMON, "model_type": "llama", "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
_LATENT = {
    **_COMMON,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "moe_intermediate_size": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
}
_YARN = {
    "type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "beta_fast": 8,
    "beta_slow": 1,
}  # fmt: skip

CASES: dict[str, dict[str, Any]] = {
    "smollm2": {**_LLAMA, "tie_word_embeddings": True, "rope_theta": 100000.0},
    "llama3": {
        **_LLAMA,
        "head_dim": 12,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "llama_yarn": {**_LLAMA, "rope_parameters": {**_YARN, "rope_type": "yarn", "rope_theta": 1e4}},
    "qwen3": {
        **_LLAMA, "model_type": "qwen3", "head_dim": 16, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True, "rope_theta": 1e6,
    },
    "deepseek_v2": {
        **_LATENT,
        "model_type": "deepseek_v2",
        "q_lora_rank": None,
        "first_k_dense_replace": 1,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "n_shared_experts": 2,
        "routed_scaling_factor": 2.0,
        "rope_scaling": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "deepseek_v2_dense": {
        **_LATENT, "model_type": "deepseek_v2", "first_k_dense_replace": 3,
        "attention_bias": True, "n_shared_experts": 1,
    },
    "deepseek_v3": {
        **_LATENT,
        "model_type": "deepseek_v3",
        "first_k_dense_replace": 2,
        "n_group": 4,
        "topk_group": 2,
        "n_shared_experts": 1,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1,
        "rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
    },
    "glm4_moe_lite": {
        **_LATENT,
        "model_type": "glm4_moe_lite",
        "rms_norm_eps": 1e-5,
        "v_head_dim": 18,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "routed_scaling_factor": 1.8,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
}  # fmt: skip


def write_model(folder: Path, config: dict[str, Any], dtype: Any = np.float32) -> Path:
    """Writes a model folder with weights that depend on the names of the tensors alone.

    Args:
        folder: existing and empty.
        config: its config.json.
        dtype: of the tensors.

    Returns:
        The folder.
    """
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    save_file(drawn_tensors(folder, dtype), folder / "model.safetensors", {"format": "pt"})
    return folder


def drawn_tensors(folder: Path, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """The tensors that the config.json of a folder asks for: norms near 1, the rest near 0."""
    cfg, table = read_architecture(folder)
    places = all_places(table, [((), None)] * cfg.num_layers)
    tensors = {}
    for place in places:
        values = _draw(place.tensor, place.row.tensor_shape(table.sizes))
        tensors[place.tensor] = values.astype(dtype)
    return tensors


def _draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    values = rng.standard_normal(shape, np.float32)
    if "norm" in name:
        return 1 + 0.1 * values
    # Small latents tell the epsilon of their norm.
    return (0.03 if "q_a_proj" in name else 0.3) * values

"""The config.json of models that `transformers` knows: all layers `full`, or all `mla`."""

from typing import Any

from asa_jax.config import Config, ModelConfig
from asa_jax.config_parts import RopeScalingConfig
from asa_jax.interop.deepseek import deepseek_table
from asa_jax.interop.llama import llama_table
from asa_jax.interop.tensor_table import Table

LLAMA, QWEN3, DEEPSEEK_V2 = "llama", "qwen3", "deepseek_v2"
_CLASSES = {
    LLAMA: "LlamaForCausalLM",
    QWEN3: "Qwen3ForCausalLM",
    DEEPSEEK_V2: "DeepseekV2ForCausalLM",
}
# Of the norms of latents, whatever a config.json says.
_LATENT_NORM_EPSILON = 1e-6


def transformers_type(cfg: ModelConfig) -> str | None:
    """The `model_type` of an architecture in `transformers`; None: it has none that is the same."""
    kinds = set(cfg.layer_kinds)
    if cfg.experts.num_experts or cfg.rope_scaling.score_factor != 1:
        return None
    if kinds == {"full"} and cfg.qk_norm:
        return None if cfg.mlp_bias else QWEN3
    if cfg.hidden_size % cfg.num_heads:  # refused by the other two
        return None
    if kinds == {"full"}:
        return LLAMA
    normed = cfg.latent_norm and cfg.latent_norm_epsilon == _LATENT_NORM_EPSILON
    return DEEPSEEK_V2 if kinds == {"mla"} and normed else None


def transformers_layout(config: Config) -> tuple[dict[str, Any], Table]:
    """What config.json says of a model with a `transformers_type`, and where its tensors lie."""
    cfg = config.model
    name = transformers_type(cfg)
    assert name is not None
    fields = {"model_type": name, "architectures": [_CLASSES[name]], **_common_fields(cfg)}
    if name == DEEPSEEK_V2:
        return fields | _latent_fields(cfg), deepseek_table(cfg)
    return fields | _grouped_query_fields(cfg), llama_table(cfg)


def _common_fields(cfg: ModelConfig) -> dict[str, Any]:
    fields = {
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.mlp_size,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "hidden_act": "silu",
        "rms_norm_eps": cfg.norm_epsilon,
        "initializer_range": cfg.init_stddev,
        "tie_word_embeddings": cfg.tie_embeddings,
        "attention_bias": cfg.attention_bias,
        # Before version 5 transformers reads the first, since then the second.
        "rope_theta": cfg.rope_theta,
        "rope_parameters": {"rope_theta": cfg.rope_theta, **_rope(cfg.rope_scaling)},
    }
    if cfg.rope_scaling.kind != "none":
        fields["rope_scaling"] = _rope(cfg.rope_scaling)
    if not cfg.qk_norm:
        fields["mlp_bias"] = cfg.mlp_bias
    return fields


def _grouped_query_fields(cfg: ModelConfig) -> dict[str, Any]:
    return {"num_key_value_heads": cfg.num_kv_heads, "head_dim": cfg.head_dim}


def _latent_fields(cfg: ModelConfig) -> dict[str, Any]:
    return {
        "num_key_value_heads": cfg.num_heads,
        "kv_lora_rank": cfg.kv_lora_rank,
        "q_lora_rank": cfg.q_lora_rank or None,
        "qk_nope_head_dim": cfg.qk_nope_head_dim,
        "qk_rope_head_dim": cfg.qk_rope_head_dim,
        "v_head_dim": cfg.v_head_dim,
        # No layer has experts.
        "first_k_dense_replace": cfg.num_layers,
    }


def _rope(scaling: RopeScalingConfig) -> dict[str, Any]:
    if scaling.kind == "none":
        return {"rope_type": "default"}
    stretch = {
        "rope_type": scaling.kind,
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_length,
    }
    if scaling.kind == "llama3":
        return stretch | {
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
        }
    return stretch | {
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        "truncate": scaling.truncate,
        "attention_factor": scaling.attention_factor,
    }

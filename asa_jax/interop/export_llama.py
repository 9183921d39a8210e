"""The config.json of models whose layers are all `full`, as `transformers` knows them."""

from typing import Any

from asa_jax.config import Config, ModelConfig
from asa_jax.config_parts import RopeScalingConfig


def is_llama(cfg: ModelConfig) -> bool:
    """Whether `transformers` has this architecture: as Llama, or as Qwen3 with norms of queries."""
    return (
        set(cfg.layer_kinds) == {"full"}
        and not cfg.experts.num_experts
        and cfg.rope_scaling.score_factor == 1
        and not (cfg.qk_norm and cfg.mlp_bias)
    )


def llama_fields(config: Config) -> dict[str, Any]:
    """What config.json says of a model for which `is_llama` holds."""
    cfg = config.model
    name = "qwen3" if cfg.qk_norm else "llama"
    fields = {
        "model_type": name,
        "architectures": [f"{name.capitalize()}ForCausalLM"],
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.mlp_size,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
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

"""DeepSeek-V2, DeepSeek-V3 and GLM-4.7-Flash: latent attention and experts. Imports no jax."""

from typing import Any

import numpy as np

from asa_jax.config import ModelConfig
from asa_jax.interop.hugging_face_config import (
    HuggingFaceConfig,
    model_config,
    rope_scaling,
    yarn_mscale,
)
from asa_jax.interop.llama import (
    IGNORED_TENSORS,
    common_sizes,
    mlp_rows,
    norm_rows,
    outside_rows,
    tied_tensors,
)
from asa_jax.interop.tensor_table import Part, Row, Table


def read_deepseek_v2(source: HuggingFaceConfig) -> ModelConfig:
    """Reads the config.json of a DeepSeek-V2.

    Raises:
        ImportedModelError: a field is missing, wrong or not supported.
    """
    source.require("scoring_func", "softmax", "softmax")
    source.require("topk_method", "greedy", "greedy", "group_limited_greedy")
    # Weights that sum to 1 are in its paper and code, and left out in transformers.
    source.require("norm_topk_prob", False, False)
    grouped = source.text("topk_method", "greedy") == "group_limited_greedy"
    return _model_config(
        source,
        mlp_bias=source.flag("mlp_bias", False),
        experts={
            **_experts(source, source.integer("first_k_dense_replace", 0), grouped),
            "scoring": "softmax",
            "normalize": False,
        },
    )


def read_deepseek_v3(source: HuggingFaceConfig) -> ModelConfig:
    """Reads the config.json of a DeepSeek-V3.

    Raises:
        ImportedModelError: a field is missing, wrong or not supported.
    """
    return _read_sigmoid(source, source.integer("first_k_dense_replace", 3))


def read_glm4_moe_lite(source: HuggingFaceConfig) -> ModelConfig:
    """Reads the config.json of a GLM-4.7-Flash.

    Raises:
        ImportedModelError: a field is missing, wrong or not supported.
    """
    kinds = source.names("mlp_layer_types")
    dense = kinds.count("dense") if kinds else source.integer("first_k_dense_replace", 1)
    layers = source.count("num_hidden_layers")
    if kinds and kinds != ["dense"] * dense + ["sparse"] * (layers - dense):
        raise source.error("mlp_layer_types", f"{layers} names, 'dense' before 'sparse'")
    return _read_sigmoid(source, dense)


def _read_sigmoid(source: HuggingFaceConfig, dense: int) -> ModelConfig:
    source.require("scoring_func", "sigmoid", "sigmoid")
    source.require("topk_method", "noaux_tc", "noaux_tc")
    experts = {
        **_experts(source, dense, grouped=True),
        "scoring": "sigmoid",
        "normalize": source.flag("norm_topk_prob", True),
    }
    return _model_config(source, experts=experts)


def _model_config(source: HuggingFaceConfig, **fields: Any) -> ModelConfig:
    heads = source.integer("num_attention_heads")
    source.require("num_key_value_heads", heads, heads)
    return model_config(
        source,
        layer_kinds=["mla"] * source.count("num_hidden_layers"),
        num_kv_heads=heads,
        kv_lora_rank=source.integer("kv_lora_rank"),
        q_lora_rank=source.integer("q_lora_rank", 0),
        qk_nope_head_dim=source.integer("qk_nope_head_dim"),
        qk_rope_head_dim=source.integer("qk_rope_head_dim"),
        v_head_dim=source.integer("v_head_dim"),
        rope_scaling=_rope_scaling(source),
        **fields,
    )


def _rope_scaling(source: HuggingFaceConfig) -> dict[str, Any]:
    """As of any model, and YaRN's temperature on the features that are not rotated, too."""
    section, scaling = rope_scaling(source)
    weight = section.number("mscale_all_dim", 0)
    if scaling["kind"] == "yarn" and weight:
        scaling["score_factor"] = yarn_mscale(scaling["factor"], weight) ** 2
    return scaling


def _experts(source: HuggingFaceConfig, dense: int, grouped: bool) -> dict[str, Any]:
    source.require("moe_layer_freq", 1, 1)
    if dense >= source.count("num_hidden_layers"):
        return {"num_experts": 0}
    return {
        "num_experts": source.count("n_routed_experts"),
        "num_experts_per_token": source.integer("num_experts_per_tok"),
        "expert_size": source.integer("moe_intermediate_size"),
        "num_shared_experts": source.integer("n_shared_experts", 0),
        "num_dense_layers": dense,
        "num_groups": source.integer("n_group", 1) if grouped else 1,
        "num_selected_groups": source.integer("topk_group", 1) if grouped else 1,
        "routed_scale": source.number("routed_scaling_factor", 1.0),
    }


def deepseek_table(cfg: ModelConfig, interleaved: bool = True, num_mtp_layers: int = 0) -> Table:
    """The table of models whose layers are all 'mla', with dense MLPs or experts.

    Args:
        cfg: the architecture.
        interleaved: whether the checkpoint rotates neighbours, as all published ones do.
        num_mtp_layers: layers behind the last one that predict further tokens; they are ignored.
    """
    experts, rope = cfg.experts, cfg.qk_rope_head_dim
    sizes = {
        **common_sizes(cfg), "R": cfg.kv_lora_rank, "Q": cfg.q_lora_rank, "H": cfg.v_head_dim,
        "X": cfg.qk_nope_head_dim + rope, "Y": cfg.qk_nope_head_dim + cfg.v_head_dim,
        "Z": cfg.kv_lora_rank + rope, "E": experts.num_experts, "G": experts.expert_size,
        "S": experts.num_shared_experts * experts.expert_size,
    }  # fmt: skip
    common = norm_rows() + latent_attention_rows(cfg, interleaved)
    dense = common + mlp_rows("mlp/", "mlp.", "F", cfg.mlp_bias)
    mixed = common + expert_rows(cfg)
    num_dense = experts.num_dense_layers if experts.num_experts else cfg.num_layers
    behind = (f"model.layers.{cfg.num_layers + i}.*" for i in range(num_mtp_layers))
    return Table(
        sizes,
        outside_rows(cfg),
        lambda layer: dense if layer < num_dense else mixed,
        (*IGNORED_TENSORS, *behind),
        tied_tensors(cfg),
    )


def latent_attention_rows(cfg: ModelConfig, interleaved: bool) -> tuple[Row, ...]:
    """Rows of latent attention.

    Args:
        cfg: the architecture.
        interleaved: whether the tensors have the two features of a rotated pair side by side.
    """
    nope, rank, rope = cfg.qk_nope_head_dim, cfg.kv_lora_rank, cfg.qk_rope_head_dim
    order = np.arange(rope).reshape(-1, 2).T.reshape(-1) if interleaved else np.arange(rope)
    query: tuple[str, Part] = ("X", np.concatenate([np.arange(nope), nope + order]))
    latent, rope_key = ("Z", slice(0, rank)), ("Z", rank + order)
    key, value = ("Y", slice(0, nope)), ("Y", slice(nope, None))
    down, up = "self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj.weight"
    rows = [
        Row("attention/down/weight", f"{down}.weight", "Z D", "DZ", part=latent),
        Row("attention/rope_key/weight", f"{down}.weight", "Z D", "DZ", part=rope_key),
        Row("attention/norm/scale", "self_attn.kv_a_layernorm.weight", "R", "R"),
        Row("attention/key_up/weight", up, "NY R", "RNY", part=key),
        Row("attention/value_up/weight", up, "NY R", "RNY", part=value),
        Row("attention/output/weight", "self_attn.o_proj.weight", "D NH", "NHD"),
    ]
    biases = [
        Row("attention/down/bias", f"{down}.bias", "Z", "Z", part=latent),
        Row("attention/rope_key/bias", f"{down}.bias", "Z", "Z", part=rope_key),
        Row("attention/output/bias", "self_attn.o_proj.bias", "D", "D"),
    ]
    query_path = "attention/query/"
    if cfg.q_lora_rank:
        rows += [
            Row(f"{query_path}down/weight", "self_attn.q_a_proj.weight", "Q D", "DQ"),
            Row(f"{query_path}norm/scale", "self_attn.q_a_layernorm.weight", "Q", "Q"),
            Row(f"{query_path}up/weight", "self_attn.q_b_proj.weight", "NX Q", "QNX", part=query),
        ]
        biases += [Row(f"{query_path}down/bias", "self_attn.q_a_proj.bias", "Q", "Q")]
    else:
        rows += [
            Row(f"{query_path}up/weight", "self_attn.q_proj.weight", "NX D", "DNX", part=query)
        ]
    return tuple(rows + biases if cfg.attention_bias else rows)


def expert_rows(cfg: ModelConfig) -> tuple[Row, ...]:
    """Rows of a mixture of experts."""
    rows = [Row("mlp/router/scores/weight", "mlp.gate.weight", "E D", "DE")]
    if cfg.experts.scoring == "sigmoid":
        rows += [Row("mlp/router/correction", "mlp.gate.e_score_correction_bias", "E", "E")]
    for i in range(cfg.experts.num_experts):
        rows += [
            Row("mlp/gate", f"mlp.experts.{i}.gate_proj.weight", "G D", "DG", i),
            Row("mlp/up", f"mlp.experts.{i}.up_proj.weight", "G D", "DG", i),
            Row("mlp/down", f"mlp.experts.{i}.down_proj.weight", "D G", "GD", i),
        ]
    if cfg.experts.num_shared_experts:
        rows += mlp_rows("mlp/shared/", "mlp.shared_experts.", "S", cfg.mlp_bias)
    return tuple(rows)

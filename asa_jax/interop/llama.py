"""Llama, SmolLM2 and Qwen3: their config.json and the table of their tensors. Imports no jax."""

from collections.abc import Callable

from asa_jax.config import ModelConfig
from asa_jax.interop.hugging_face_config import HuggingFaceConfig, model_config
from asa_jax.interop.tensor_table import Row, Table

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
# Some checkpoints hold them though they follow from config.json.
IGNORED_TENSORS = ("model.layers.*.self_attn.rotary_emb.inv_freq",)


def read_llama(source: HuggingFaceConfig) -> ModelConfig:
    """Reads the config.json of a Llama or SmolLM2.

    Raises:
        ImportedModelError: a field is missing, wrong or not supported.
    """
    heads = source.integer("num_attention_heads")
    hidden = source.integer("hidden_size")
    return model_config(
        source,
        layer_kinds=["full"] * source.count("num_hidden_layers"),
        num_kv_heads=source.integer("num_key_value_heads", heads),
        head_dim=source.integer("head_dim", hidden // max(heads, 1)),
        mlp_bias=source.flag("mlp_bias", False),
    )


def read_qwen3(source: HuggingFaceConfig) -> ModelConfig:
    """Reads the config.json of a Qwen3.

    Raises:
        ImportedModelError: a field is missing, wrong or not supported.
    """
    source.require("use_sliding_window", False, False)
    return model_config(
        source,
        layer_kinds=["full"] * source.count("num_hidden_layers"),
        num_kv_heads=source.integer("num_key_value_heads", 32),
        head_dim=source.integer("head_dim", 128),
        qk_norm=True,
    )


def llama_table(cfg: ModelConfig) -> Table:
    """The table of models whose layers are all 'full', with dense MLPs."""
    sizes = {
        **common_sizes(cfg), "K": cfg.num_kv_heads, "H": cfg.head_dim,
    }  # fmt: skip
    rows = norm_rows() + attention_rows(cfg) + mlp_rows("mlp/", "mlp.", "F", cfg.mlp_bias)
    return Table(sizes, outside_rows(cfg), _always(rows), IGNORED_TENSORS, tied_tensors(cfg))


def common_sizes(cfg: ModelConfig) -> dict[str, int]:
    """Letters of every table: vocabulary, model, heads and MLP."""
    return {"V": cfg.vocab_size, "D": cfg.hidden_size, "N": cfg.num_heads, "F": cfg.mlp_size}


def tied_tensors(cfg: ModelConfig) -> dict[str, str]:
    """Tensors that some checkpoints hold though they are others once more."""
    return {OUTPUT: EMBEDDING} if cfg.tie_embeddings else {}


def outside_rows(cfg: ModelConfig) -> tuple[Row, ...]:
    """Rows of embeddings and final norm."""
    rows = (
        Row("embedding/table", EMBEDDING, "V D", "VD"),
        Row("final_norm/scale", "model.norm.weight", "D", "D"),
    )
    output = Row("embedding/output", OUTPUT, "V D", "DV")
    return rows if cfg.tie_embeddings else (*rows, output)


def norm_rows() -> tuple[Row, ...]:
    """Rows of the two norms of a layer."""
    return (
        Row("attention_norm/scale", "input_layernorm.weight", "D", "D"),
        Row("mlp_norm/scale", "post_attention_layernorm.weight", "D", "D"),
    )


def attention_rows(cfg: ModelConfig) -> tuple[Row, ...]:
    """Rows of grouped-query attention."""
    rows = (
        Row("attention/query/weight", "self_attn.q_proj.weight", "NH D", "DNH"),
        Row("attention/key_value/weight", "self_attn.k_proj.weight", "KH D", "DKH", 0),
        Row("attention/key_value/weight", "self_attn.v_proj.weight", "KH D", "DKH", 1),
        Row("attention/output/weight", "self_attn.o_proj.weight", "D NH", "NHD"),
    )
    biases = (
        Row("attention/query/bias", "self_attn.q_proj.bias", "NH", "NH"),
        Row("attention/key_value/bias", "self_attn.k_proj.bias", "KH", "KH", 0),
        Row("attention/key_value/bias", "self_attn.v_proj.bias", "KH", "KH", 1),
        Row("attention/output/bias", "self_attn.o_proj.bias", "D", "D"),
    )
    norms = (
        Row("attention/query_norm/scale", "self_attn.q_norm.weight", "H", "H"),
        Row("attention/key_norm/scale", "self_attn.k_norm.weight", "H", "H"),
    )
    return rows + (biases if cfg.attention_bias else ()) + (norms if cfg.qk_norm else ())


def mlp_rows(parameter: str, tensor: str, size: str, bias: bool) -> tuple[Row, ...]:
    """Rows of a SwiGLU.

    Args:
        parameter: path before the names of its matrices.
        tensor: the same of the tensors.
        size: letter of its width.
        bias: whether it has biases.
    """
    axes = (("gate", f"{size} D", f"D{size}"), ("up", f"{size} D", f"D{size}"),
            ("down", f"D {size}", f"{size}D"))  # fmt: skip
    weights = [
        Row(f"{parameter}{name}/weight", f"{tensor}{name}_proj.weight", there, here)
        for name, there, here in axes
    ]
    biases = [
        Row(f"{parameter}{name}/bias", f"{tensor}{name}_proj.bias", here[1], here[1])
        for name, _, here in axes
    ]
    return tuple(weights + biases if bias else weights)


def _always(rows: tuple[Row, ...]) -> Callable[[int], tuple[Row, ...]]:
    return lambda _: rows

"""Which model folders can be imported. Imports no jax, to refuse one at once."""

from pathlib import Path

from asa_jax.config import ModelConfig
from asa_jax.interop.deepseek import (
    deepseek_table,
    read_deepseek_v2,
    read_deepseek_v3,
    read_glm4_moe_lite,
)
from asa_jax.interop.export_native import native_table, read_native
from asa_jax.interop.hugging_face_config import HuggingFaceConfig
from asa_jax.interop.llama import llama_table, read_llama, read_qwen3
from asa_jax.interop.tensor_table import Table


def read_architecture(folder: Path) -> tuple[ModelConfig, Table]:
    """Reads the config.json of a model folder.

    Args:
        folder: a model as Hugging Face stores it.

    Returns:
        The architecture, and the table from its parameters to the tensors of the folder.

    Raises:
        ImportedModelError: config.json cannot be read, or the architecture is not supported.
    """
    source = HuggingFaceConfig.of_folder(folder)
    match source.text("model_type", ""):
        case "llama":
            cfg = read_llama(source)
            return cfg, llama_table(cfg)
        case "qwen3":
            cfg = read_qwen3(source)
            return cfg, llama_table(cfg)
        case "deepseek_v2":
            cfg = read_deepseek_v2(source)
            return cfg, deepseek_table(cfg)
        case "deepseek_v3":
            cfg = read_deepseek_v3(source)
        case "glm4_moe_lite":
            cfg = read_glm4_moe_lite(source)
        case "asa_jax":
            cfg = read_native(folder)
            return cfg, native_table(cfg)
        case _:
            known = "asa_jax, llama, qwen3, deepseek_v2, deepseek_v3, glm4_moe_lite"
            raise source.error("model_type", f"one of {known}; others are not supported")
    behind = source.count("num_nextn_predict_layers", 0)
    return cfg, deepseek_table(cfg, source.flag("rope_interleave", True), behind)

"""Model configurations small enough for exhaustive tests on a CPU."""

from typing import Any

import jax
import numpy as np

from asa_jax.config import ModelConfig, config_from_dict
from asa_jax.model.transformer import abstract_model
from configs import base

# For jax.jit(..., compiler_options=QUICK_COMPILE): optimising takes longer than a small test runs.
QUICK_COMPILE = {"xla_backend_optimization_level": 0}


def tiny_model_config(kinds: tuple[str, ...], **overrides: Any) -> ModelConfig:
    """A float32 model of a few thousand parameters with the given layers.

    The window and the selected blocks are smaller than a short prompt, so that a test of some tens
    of tokens crosses every boundary; weights are large enough that attention is not uniform.

    Args:
        kinds: `layer_kinds`.
        **overrides: other fields of `ModelConfig`.

    Returns:
        The checked configuration.
    """
    config = base.get_config()
    config.model.update(
        {
            "layer_kinds": kinds,
            "vocab_size": 64,
            "hidden_size": 32,
            "mlp_size": 64,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 16,
            "window_size": 12,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "num_latent_groups": 2,
            "group_kv_lora_rank": 12,
            "num_selected_blocks": 4,
            "init_stddev": 0.2,
            "compute_dtype": "float32",
            "attention_implementation": "auto",
            "remat": "none",
            "scan_layers": False,
            **overrides,
        }
    )
    return config_from_dict(config.to_dict()).model


def random_params(cfg: ModelConfig, seed: int = 0) -> Any:
    """Parameters of a model, drawn by numpy: compiling `init_params` takes seconds.

    Args:
        cfg: the architecture.
        seed: of the draws.

    Returns:
        Nested dict of float32 arrays: norm scales around 1, weights around 0.
    """
    rng = np.random.default_rng(seed)

    def draw(path: Any, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        values = rng.standard_normal(shape.shape, np.float32)
        is_scale = path[-1].key == "scale"
        return 1 + 0.1 * values if is_scale else cfg.init_stddev * values

    return jax.tree_util.tree_map_with_path(draw, abstract_model(cfg)[1])

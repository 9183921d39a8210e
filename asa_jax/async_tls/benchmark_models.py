"""Models of known shapes with random weights and caches, for `benchmark`.

A cache of random keys says nothing of how a text's tokens weigh, and random weights make queries
that hardly resemble those of the step before. So the benchmark feeds the layers no embeddings of
tokens but a random walk on the sphere, x_t = c x_{t-1} + sqrt(1 - c^2) noise, whose cosine c sets
how fast queries drift; all else of a step, from projections to the choice of a token, is the
model's. What c stands for a real text is not known: times are true, hit rates are those of c.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from asa_jax.async_tls.model_layers import build_model, caches_of
from asa_jax.config import ModelConfig
from asa_jax.decoding.random_params import random_array
from asa_jax.interop.deepseek import read_glm4_moe_lite
from asa_jax.interop.hugging_face_config import HuggingFaceConfig
from asa_jax.interop.llama import read_qwen3
from asa_jax.model.transformer import abstract_model

# As in the config.json of each; GLM's layers that predict further tokens are left out.
_QWEN3_8B = {
    "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
    "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": False,
}  # fmt: skip
_GLM_4_7_FLASH = {
    "vocab_size": 154880, "hidden_size": 2048, "intermediate_size": 10240,
    "num_hidden_layers": 47, "num_attention_heads": 20, "num_key_value_heads": 20,
    "q_lora_rank": 768, "kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64,
    "v_head_dim": 256, "first_k_dense_replace": 1, "n_routed_experts": 64,
    "num_experts_per_tok": 4, "n_shared_experts": 1, "moe_intermediate_size": 1536, "n_group": 1,
    "topk_group": 1, "routed_scaling_factor": 1.8, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
    "tie_word_embeddings": False,
}  # fmt: skip
_READERS = {
    "qwen3_8b": (read_qwen3, _QWEN3_8B),
    "glm_4_7_flash": (read_glm4_moe_lite, _GLM_4_7_FLASH),
}
MODELS = tuple(_READERS)


def model_of(name: str, num_layers: int) -> ModelConfig:
    """The architecture of a name in bfloat16, layers in a list.

    Args:
        name: of `MODELS`.
        num_layers: how many of its layers, the first ones; 0 for all.
    """
    read, values = _READERS[name]
    if num_layers:
        values = {**values, "num_hidden_layers": num_layers}
    cfg = read(HuggingFaceConfig(Path(name), values))
    return dataclasses.replace(cfg, scan_layers=False, compute_dtype="bfloat16")


def abstract_caches(cfg: ModelConfig, batch: int, length: int) -> list[Any]:
    """Shapes of the caches of all layers, for rows of so many tokens."""
    model = build_model(cfg, abstract_model(cfg)[1])
    return caches_of(jax.eval_shape(lambda: model.init_cache(batch, length)))


def random_caches(cfg: ModelConfig, batch: int, length: int) -> Iterator[Any]:
    """Caches of all layers, one after another, full of normal keys and values, alike in all rows.

    Numbers need three times their memory while they are drawn, so rows that fit could not be.
    """
    for number, cache in enumerate(abstract_caches(cfg, 1, length)):
        leaves, structure = jax.tree.flatten(cache)
        drawn = [random_array(number * 7 + i, x.shape, x.dtype, 1.0) for i, x in enumerate(leaves)]
        yield jax.tree.unflatten(structure, [jnp.repeat(x, batch, axis=0) for x in drawn])


def first_inputs(cfg: ModelConfig, batch: int) -> jax.Array:
    """Inputs [B, D] of the first layer, each number of variance 1."""
    return random_array(0, (batch, cfg.hidden_size), jnp.dtype(cfg.compute_dtype), 1.0)


@functools.partial(jax.jit, static_argnames="cosine")
def next_inputs(x: jax.Array, step: jax.Array, *, cosine: float) -> jax.Array:
    """One step of the random walk; see the module."""
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(1), step), x.shape)
    return (cosine * x + math.sqrt(1 - cosine**2) * noise).astype(x.dtype)

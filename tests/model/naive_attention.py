"""The attention layers once more, in float64 numpy, for one document, with dense masks and loops.

Latents are expanded to keys and values of each head where the product absorbs (global layers), and
the other way round (local layers).
"""

from typing import Any

import numpy as np

from asa_jax.config import ModelConfig

Array = np.ndarray
einsum = np.einsum


def grouped_query(params: Any, x: Array, cfg: ModelConfig, window_size: int | None) -> Array:
    """Kinds `full` and `sliding`; x [T, D]."""
    query = rotate(project("TD,DNH->TNH", x, params["query"]), cfg)
    key, value = project("TD,PDKH->PTKH", x, params["key_value"])
    mask = causal(len(x), window_size)
    output, _ = attend(query, rotate(key, cfg), value, mask, cfg.head_dim**-0.5)
    return project("TNH,NHD->TD", output, params["output"])


def absorbed_latent(params: Any, x: Array, cfg: ModelConfig, window_size: int | None) -> Array:
    """Kinds `mla` and `local`: queries score the latents, which are also the values."""
    nope, rope = _decoupled_query(params["query"], x, cfg)
    query = np.concatenate([project("TNH,RNH->TNR", nope, params["key_up"]), rope], axis=-1)
    latent = _latent(params, "TD,DR->TR", x, cfg)[:, None]
    key = np.concatenate([latent, _rope_key(params, x, cfg)], axis=-1)
    mask = causal(len(x), window_size)
    mixed, _ = attend(query, key, latent, mask, _latent_scale(cfg))
    output = project("TNR,RNH->TNH", mixed, params["value_up"])
    return project("TNH,NHD->TD", output, params["output"])


def expanded_global(params: Any, x: Array, cfg: ModelConfig) -> Array:
    """Kind `global`: keys and values of every head, pooled after the up-projections."""
    query = np.concatenate(_decoupled_query(params["query"], x, cfg), axis=-1)
    latent = _latent(params, "TD,DKR->TKR", x, cfg)
    latent = np.repeat(latent, cfg.num_heads // cfg.num_latent_groups, axis=1)
    rope_key = np.repeat(_rope_key(params, x, cfg), cfg.num_heads, axis=1)
    key = np.concatenate([project("TNR,RNH->TNH", latent, params["key_up"]), rope_key], axis=-1)
    value = project("TNR,RNH->TNH", latent, params["value_up"])
    blocks = _blocks(len(x), cfg)
    summaries = [np.stack([a[block].mean(0) for block in blocks]) for a in (key, value)]
    scale = _latent_scale(cfg)
    compressed, probabilities = attend(query, *summaries, complete(len(x), cfg), scale)
    mask = selection_mask(probabilities, cfg, cfg.num_latent_groups)
    selected, _ = attend(query, key, value, mask, scale)
    return _gated_output(params, x, [compressed, selected])


def native_sparse(params: Any, x: Array, cfg: ModelConfig) -> Array:
    """Kind `nsa`, all three branches."""
    query = rotate(project("TD,DNH->TNH", x, params["query"]), cfg)
    pairs = project("TD,PDKH->PTKH", x, params["key_value"])
    pairs = pairs.reshape(-1, 2, *pairs.shape[1:])
    compression, selection, window = np.broadcast_to(pairs, (3, *pairs.shape[1:]))
    scale = cfg.head_dim**-0.5
    compressed, probabilities = attend(
        query, *_summaries(params, *compression, cfg), complete(len(x), cfg), scale
    )
    mask = selection_mask(probabilities, cfg, cfg.num_kv_heads)
    selected, _ = attend(query, rotate(selection[0], cfg), selection[1], mask, scale)
    near = causal(len(x), cfg.window_size)
    recent, _ = attend(query, rotate(window[0], cfg), window[1], near, scale)
    return _gated_output(params, x, [compressed, selected, recent])


def attend(
    query: Array, key: Array, value: Array, mask: Array, scale: float
) -> tuple[Array, Array]:
    """Outputs [T, N, h] and probabilities [N, T, S]; zero where a token sees nothing."""
    repeats = query.shape[1] // key.shape[1]
    key, value = np.repeat(key, repeats, axis=1), np.repeat(value, repeats, axis=1)
    weights = mask * np.exp(scale * einsum("TNH,SNH->NTS", query, key))
    total = weights.sum(-1, keepdims=True)
    weights /= total + (total == 0)
    return einsum("NTS,SNH->TNH", weights, value), weights


def causal(length: int, window_size: int | None = None) -> Array:
    """Which tokens s (columns) a token t (rows) sees."""
    distance = np.arange(length)[:, None] - np.arange(length)
    return (distance >= 0) & (distance < (window_size or length))


def complete(length: int, cfg: ModelConfig) -> Array:
    """Which compressed blocks (columns) are complete at a token (rows)."""
    last = np.array([block[-1] for block in _blocks(length, cfg)])
    return last <= np.arange(length)[:, None]


def selection_mask(probabilities: Array, cfg: ModelConfig, num_groups: int) -> Array:
    """Which tokens each head may see of the blocks its group selects, [N, T, T]."""
    heads, length, _ = probabilities.shape
    by_group = probabilities.reshape(num_groups, heads // num_groups, length, -1).sum(1)
    mask = np.zeros((num_groups, length, length), bool)
    block = np.arange(length) // cfg.selection_block_size
    for first in range(0, length, cfg.queries_per_selection):
        queries = slice(first, first + cfg.queries_per_selection)
        for group in range(num_groups):
            mask[group, queries] = np.isin(block, select(by_group[group, first], first, cfg))
    return np.repeat(mask & causal(length), heads // num_groups, axis=0)


def select(importance: Array, position: int, cfg: ModelConfig) -> list[int]:
    """The forced blocks, then the most important ones; `importance` of compressed blocks."""
    own = position // cfg.selection_block_size
    forced = {0, max(0, own - 1), own}

    def total(block: int) -> float:
        """Compressed blocks count by the tokens that they share with the block."""
        start, size = cfg.selection_block_size * block, cfg.selection_block_size
        return sum(
            weight * sum(start <= token < start + size for token in _block(j, cfg))
            for j, weight in enumerate(importance)
        )

    others = sorted(set(range(own)) - forced, key=total, reverse=True)
    return sorted(forced) + others[: cfg.num_selected_blocks - len(forced)]


def rotate(x: Array, cfg: ModelConfig, positions: Array | None = None) -> Array:
    """Rotary embedding of [T, heads, H] as a rotation of complex numbers."""
    half = x.shape[-1] // 2
    positions = np.arange(len(x)) if positions is None else positions
    angles = positions[:, None, None] * cfg.rope_theta ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def project(equation: str, x: Array, projection: Any) -> Array:
    """einsum with the weight of a Projection."""
    return einsum(equation, x, projection["weight"].astype(np.float64))


def rms_norm(x: Array, scale: Array, epsilon: float) -> Array:
    """x / sqrt(mean(x^2) + epsilon) * scale."""
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon) * scale


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x))."""
    return 1 / (1 + np.exp(-x))


def _block(j: int, cfg: ModelConfig) -> range:
    """Tokens of compression block j."""
    return range(
        cfg.compression_stride * j, cfg.compression_stride * j + cfg.compression_block_size
    )


def _blocks(length: int, cfg: ModelConfig) -> list[range]:
    """Tokens of every whole compression block."""
    return [_block(j, cfg) for j in range(length) if _block(j, cfg)[-1] < length]


def _latent_scale(cfg: ModelConfig) -> float:
    return (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim) ** -0.5


def _latent(params: Any, equation: str, x: Array, cfg: ModelConfig) -> Array:
    latent = project(equation, x, params["down"])
    return rms_norm(latent, params["norm"]["scale"], cfg.norm_epsilon)


def _rope_key(params: Any, x: Array, cfg: ModelConfig) -> Array:
    return rotate(project("TD,DH->TH", x, params["rope_key"])[:, None], cfg)


def _decoupled_query(params: Any, x: Array, cfg: ModelConfig) -> tuple[Array, Array]:
    if cfg.q_lora_rank:
        x = rms_norm(
            project("TD,DR->TR", x, params["down"]), params["norm"]["scale"], cfg.norm_epsilon
        )
    query = project("TD,DNH->TNH", x, params["up"])
    nope, rope = np.split(query, [cfg.qk_nope_head_dim], axis=-1)
    return nope, rotate(rope, cfg)


def _summaries(params: Any, key: Array, value: Array, cfg: ModelConfig) -> list[Array]:
    """Keys and values of the compressed blocks [C, K, H]."""
    blocks = _blocks(len(key), cfg)
    if cfg.nsa_compression == "mean":
        key = rotate(key, cfg)
        return [np.stack([a[block].mean(0) for block in blocks]) for a in (key, value)]
    starts = np.array([block[0] for block in blocks])
    key = np.stack([_mlp_summary(params["key_summary"], key[block]) for block in blocks])
    value = np.stack([_mlp_summary(params["value_summary"], value[block]) for block in blocks])
    return [rotate(key, cfg, starts), value]


def _mlp_summary(params: Any, block: Array) -> Array:
    """Summary [K, H] of a block [l, K, H]."""
    block = block + params["code"][:, None]
    hidden = project("LKH,LHF->KF", block, params["into"])
    return project("KF,FH->KH", hidden * sigmoid(hidden), params["out"])


def _gated_output(params: Any, x: Array, branches: list[Array]) -> Array:
    gates = sigmoid(project("TD,DNE->TNE", x, params["gates"]))
    mixed = einsum("TNE,ETNH->TNH", gates, np.stack(branches))
    return project("TNH,NHD->TD", mixed, params["output"])

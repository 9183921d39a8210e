"""Floating-point operations of a training step and the peak of known devices."""

from typing import NamedTuple

import jax

from asa_jax.config import ModelConfig

# Dense bfloat16 operations a second, from the makers' data sheets; the first name that matches.
PEAK_FLOPS = (
    ("B200", 2250e12), ("H200", 989e12), ("H100 PCIe", 756e12), ("H100", 989e12),
    ("A100", 312e12), ("TPU v6", 918e12), ("TPU v5 lite", 197e12), ("TPU v5", 459e12),
    ("TPU v4", 275e12),
)  # fmt: skip


def peak_flops(model: ModelConfig) -> float | None:
    """Peak of all devices together in the model's compute dtype; None where it is not known."""
    if model.compute_dtype != "bfloat16":
        return None
    kind = jax.devices()[0].device_kind
    peaks = (peak for name, peak in PEAK_FLOPS if name in kind)
    peak = next(peaks, None)
    return None if peak is None else peak * jax.device_count()


def flops_per_token(model: ModelConfig, params: int, length: int) -> float:
    """Operations of one token, forwards and backwards, without recomputation.

    6 for each weight that is multiplied (not in an embedding table that is only looked up, nor in
    the experts that a token does not get), and
    6 N (H + h) for each key that a query of a layer sees, on average over a row of one document;
    latent layers in expanded form.

    Args:
        model: the architecture.
        params: its number of parameters.
        length: T, tokens a row.

    Returns:
        Floating-point operations a token.
    """
    looked_up = 0 if model.tie_embeddings else model.vocab_size * model.hidden_size
    attention = sum(
        _keys(model, kind, length) * _features(model, kind) for kind in model.layer_kinds
    )
    used = params - looked_up - _idle_weights(model)
    return 6 * used + 6 * model.num_heads * attention


def _idle_weights(model: ModelConfig) -> int:
    """Weights of the experts that a token does not get."""
    experts = model.experts
    if not experts.num_experts:
        return 0
    idle = experts.num_experts - experts.num_experts_per_token
    layers = model.num_layers - experts.num_dense_layers
    return layers * idle * 3 * model.hidden_size * experts.expert_size


def _features(model: ModelConfig, kind: str) -> int:
    """H + h of a layer kind."""
    if kind in ("full", "sliding", "nsa"):
        return 2 * model.head_dim
    return model.qk_nope_head_dim + model.qk_rope_head_dim + model.v_head_dim


class AttentionWork(NamedTuple):
    """One operation of an attention layer.

    Attributes:
        op: causal, window, compressed, selected, or select, which has scores alone and no gradient.
        keys: that a query sees on average over a row of one document.
        key_dim: features of a key.
        value_dim: features of a value.
    """

    op: str
    keys: float
    key_dim: int
    value_dim: int

    def flops(self, *, backward: bool = False) -> float:
        """Operations of one query and head; backwards with the scores computed anew."""
        if self.op == "select":
            return 0.0 if backward else 2 * self.keys * self.key_dim
        passes = (3, 2) if backward else (1, 1)
        return 2 * self.keys * (passes[0] * self.key_dim + passes[1] * self.value_dim)


def attention_work(model: ModelConfig, kind: str, length: int) -> list[AttentionWork]:
    """The operations of a layer as they are computed in training: latents of `global` absorbed."""
    if kind in ("full", "sliding", "nsa"):
        dims = model.head_dim, model.head_dim
    elif kind == "global":
        rank = model.group_kv_lora_rank
        dims = rank + model.qk_rope_head_dim, rank
    else:
        dims = model.qk_nope_head_dim + model.qk_rope_head_dim, model.v_head_dim
    keys = _keys_by_op(model, kind, length)
    works = [AttentionWork(op, seen, *dims) for op, seen in keys.items()]
    if "selected" in keys:
        # One query in so many makes a list.
        scored = keys["compressed"] / model.queries_per_selection
        works.append(AttentionWork("select", scored, *dims))
    return works


def _keys(model: ModelConfig, kind: str, length: int) -> float:
    """Keys that a query sees on average."""
    return sum(_keys_by_op(model, kind, length).values())


def _keys_by_op(model: ModelConfig, kind: str, length: int) -> dict[str, float]:
    """The same by operation of attention."""

    def newest(most: int) -> float:
        most = min(most, length)
        return most - most * (most - 1) / (2 * length)

    if kind in ("full", "mla"):
        return {"causal": newest(length)}
    if kind in ("sliding", "local"):
        return {"window": newest(model.window_size)}
    every = {
        "compressed": newest(length) / model.compression_stride,
        "selected": newest(model.num_selected_blocks * model.selection_block_size),
        "window": newest(model.window_size),
    }
    branches = {"compression": "compressed", "selection": "selected", "window": "window"}
    taken = ("compression", "selection") if kind == "global" else model.nsa_branches
    return {branches[branch]: every[branches[branch]] for branch in taken}

"""Mixture of experts in place of an MLP: a few of many small SwiGLUs for each token, by a router.

With scores s_e = softmax_e(x W) (DeepSeek-V2, arXiv 2405.04434) or sigmoid(x W)_e (DeepSeek-V3,
arXiv 2412.19437, equations 12 to 16, where a bias b corrects the choice of experts alone):

    E(x) = the top k experts by s_e + b_e, of the groups whose best experts score highest
    y    = SwiGLU_shared(x) + scale * sum_{e in E(x)} g_e SwiGLU_e(x),   g_e = s_e [/ sum of them]

A group counts by its best expert (softmax), or by the sum of its two best (sigmoid). Tokens are
sorted by expert, so that the experts are three ragged products, whatever the router does.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from asa_jax.config import ModelConfig
from asa_jax.model.layers import Projection, SwiGLU, normal_param, residual_stddev
from asa_jax.sharding import gather_embed, sharded

INTO = ("experts", "embed", "mlp")
OUT = ("experts", "mlp", "embed")


class Router(nnx.Module):
    """Chooses the experts of a token and weighs them; see the module's equations."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.cfg = cfg.experts
        num_experts = self.cfg.num_experts
        self.scores = Projection(
            (cfg.hidden_size, num_experts), ("embed", "gates"), cfg.init_stddev, rngs=rngs
        )
        self.correction = (
            nnx.Param(jnp.zeros((num_experts,), jnp.float32), axes=("gates",))
            if self.cfg.scoring == "sigmoid"
            else None
        )

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps [..., D] to k experts int [..., k] and their weights float32 [..., k]."""
        with jax.default_matmul_precision("highest"):  # a rounding here is another expert
            logits = self.scores("...D,DE->...E", x.astype(jnp.float32))
        if self.correction is None:
            choice = scores = jax.nn.softmax(logits)
        else:
            scores = jax.nn.sigmoid(logits)
            choice = scores + self.correction[...]
        if self.cfg.num_groups > 1:
            choice = self._of_best_groups(choice)
        _, experts = jax.lax.top_k(choice, self.cfg.num_experts_per_token)
        weights = jnp.take_along_axis(scores, experts, axis=-1)
        if self.cfg.normalize:
            weights /= jnp.sum(weights, axis=-1, keepdims=True) + 1e-20
        return experts, weights * self.cfg.routed_scale

    def _of_best_groups(self, choice: jax.Array) -> jax.Array:
        """Scores [..., E], minus infinity outside of the selected groups."""
        groups = self.cfg.num_groups
        grouped = choice.reshape(*choice.shape[:-1], groups, -1)
        counted = 1 if self.correction is None else 2
        best = jnp.sum(jax.lax.top_k(grouped, counted)[0], axis=-1)
        _, selected = jax.lax.top_k(best, self.cfg.num_selected_groups)
        kept = jnp.any(jax.nn.one_hot(selected, groups, dtype=bool), axis=-2)
        return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(choice.shape)


class MixtureOfExperts(nnx.Module):
    """Routed and shared experts; see the module's equations."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs) -> None:
        experts, std = cfg.experts, cfg.init_stddev
        into = (experts.num_experts, cfg.hidden_size, experts.expert_size)
        out = (into[0], into[2], into[1])
        self.router = Router(cfg, rngs=rngs)
        self.gate, self.up = (normal_param(into, INTO, std, rngs) for _ in range(2))
        self.down = normal_param(out, OUT, residual_stddev(cfg), rngs)
        size = experts.num_shared_experts * experts.expert_size
        self.shared = SwiGLU(cfg, size, rngs=rngs) if size else None

    @jax.named_scope("mlp")
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., D] to [..., D]."""
        experts, weights = self.router(x)
        tokens = (*("batch", "sequence")[: x.ndim - 1], "activation")
        mix = sharded(_mix, (tokens, tokens, tokens, INTO, INTO, OUT), ("mlp", *tokens))
        matrices = (w[...].astype(x.dtype) for w in (self.gate, self.up, self.down))
        y = jnp.sum(mix(x, experts, weights, *matrices), axis=0)
        return y if self.shared is None else y + self.shared(x)


def _mix(
    x: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
) -> jax.Array:
    """The weighted sum [1, ..., D] of one device's part of each token's experts."""
    gate, up, down = gather_embed(gate, 1), gather_embed(up, 1), gather_embed(down, 2)
    order = jnp.argsort(experts.reshape(-1))
    rows = x.reshape(-1, x.shape[-1])[order // experts.shape[-1]]
    sizes = jnp.bincount(experts.reshape(-1), length=gate.shape[0])
    hidden = jax.nn.silu(jax.lax.ragged_dot(rows, gate, sizes))
    hidden = hidden * jax.lax.ragged_dot(rows, up, sizes)
    y = jax.lax.ragged_dot(hidden, down, sizes)[jnp.argsort(order)]
    mixed = jnp.einsum("...kD,...k->...D", y.reshape(*experts.shape, -1), weights)
    return mixed.astype(x.dtype)[None]

"""Parameters with logical axes, RMSNorm, SwiGLU and token embeddings.

Weights are float32 masters; they are cast to the dtype of the activations where they are used.
"""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from asa_jax.config import ModelConfig
from asa_jax.sharding import gather_embed, gathered, sharded, tensor_shards

# 8 parts, as XLA splits a sum into, of 8 numbers or more, as it copies at once.
FEATURES_MULTIPLE = 64


def normal_param(
    shape: tuple[int, ...], axes: tuple[str, ...], stddev: float, rngs: nnx.Rngs
) -> nnx.Param:
    """A normally distributed float32 parameter with one logical axis name a dimension."""
    return nnx.Param(stddev * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes)


class Projection(nnx.Module):
    """A weight, with a bias or without, applied by einsum."""

    def __init__(
        self,
        shape: tuple[int, ...],
        axes: tuple[str, ...],
        stddev: float,
        *,
        bias: tuple[int, ...] = (),
        rngs: nnx.Rngs,
    ) -> None:
        """Draws the weight.

        Args:
            shape: of the weight.
            axes: its logical axes.
            stddev: of the draws.
            bias: dimensions of the weight that the bias has, those of the result; (): no bias.
            rngs: source of the draws.
        """
        self.weight, self.axes = normal_param(shape, axes, stddev, rngs), axes
        of_bias = [shape[i] for i in bias], tuple(axes[i] for i in bias)
        self.bias = nnx.Param(jnp.zeros(of_bias[0], jnp.float32), axes=of_bias[1]) if bias else None

    def __call__(self, equation: str, x: jax.Array) -> jax.Array:
        """Returns einsum(equation, x, weight) + bias in the dtype of x."""
        y = _product(equation, x, self.matrix(x))
        return y if self.bias is None else y + _broadcast(self.bias[...].astype(x.dtype), equation)

    def matrix(self, x: jax.Array) -> jax.Array:
        """The weight as a product with x takes it."""
        weight = self.weight[...].astype(x.dtype)
        # Of the two the smaller one should travel; in decoding that is x.
        return gathered(weight, self.axes) if x.size > weight.size else weight


def _product(equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """einsum(equation, x, weight), of matrices where x is small and several axes are summed.

    XLA may take such axes in another order, as what made x suits, and transpose the weight for it.
    """
    inputs, result = equation.split("->")
    of_x, of_weight = inputs.split(",")
    summed = "".join(name for name in of_x if name in of_weight and name not in result)
    count = len(summed)
    in_order = of_x.endswith(summed) and of_weight.startswith(summed)
    if x.size > weight.size or count < 2 or not in_order:
        return jnp.einsum(equation, x, weight)
    kept, new = x.shape[:-count], weight.shape[count:]
    y = x.reshape(*kept, -1) @ weight.reshape(-1, math.prod(new))
    return y.reshape(*kept, *new)


def _broadcast(bias: jax.Array, equation: str) -> jax.Array:
    """Gives a bias the dimensions of the result: those that the weight of the equation has."""
    weight, result = equation.split(",")[1].split("->")
    sizes = iter(bias.shape)
    return bias.reshape([next(sizes) if name in weight else 1 for name in result.strip(".")])


class JoinedProjections(nnx.Module):
    """Projections of the same vectors as one product, in the place of a small one for each."""

    def __init__(self, weights: Sequence[jax.Array]) -> None:
        """Joins weights [D, ...] of projections without biases."""
        self.shapes = tuple(weight.shape[1:] for weight in weights)
        joined = [weight.reshape(weight.shape[0], -1) for weight in weights]
        self.weight = nnx.Param(jnp.concatenate(joined, axis=1))

    def __call__(self, x: jax.Array) -> list[jax.Array]:
        """Maps [..., D] to what each projection makes of it: [..., *rest of its weight]."""
        ends = list(itertools.accumulate(map(math.prod, self.shapes)))
        parts = jnp.split(x @ self.weight[...].astype(x.dtype), ends[:-1], axis=-1)
        kept = x.shape[:-1]
        return [y.reshape(*kept, *shape) for y, shape in zip(parts, self.shapes, strict=True)]


def join(*projections: tuple[Projection, int]) -> JoinedProjections | None:
    """Joins projections, each with the axis of its weight that is summed; None with biases."""
    if any(projection.bias is not None for projection, _ in projections):
        return None
    return JoinedProjections([jnp.moveaxis(p.weight[...], axis, 0) for p, axis in projections])


class RMSNorm(nnx.Module):
    """y = x / sqrt(mean(x^2) + epsilon) * scale over the last axis (Zhang and Sennrich, 2019)."""

    def __init__(self, size: int, epsilon: float, *, axis: str = "activation") -> None:
        self.scale = nnx.Param(jnp.ones((size,), jnp.float32), axes=(axis,))
        self.epsilon = epsilon

    @jax.named_scope("norm")
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis with float32 statistics; shape and dtype as x."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(mean_square + self.epsilon) * self.scale[...]).astype(x.dtype)


class SwiGLU(nnx.Module):
    """y = (silu(x W_gate) * (x W_up)) W_down (Shazeer, 2020)."""

    def __init__(self, cfg: ModelConfig, size: int | None = None, *, rngs: nnx.Rngs) -> None:
        """Draws the weights.

        Args:
            cfg: the architecture.
            size: features in between; None: `cfg.mlp_size`.
            rngs: source of the draws.
        """
        into, std = (cfg.hidden_size, size or cfg.mlp_size), cfg.init_stddev
        bias = (1,) if cfg.mlp_bias else ()
        self.gate = Projection(into, ("embed", "mlp"), std, bias=bias, rngs=rngs)
        self.up = Projection(into, ("embed", "mlp"), std, bias=bias, rngs=rngs)
        self.down = Projection(
            into[::-1], ("mlp", "embed"), residual_stddev(cfg), bias=bias, rngs=rngs
        )
        self.joined: JoinedProjections | None = nnx.data(None)
        self.padded_down: nnx.Param | None = nnx.data(None)

    def join(self) -> None:
        """Joins what multiplies the same vectors, for a loop of steps with few of them.

        Features are padded, or XLA would pad the weight of `down` at every step to split its sum.
        """
        if self.gate.bias is not None:
            return
        gate, up, down = (p.weight[...] for p in (self.gate, self.up, self.down))
        padding = (0, -down.shape[0] % FEATURES_MULTIPLE)
        self.joined = JoinedProjections([jnp.pad(w, ((0, 0), padding)) for w in (gate, up)])
        self.padded_down = nnx.Param(jnp.pad(down, (padding, (0, 0))))

    @jax.named_scope("mlp")
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., D] to [..., D]."""
        if self.joined is not None and self.padded_down is not None:
            gate, up = self.joined(x)
            return _gated(gate, up) @ self.padded_down[...].astype(x.dtype)
        # Between gate and up and the product of both a scan over layers keeps nothing.
        gated = jax.checkpoint(_gated, prevent_cse=False)(*self._gate_and_up(x))
        return self.down("...F,FD->...D", gated)

    def _gate_and_up(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x W_gate and x W_up, [..., F] each."""
        pair, weight = (self.gate, self.up), self.gate.weight
        if x.size <= weight.size or self.gate.bias is not None:
            gate, up = (projection("...D,DF->...F", x) for projection in pair)
            return gate, up
        # One product, so that the gradient of x is one too. The weights are joined for that, which
        # costs little beside the activations of training and more than the product in decoding.
        # The two lie side by side, feature by feature: their gradients are made of the same three
        # numbers, which would be read again for a place far away.
        both = jnp.stack([projection.matrix(x) for projection in pair], axis=-1)
        both = jnp.einsum("...D,DFE->...FE", x, both)
        return both[..., 0], both[..., 1]


def _gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


class TokenEmbedding(nnx.Module):
    """Token vectors and the matrix that maps hidden states to logits, tied or not."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs) -> None:
        shape, std = (cfg.vocab_size, cfg.hidden_size), cfg.init_stddev
        self.table = normal_param(shape, ("vocab", "embed"), std, rngs)
        self.output = (
            None if cfg.tie_embeddings else normal_param(shape[::-1], ("embed", "vocab"), std, rngs)
        )
        self.dtype = jnp.dtype(cfg.compute_dtype)

    @jax.named_scope("embedding")
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Looks up [..., D] vectors of tokens [...], which must lie in [0, V)."""
        place = ("batch", "sequence")[: tokens.ndim]
        look_up = sharded(_look_up, (("vocab", "embed"), place), ("vocab", *place, "activation"))
        return jnp.sum(look_up(self.table[...].astype(self.dtype), tokens), axis=0)

    def unembedding(self) -> jax.Array:
        """The [D, V] matrix of the logits."""
        matrix = self.table[...].T if self.output is None else self.output[...]
        return matrix.astype(self.dtype)


def _look_up(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Vectors [1, ..., D] of tokens [...], zero for words of other tensor shards than this."""
    table = gather_embed(table, axis=1)
    if tensor_shards() == 1:
        return _take_rows(table, tokens)[None]
    rows = tokens - table.shape[0] * jax.lax.axis_index("tensor")
    known = (rows >= 0) & (rows < table.shape[0])
    return jnp.where(known[..., None], _take_rows(table, rows), 0)[None]


def _take_rows(table: jax.Array, rows: jax.Array) -> jax.Array:
    """Rows of a table, the nearest ones for numbers outside; the gradient is summed in float32.

    In bfloat16 the sum over the places of a frequent token would stand still at 256 times a term.
    """
    shape, dtype = table.shape, table.dtype

    @jax.custom_vjp
    def take(table: jax.Array, rows: jax.Array) -> jax.Array:
        return jnp.take(table, rows, axis=0, mode="clip")

    def backward(rows: jax.Array, d_taken: jax.Array) -> tuple[jax.Array, None]:
        wide = jnp.promote_types(dtype, jnp.float32)
        sums = jnp.zeros(shape, wide).at[jnp.clip(rows, 0, shape[0] - 1)]
        return sums.add(d_taken.astype(wide)).astype(dtype), None

    take.defvjp(lambda table, rows: (take(table, rows), rows), backward)
    return take(table, rows)


def residual_stddev(cfg: ModelConfig) -> float:
    """Initial scale of projections into the residual stream: depth keeps its variance (GPT-2)."""
    return cfg.init_stddev / (2 * cfg.num_layers) ** 0.5

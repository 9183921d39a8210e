"""One device's share of a training step, traced on shapes alone.

What a device does under a mesh is the step of a smaller model on fewer rows and tokens: heads, MLP
and vocabulary divided by `tensor`, rows by `data` and `fsdp`, tokens by `context`. Tracing that one
tells its products and what its backward pass keeps, whatever the layers are.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

from asa_jax.config import Config
from asa_jax.model.transformer import abstract_model, shortest_period
from asa_jax.training.flops import attention_work
from asa_jax.training.step import make_sums

# Operations of pallas_kernels: their work is counted by formula, since another form runs on a GPU.
_ATTENTION = re.compile(
    r"(causal_attention|sliding_window_attention|compressed_attention|select_blocks|"
    r"selected_attention)"
)
# Layer groups of the trace that tells what one keeps: no other axis has this size.
_PROBE = 1009
BATCH = ("inputs", "targets", "positions", "segment_ids")


class Product(NamedTuple):
    """Matrix products of one shape.

    Attributes:
        flops: of one.
        bytes: that one reads and writes.
        times: in a step.
    """

    flops: float
    bytes: float
    times: int


class Share(NamedTuple):
    """What one device does in one part of the batch (`batch_parts` of them are a step).

    Attributes:
        products: outside of attention.
        kept_bytes: what the forward pass of all layers keeps for the backward pass.
        group_bytes: what one group of layers needs while its backward pass runs.
        rows: of the batch.
    """

    products: list[Product]
    kept_bytes: int
    group_bytes: int
    rows: int


def local_config(config: Config, mesh: Mapping[str, int]) -> Config:
    """The model, rows and tokens of one device, scanned: it compiles alike and traces faster."""
    model, tensor = config.model, mesh["tensor"]
    heads = model.num_heads // tensor
    model = dataclasses.replace(
        model,
        num_heads=heads,
        num_kv_heads=max(1, model.num_kv_heads // tensor),
        num_latent_groups=min(model.num_latent_groups, heads),
        mlp_size=model.mlp_size // tensor,
        vocab_size=model.vocab_size // tensor,
        scan_layers=True,
    )
    shards = mesh["data"] * mesh["fsdp"]
    data = dataclasses.replace(
        config.data,
        batch_size=config.data.batch_size // shards // config.batch_parts(mesh),
        sequence_length=config.data.sequence_length // mesh["context"],
    )
    optimizer = dataclasses.replace(config.optimizer, accumulation_steps=1)
    return dataclasses.replace(config, model=model, data=data, optimizer=optimizer)


def trace_share(config: Config, mesh: Mapping[str, int]) -> Share:
    """Traces the loss and its gradient for one device.

    Args:
        config: the whole run.
        mesh: sizes of the mesh axes.

    Returns:
        What the device does for one part of the batch.
    """
    local = local_config(config, mesh)
    params = abstract_model(local.model)[1]
    gradient = jax.make_jaxpr(jax.grad(_loss(local)))(params, _batch(local))
    groups = local.model.num_layers // len(shortest_period(local.model.layer_kinds))
    return Share(
        products=list(_products(gradient.jaxpr, 1)),
        kept_bytes=groups * (_residual_bytes(local) + _attention_bytes(local)),
        group_bytes=_residual_bytes(_changed(local, remat="none")),
        rows=local.data.batch_size,
    )


def _changed(config: Config, **fields: Any) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **fields))


def _loss(config: Config) -> Any:
    graphdef, _, _ = abstract_model(config.model)
    lengths = np.ones(config.model.vocab_size, np.int32)
    sums = make_sums(graphdef, lengths, config.training.loss_chunk_tokens)
    return lambda params, batch: sums(params, batch)["nll"]


def _batch(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    shape = (config.data.batch_size, config.data.sequence_length)
    return {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in BATCH}


def _residual_bytes(config: Config) -> int:
    """Bytes that the forward pass of one group of layers leaves for the backward pass.

    Where kernels run, without those of attention: its XLA form keeps them in chunks, which have
    more axes than anything else.
    """
    period = shortest_period(config.model.layer_kinds)
    config = _changed(config, layer_kinds=period * _PROBE)
    loss, params = _loss(config), abstract_model(config.model)[1]

    def residuals(params: Any, batch: Any) -> Any:
        return jax.vjp(lambda params: loss(params, batch), params)[1]

    kept = jax.tree.leaves(jax.eval_shape(residuals, params, _batch(config)))
    own = {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(params)}
    most = 5 if config.model.attention_implementation == "auto" else math.inf
    return sum(
        leaf.size * leaf.dtype.itemsize // _PROBE
        for leaf in kept
        if leaf.shape[:1] == (_PROBE,) and (leaf.shape, leaf.dtype) not in own and leaf.ndim <= most
    )


def _attention_bytes(config: Config) -> int:
    """What kernels give and `remat` keeps: outputs, their log-sum-exps and lists of blocks."""
    model = config.model
    if model.remat in ("none", "full") or model.attention_implementation == "xla":
        return 0  # with 'none' it is among what the layers keep
    tokens = config.data.batch_size * config.data.sequence_length
    width = jnp.dtype(model.compute_dtype).itemsize
    total = 0
    for kind in shortest_period(model.layer_kinds):
        for work in attention_work(model, kind, config.data.sequence_length):
            if work.op == "select":
                lists = model.num_latent_groups if kind == "global" else model.num_kv_heads
                total += (
                    4 * tokens // model.queries_per_selection * lists * model.num_selected_blocks
                )
            else:
                total += tokens * model.num_heads * (work.value_dim * width + 4)
    return total


def _products(jaxpr: Any, times: int) -> Iterator[Product]:
    """The matrix products of a traced program, but for those of attention."""
    for equation in jaxpr.eqns:
        if _ATTENTION.search(str(equation.source_info.name_stack)):
            continue
        if equation.primitive.name == "dot_general":
            yield _product(equation, times)
        turns = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for inner in jaxprs_in_params(equation.params):
            yield from _products(inner, times * turns)


def _product(equation: Any, times: int) -> Product:
    left, right = (variable.aval for variable in equation.invars)
    (contracted, _), _ = equation.params["dimension_numbers"]
    result = equation.outvars[0].aval
    summed = math.prod(left.shape[axis] for axis in contracted)
    # Logits are float32 and are made of bfloat16; that width is what travels.
    arrays = sum(x.size * x.dtype.itemsize for x in (left, right, result))
    return Product(2.0 * result.size * summed, arrays, times)

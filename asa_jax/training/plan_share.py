"""One device's share of a training step, traced on shapes alone.

What a device does under a mesh is the step of a smaller model on fewer rows and tokens: heads, MLP
and vocabulary divided by `tensor`, rows by `data` and `fsdp`, tokens by `context`. That one is
traced as for a Hopper GPU, kernels included, and tells its products, its memory and its traffic,
whatever the layers are.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import jaxprs_in_params

from asa_jax.config import Config
from asa_jax.model.transformer import abstract_model
from asa_jax.training.plan_fusion import Demand, demand
from asa_jax.training.plan_program import read_program
from asa_jax.training.step import batch_shapes, make_sums
from pallas_kernels import dispatch

# Operations of pallas_kernels: their work is counted by formula, since another form runs on a GPU.
_ATTENTION = re.compile(
    r"(causal_attention|sliding_window_attention|compressed_attention|select_blocks|"
    r"selected_attention)"
)


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
        demand: memory and traffic; inputs, and the sums of accumulated gradients, are not in it.
        rows: of the batch.
    """

    products: list[Product]
    demand: Demand
    rows: int


def local_config(config: Config, mesh: Mapping[str, int]) -> Config:
    """The model, rows and tokens of one device."""
    model, tensor = config.model, mesh["tensor"]
    heads = model.num_heads // tensor
    model = dataclasses.replace(
        model,
        num_heads=heads,
        num_kv_heads=max(1, model.num_kv_heads // tensor),
        num_latent_groups=min(model.num_latent_groups, heads),
        mlp_size=model.mlp_size // tensor,
        vocab_size=model.vocab_size // tensor,
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
    with dispatch.assumed_hopper():
        gradient = jax.make_jaxpr(jax.grad(_loss(local)))(params, batch_shapes(local))
    # A gradient is divided like its parameter once it is whole.
    weights = {leaf.shape: 4 * leaf.size / mesh["fsdp"] for leaf in jax.tree.leaves(params)}
    return Share(
        products=list(_products(gradient.jaxpr, 1)),
        demand=demand(read_program(gradient.jaxpr, weights)),
        rows=local.data.batch_size,
    )


def _loss(config: Config) -> Any:
    graphdef, _, _ = abstract_model(config.model)
    lengths = np.ones(config.model.vocab_size, np.int32)
    sums = make_sums(graphdef, lengths, config.training.loss_chunk_tokens)
    return lambda params, batch: sums(params, batch)["nll"]


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

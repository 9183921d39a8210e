"""Parameters of one model as those of another over the same depth, layer by layer.

    the same kind                                  copied where the shapes agree
    full <-> sliding, mla <-> local                copied
    full, sliding -> mla, local, global            fitted on real tokens (convert_latent.py)

Everything else is refused before anything is computed. A model with stacked layers becomes one
without, and the other way round; tied embeddings can be untied.
"""

import functools
import logging
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from asa_jax.config import ModelConfig
from asa_jax.config_model import LATENT_KINDS
from asa_jax.context_parallel import in_row_order
from asa_jax.errors import ConfigError
from asa_jax.interop.convert_latent import fit_latent
from asa_jax.model.layers import TokenEmbedding
from asa_jax.model.param_layout import layer_places
from asa_jax.model.transformer import Layer, abstract_model
from asa_jax.sharding import constrain, param_shardings
from asa_jax.training.step import Batch

GROUPED_QUERY_KINDS = ("full", "sliding")
# Kinds whose parameters are alike.
COPIED_KINDS = (GROUPED_QUERY_KINDS, ("mla", "local"))
# Fields that change what the parameters do, but not their shapes.
MEANING = ("rope_theta", "rope_scaling", "norm_epsilon")

_log = logging.getLogger(__name__)


class LayerConversion(NamedTuple):
    """How well a layer that changed its kind does what it did; errors are relative norms.

    Attributes:
        layer: its number, from 0.
        source: its kind before.
        target: its kind now.
        key_error: of keys before rotation; 0 where they were copied.
        value_error: of values; 0 where they were copied.
        output_error: of what attention adds to the residual stream.
    """

    layer: int
    source: str
    target: str
    key_error: float
    value_error: float
    output_error: float

    def __str__(self) -> str:
        return (
            f"layer {self.layer} {self.source} -> {self.target}: relative error of keys "
            f"{self.key_error:.2%}, values {self.value_error:.2%}, output {self.output_error:.2%}"
        )


def convert_params(
    params: Any, source: ModelConfig, target: ModelConfig, mesh: Mesh, batch: Batch
) -> tuple[Any, list[LayerConversion]]:
    """Converts parameters; call it under `jax.set_mesh(mesh)`.

    Args:
        params: of the source, as `init_params` gives them.
        source: the model that they are of.
        target: the model to convert to.
        mesh: the devices.
        batch: real text, on which layers are fitted and errors measured.

    Returns:
        float32 parameters of the target, sharded over the mesh, and a report of every layer that
        changed its kind.

    Raises:
        ConfigError: there is no conversion of a layer or tensor.
    """
    check_convertible(source, target)
    _, shapes, axes = abstract_model(target)
    convert = jax.jit(
        functools.partial(_convert, source, target),
        out_shardings=(param_shardings(mesh, axes, shapes), None),
    )
    with jax.default_matmul_precision("highest"):
        converted, errors = convert(params, dict(batch))
    kinds = list(zip(source.layer_kinds, target.layer_kinds, strict=True))
    return converted, [
        LayerConversion(i, *kinds[i], *(float(error) for error in layer))
        for i, layer in sorted(errors.items())
    ]


def check_convertible(source: ModelConfig, target: ModelConfig) -> None:
    """Raises a ConfigError that names the first layer or tensor without a conversion."""
    for name in ("num_layers", "hidden_size"):
        _require_equal(name, source, target, "")
    for i, kinds in enumerate(zip(source.layer_kinds, target.layer_kinds, strict=True)):
        _check_layer(i, *kinds, source, target)
    there, here = _shapes_outside_of_layers(source), _shapes_outside_of_layers(target)
    if source.tie_embeddings and not target.tie_embeddings:
        del here["['embedding']['output']"]
    _check_shapes("", there, here)
    for name in MEANING:
        before, now = getattr(source, name), getattr(target, name)
        if before != now:
            _log.warning("config.model.%s is %s, was %s in config.init_from", name, now, before)


def _check_layer(
    number: int, before: str, now: str, source: ModelConfig, target: ModelConfig
) -> None:
    where = f"layer {number}, {before} -> {now}: "
    if not (_is_fitted(before, now) or _is_copied(before, now)):
        raise ConfigError(
            f"config.model.layer_kinds: {where}there is no such conversion; a layer can keep its "
            "kind, go between full and sliding or mla and local, or from full or sliding to mla, "
            "local or global"
        )
    there, here = (_table(abstract_layer(number, cfg)[1]) for cfg in (source, target))
    if _is_fitted(before, now):
        _require_equal("num_heads", source, target, where)
        _require_equal("attention_bias", source, target, where)
        if target.q_lora_rank:
            raise ConfigError(
                f"config.model.q_lora_rank = {target.q_lora_rank}: {where}queries have no "
                "conversion to a latent; set it to 0"
            )
        _check_grouped_query(where, there)
        here, there = (
            {name: shape for name, shape in shapes.items() if not name.startswith("['attention']")}
            for shapes in (here, there)
        )
    _check_shapes(where, there, here)


def _check_grouped_query(where: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuses biases and norms of queries and keys, which latents have no place for."""
    fitted = {f"['attention']['{name}']['weight']" for name in ("query", "key_value", "output")}
    extra = [name for name in shapes if name.startswith("['attention']") and name not in fitted]
    if extra:
        raise ConfigError(
            f"config.init_from: {where}{extra[0]} {list(shapes[extra[0]])} has no place in latent "
            "attention; keep the kind of this layer"
        )


def _require_equal(name: str, source: ModelConfig, target: ModelConfig, where: str) -> None:
    before, now = getattr(source, name), getattr(target, name)
    if before != now:
        raise ConfigError(
            f"config.model.{name} = {now}: {where}must be {before}, as in config.init_from"
        )


def _check_shapes(
    where: str, there: dict[str, tuple[int, ...]], here: dict[str, tuple[int, ...]]
) -> None:
    for name in sorted(there.keys() | here.keys()):
        before, now = there.get(name), here.get(name)
        if before != now:
            raise ConfigError(
                f"config.init_from: {where}{name} is {_describe(before)} there and "
                f"{_describe(now)} in this model"
            )


def _describe(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))


def _is_copied(before: str, now: str) -> bool:
    return before == now or any(before in kinds and now in kinds for kinds in COPIED_KINDS)


def _is_fitted(before: str, now: str) -> bool:
    return before in GROUPED_QUERY_KINDS and now in LATENT_KINDS


def _shapes_outside_of_layers(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    shapes = abstract_model(cfg)[1]
    return _table({name: shapes[name] for name in shapes if name not in ("prefix", "groups")})


def _table(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}


@functools.cache
def abstract_layer(number: int, cfg: ModelConfig) -> tuple[Any, Any]:
    """The graph definition of a layer for `nnx.merge`, and its parameters without their values."""
    kind = cfg.layer_kinds[number]
    experts = cfg.experts.num_experts > 0 and number >= cfg.experts.num_dense_layers
    layer = nnx.eval_shape(lambda: Layer(kind, cfg, experts=experts, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(layer, nnx.Param)
    return graphdef, nnx.to_pure_dict(state)


def _convert(
    source: ModelConfig, target: ModelConfig, params: Any, batch: Batch
) -> tuple[Any, dict[int, tuple[jax.Array, ...]]]:
    """Converted parameters, and the errors of layers whose kind changes, by number.

    The source reads the batch layer by layer; what it need not compute is not in the compiled code.
    """
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    segment_ids = in_row_order(batch["segment_ids"], "batch", "sequence")
    embedding = nnx.merge(_abstract_embedding(source), params["embedding"])
    x = constrain(embedding(batch["inputs"]), "batch", "sequence", "activation")
    layers = split_layers(source, params)
    errors: dict[int, tuple[jax.Array, ...]] = {}
    for i, (before, now) in enumerate(zip(source.layer_kinds, target.layer_kinds, strict=True)):
        layer = nnx.merge(abstract_layer(i, source)[0], layers[i])
        if before != now:
            normed = layer.attention_norm(x)
            counted = batch["segment_ids"] > 0
            key_error = value_error = jnp.zeros(())
            if _is_fitted(before, now):
                attention, key_error, value_error = fit_latent(
                    layers[i]["attention"], source, target, now, normed, counted
                )
                layers[i] = {**layers[i], "attention": attention}
            converted = nnx.merge(abstract_layer(i, target)[0], layers[i])
            expected, found = (
                module.attention(normed, batch["positions"], segment_ids)
                for module in (layer, converted)
            )
            errors[i] = (key_error, value_error, _relative_error(expected, found, counted))
        x = layer(x, batch["positions"], segment_ids)
    return _assemble(source, target, params, layers), errors


def _assemble(source: ModelConfig, target: ModelConfig, params: Any, layers: list[Any]) -> Any:
    embedding = params["embedding"]
    if source.tie_embeddings and not target.tie_embeddings:
        embedding = {**embedding, "output": embedding["table"].T}
    rest = {"embedding": embedding, "final_norm": params["final_norm"]}
    return rest | join_layers(target, layers)


def _abstract_embedding(cfg: ModelConfig) -> Any:
    return nnx.split(nnx.eval_shape(lambda: TokenEmbedding(cfg, rngs=nnx.Rngs(0))), nnx.Param)[0]


def _relative_error(expected: jax.Array, found: jax.Array, counted: jax.Array) -> jax.Array:
    """Norm of the difference over the norm of `expected`, over the tokens that count."""
    expected, found = (x.astype(jnp.float32) for x in (expected, found))
    where = counted[..., None]
    lost = jnp.sum((found - expected) ** 2, where=where)
    return jnp.sqrt(lost / jnp.sum(expected**2, where=where))


def split_layers(cfg: ModelConfig, params: Any) -> list[Any]:
    """The parameters of each layer in turn, out of those of a model."""
    layers = []
    for path, number in layer_places(cfg):
        layer = functools.reduce(operator.getitem, path, params)
        layers.append(layer if number is None else _take(layer, number))
    return layers


def join_layers(cfg: ModelConfig, layers: list[Any]) -> dict[str, Any]:
    """The inverse of `split_layers`, without what lies outside of the layers."""
    at: dict[tuple[str | int, ...], list[Any]] = {}
    for (path, _), layer in zip(layer_places(cfg), layers, strict=True):
        at.setdefault(path, []).append(layer)
    stacked = {path for path, number in layer_places(cfg) if number is not None}
    return nnx.traversals.unflatten_mapping(
        {path: _stack(parts) if path in stacked else parts[0] for path, parts in at.items()}
    )


def _take(tree: Any, index: int) -> Any:
    return jax.tree.map(lambda x: x[index], tree)


def _stack(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

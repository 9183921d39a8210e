"""The device mesh and the one table from logical axes to mesh axes."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from asa_jax.config import MeshConfig
from asa_jax.errors import ConfigError

MESH_AXES = ("data", "fsdp", "tensor", "context")

# Latents are shared by many heads and small, so every tensor shard keeps them whole. A 'row' is a
# sequence that every device holds whole.
LOGICAL_TO_MESH: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "sequence": "context",
    "row": None,
    "embed": "fsdp",
    "vocab": "tensor",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "activation": None,
    "head_dim": None,
    "latent": None,
    "groups": None,
    "block": None,
    "pair": None,
    "gates": None,
    "experts": None,
    "layers": None,
}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges the devices in a mesh with axes data, fsdp, tensor, context.

    Args:
        config: devices along each axis; -1 on one takes what the others leave.
        devices: the devices to use; None: all.

    Returns:
        A mesh that uses every device.

    Raises:
        ConfigError: the product of the axes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_sizes(config, len(devices))
    axis_types = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(shape, MESH_AXES, axis_types=axis_types, devices=devices)


def mesh_sizes(config: MeshConfig, devices: int) -> tuple[int, ...]:
    """Devices along each axis of MESH_AXES, of so many devices.

    Raises:
        ConfigError: the product of the axes is not the number of devices.
    """
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    known = math.prod(size for size in sizes if size != -1)
    shape = tuple(devices // known if size == -1 else size for size in sizes)
    if math.prod(shape) != devices:
        product = " x ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
        needed = f"a multiple of {known}" if -1 in sizes else f"{known}"
        raise ConfigError(
            f"config.mesh: {product} needs {needed} devices, but {devices} are here; "
            "set the axes so that their product matches (-1 on one takes the rest)"
        )
    return shape


def partition_spec(axes: Sequence[str]) -> P:
    """Maps logical axis names to a PartitionSpec by the table."""
    return P(*(LOGICAL_TO_MESH[axis] for axis in axes))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of [B, T] arrays of tokens."""
    return NamedSharding(mesh, partition_spec(("batch", "sequence")))


def param_shardings(mesh: Mesh, axes: Any, shapes: Any) -> Any:
    """Shardings of a tree of parameters.

    Args:
        mesh: the device mesh.
        axes: tree of tuples of logical axis names, one name a dimension.
        shapes: tree of the same structure with arrays or ShapeDtypeStructs.

    Returns:
        Tree of NamedSharding.

    Raises:
        ConfigError: a dimension does not divide over the mesh axes that it is sharded on.
    """

    def sharding(path: Any, shape: Any, names: tuple[str, ...]) -> NamedSharding:
        spec = partition_spec(names)
        for name, size, mesh_axes in zip(names, shape.shape, spec, strict=True):
            parts = math.prod(mesh.shape[axis] for axis in _mesh_axes(name))
            if size % parts:
                raise ConfigError(
                    f"config.mesh.{mesh_axes} = {parts}: does not divide axis '{name}' of size "
                    f"{size} of parameter {jax.tree_util.keystr(path)}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, shapes, axes)


def _mesh_axes(axis: str) -> tuple[str, ...]:
    """Mesh axes of a logical axis."""
    mesh_axes = LOGICAL_TO_MESH[axis] or ()
    return (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Asks for the table's sharding of `x`; the identity where no mesh is in context."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))


def gathered(weight: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Gathers the parts of a weight that `fsdp` spreads, for a product with activations.

    Its gradient is asked for in parts, so that no device gets more of the sum than its own.

    Args:
        weight: an array with logical axes `axes`.
        axes: their names.

    Returns:
        `weight`; the identity without a mesh of several devices in context.
    """
    if jax.sharding.get_abstract_mesh().size <= 1:
        return weight
    whole = ["activation" if axis == "embed" else axis for axis in axes]

    @jax.custom_vjp
    def gather(weight: jax.Array) -> jax.Array:
        # Divided first: otherwise XLA gathers what it is cast from, which is wider.
        return constrain(constrain(weight, *axes), *whole)

    gather.defvjp(lambda w: (gather(w), None), lambda _, dw: (constrain(dw, *axes),))
    return gather(weight)


def sharded(function: Callable[..., Any], in_axes: Any, out_axes: Any) -> Callable[..., Any]:
    """Makes each device apply a function to its part of the arguments, by `jax.shard_map`.

    XLA cannot divide the work of a kernel, so attention runs in this way.

    Args:
        function: of arrays, which it gets and returns as one device holds them.
        in_axes: for each argument its logical axes.
        out_axes: logical axes of the result, or a tree of them.

    Returns:
        A function of whole arrays; `function` itself without a mesh of several devices in context.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
        return function
    trivial = [axis for axis, size in mesh.shape.items() if size == 1]

    def spec(axes: tuple[str, ...]) -> P:
        if not axes:
            return P()
        # An axis of one device is named too: over those that are not, gradients are summed, by
        # collectives that would have nothing to do.
        first, *rest = (_mesh_axes(axis) for axis in axes)
        unnamed = set(trivial) - set(itertools.chain(first, *rest))
        return P((*first, *sorted(unnamed)), *rest)

    def specs(axes: Any) -> Any:
        return jax.tree.map(spec, axes, is_leaf=_is_axes)

    return jax.shard_map(
        function, in_specs=specs(in_axes), out_specs=specs(out_axes), check_vma=False
    )


def gather_embed(weight: jax.Array, axis: int) -> jax.Array:
    """Gathers the parts of a weight that `fsdp` spreads, inside `sharded`.

    The gradient comes back in parts, by a reduce-scatter.

    Args:
        weight: one device's part.
        axis: the dimension with the logical axis 'embed'.
    """
    if jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) == 1:
        return weight
    return jax.lax.all_gather(weight, "fsdp", axis=axis, tiled=True)


def own_groups(x: jax.Array) -> jax.Array:
    """Takes the latent groups that serve the heads of this tensor shard, inside `sharded`.

    Args:
        x: [B, S, K, ...], the same on every tensor shard.

    Returns:
        [B, S, groups, ...]: K / shards groups, or one that several shards serve.

    Raises:
        ConfigError: the heads of a shard lie in parts of groups.
    """
    shards, groups = tensor_shards(), x.shape[2]
    check_groups(groups, shards)
    if shards == 1:
        return x
    first = jax.lax.axis_index("tensor") * groups // shards
    return jax.lax.dynamic_slice_in_dim(x, first, max(1, groups // shards), axis=2)


def shards_per_group(groups: int) -> int:
    """Tensor shards that share the heads of a latent group."""
    return max(1, tensor_shards() // groups)


def gather_group(x: jax.Array, groups: int) -> jax.Array:
    """Gathers the heads of a latent group from the tensor shards that share them.

    Args:
        x: [B, T, heads of this shard, ...].
        groups: latent groups of all heads, fewer than there are tensor shards.

    Returns:
        [B, T, heads of the group, ...].
    """
    sharers = np.arange(tensor_shards()).reshape(groups, -1).tolist()
    return jax.lax.all_gather(x, "tensor", axis_index_groups=sharers, axis=2, tiled=True)


def tensor_shards() -> int:
    """Devices that share heads, MLP and vocabulary on the mesh in context."""
    return jax.sharding.get_abstract_mesh().shape.get("tensor", 1)


def check_groups(groups: int, shards: int) -> None:
    """Raises ConfigError unless each of `shards` gets whole latent groups, or a part of one."""
    if groups % shards and shards % groups:
        raise ConfigError(
            f"config.mesh.tensor = {shards}: must divide model.num_latent_groups = {groups}, "
            "or be a multiple of it"
        )


def _is_axes(tree: Any) -> bool:
    return isinstance(tree, tuple) and all(isinstance(name, str) for name in tree)

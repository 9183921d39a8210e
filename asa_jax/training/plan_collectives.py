"""The collectives of a training step on one device, from the design (docs/parallelism.md).

    fsdp     weights gathered forwards and, with rematerialisation, once more; gradients summed
    data     gradients summed in float32, each device its part of fsdp; over context alike
    context  what attention fetches: halos, latents, keys; forwards, again, and gradients back
    tensor   activations summed behind products that divide heads or MLP

`tests/training/test_plan_collectives.py` and `test_plan_measured.py` hold this list against
compiled steps. Bytes are counted as `asa_jax.collectives` does: of whole arrays.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from asa_jax.config import Config, ModelConfig
from asa_jax.model.param_layout import shortest_period
from asa_jax.model.transformer import abstract_model
from asa_jax.sharding import MESH_AXES

DIVIDED = {"vocab", "heads", "kv_heads", "mlp"}  # by tensor
_SCATTERED, _WHOLE = "gradients, divided by fsdp", "gradients, whole on every device"


class Planned(NamedTuple):
    """Collectives of one kind.

    Attributes:
        op: all-gather, reduce (all-reduce or reduce-scatter), scatter (the gradient of a gather of
            activations), all-reduce or collective-permute.
        axes: mesh axes whose devices take part.
        bytes: in a step.
        what: travels.
    """

    op: str
    axes: tuple[str, ...]
    bytes: float
    what: str


class _Step(NamedTuple):
    """What the counts below depend on; rows and tokens of one device and part of the batch."""

    model: ModelConfig
    mesh: Mapping[str, int]
    rows: int
    length: int
    width: int  # bytes of a number in the compute dtype

    @property
    def again(self) -> int:
        """How often the layers are computed forwards: once more where they are rematerialised."""
        return 1 if self.model.remat == "none" else 2


def planned_collectives(config: Config, mesh: Mapping[str, int]) -> list[Planned]:
    """Lists what a step moves, the largest first.

    Args:
        config: the run.
        mesh: sizes of the mesh axes.

    Returns:
        Collectives with more than one device; a few numbers a step are left out.
    """
    parts, shards = config.batch_parts(mesh), mesh["data"] * mesh["fsdp"]
    width = jnp.dtype(config.model.compute_dtype).itemsize
    rows = config.data.batch_size // shards // parts
    step = _Step(config.model, mesh, rows, config.data.sequence_length, width)
    every_part = [*_weights(step), *_fetched(step), *_activations(step)]
    found = [each._replace(bytes=each.bytes * parts) for each in every_part]
    totals: defaultdict[tuple[str, tuple[str, ...], str], float] = defaultdict(float)
    for each in (*found, *_after_all_parts(step)):
        axes = tuple(axis for axis in each.axes if mesh[axis] > 1)
        totals[each.op, axes, each.what] += each.bytes
    several = (
        Planned(op, axes, size, what) for (op, axes, what), size in totals.items() if axes and size
    )
    return sorted(several, key=lambda each: -each.bytes)


def _weights(step: _Step) -> Iterator[Planned]:
    """Weights to where they are multiplied, and their gradients back."""
    spread = _weight_bytes(step, step.width)
    fsdp = step.mesh["fsdp"]
    gathered = step.again * spread["layers"] + spread["embedding"]
    yield Planned("all-gather", ("fsdp",), gathered, "weights")
    # They travel as they were computed within fsdp, and are summed in float32 beyond.
    wide = _weight_bytes(step, 4)
    if fsdp == 1:
        yield Planned("reduce", ("data", "context"), wide["layers"] + wide["whole"], _WHOLE)
        return
    yield Planned("reduce", ("fsdp",), spread["layers"] + spread["embedding"], _SCATTERED)
    part = (wide["layers"] + wide["embedding"]) / fsdp
    yield Planned("reduce", ("data", "context"), part, "gradients, each its part of fsdp")
    every_axis = ("data", "fsdp", "context")
    yield Planned("reduce", every_axis, wide["whole"], "gradients of what every device holds whole")


def _after_all_parts(step: _Step) -> Iterator[Planned]:
    """What is summed once a step, however many parts the batch has."""
    if step.mesh["fsdp"] == 1:
        size = _weight_bytes(step, 4)["embedding"]
        yield Planned("reduce", ("data", "context"), size, _WHOLE)


def _weight_bytes(step: _Step, width: int) -> dict[str, float]:
    """Bytes of weights of a width on one device once gathered: spread by fsdp in layers or not."""
    total = {"layers": 0.0, "embedding": 0.0, "whole": 0.0}
    for path, size, names in _leaves(step.model):
        part = "layers" if "embed" in names else "whole"
        part = "embedding" if path.startswith("embedding") else part
        # Scales of norms are used in float32, weights are cast before they travel.
        of_one = 4 if path.endswith("scale") else width
        total[part] += of_one * size / (step.mesh["tensor"] if DIVIDED & set(names) else 1)
    return total


def _leaves(model: ModelConfig) -> Iterator[tuple[str, int, tuple[str, ...]]]:
    """Path, size and logical axes of every parameter."""
    _, shapes, axes = abstract_model(model)
    names = jax.tree.leaves(axes, is_leaf=lambda node: isinstance(node, tuple))
    for (path, leaf), name in zip(jax.tree_util.tree_leaves_with_path(shapes), names, strict=True):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf.size, name


def _fetched(step: _Step) -> Iterator[Planned]:
    """What attention fetches over the context axis."""
    if step.mesh["context"] == 1:
        return
    ids = 4.0 * step.rows * step.length
    yield Planned("all-gather", ("context",), ids, "segment ids")
    for kind in step.model.layer_kinds:
        halo, halo_features, row_numbers = _context_needs(step, kind)
        row = step.rows * row_numbers * step.width
        if halo > step.length // (2 * step.mesh["context"]):
            row, halo = step.rows * step.length * halo_features * step.width, 0
        # Two chunks of a row, forwards, once more, and their gradients.
        halos = 2.0 * step.rows * halo * halo_features * step.width * (step.again + 1)
        yield Planned("collective-permute", ("context",), halos, f"halos of {kind}")
        yield Planned("all-gather", ("context",), step.again * row, f"rows of {kind}")
        yield Planned("scatter", ("context",), row, f"gradients of rows of {kind}")


def _context_needs(step: _Step, kind: str) -> tuple[int, int, float]:
    """Tokens of a halo and features of each, and numbers gathered of a row."""
    model, length = step.model, step.length
    pair = 2 * model.num_kv_heads * model.head_dim // step.mesh["tensor"]
    latent = model.kv_lora_rank + model.qk_rope_head_dim
    blocks = length // model.compression_stride
    match kind:
        case "local":
            return model.window_size - 1, latent, 0
        case "sliding":
            return model.window_size - 1, pair, 0
        case "mla":
            return 0, 0, length * latent
        case "full":
            return 0, 0, length * pair
        case "global":
            return 0, 0, (length + blocks) * _group_features(model)
    tokens = length if "selection" in model.nsa_branches else 0
    blocks = blocks if "compression" in model.nsa_branches else 0
    window = model.window_size - 1 if "window" in model.nsa_branches else 0
    return window, pair, (tokens + blocks) * pair


def _group_features(model: ModelConfig) -> int:
    """Numbers of a token in the latents of a `global` layer."""
    return model.num_latent_groups * model.group_kv_lora_rank + model.qk_rope_head_dim


def _activations(step: _Step) -> Iterator[Planned]:
    """What is summed over the tensor axis."""
    if step.mesh["tensor"] == 1:
        return
    model, tokens = step.model, step.rows * step.length / step.mesh["context"]
    period = len(shortest_period(model.layer_kinds))
    groups = model.num_layers // period
    # Behind each product that sums over heads or MLP: two a layer; the last of a group is not asked
    # for again. Backwards: of the input of each product that divides its output.
    forwards = 2 * model.num_layers
    once_more = forwards - groups if model.remat in ("full", "attention") else 0
    sums = forwards + once_more + _inputs_of_divided(model) + 2  # embedding and loss
    yield Planned(
        "reduce", ("tensor",), sums * tokens * model.hidden_size * step.width, "activations"
    )
    latents = 0.0
    for kind in model.layer_kinds:
        if kind in ("local", "mla"):
            latents += tokens * (model.kv_lora_rank + model.qk_rope_head_dim)
        elif kind == "global":
            latents += tokens * (1 + 1 / model.compression_stride) * _group_features(model)
    yield Planned("reduce", ("tensor",), latents * step.width, "gradients of latents")
    yield Planned("reduce", ("tensor",), 4 * tokens * 4.0, "statistics of the loss")


def _inputs_of_divided(model: ModelConfig) -> int:
    """Products of hidden states whose output `tensor` divides, in all layers."""
    # Without biases `up` of the MLP is one product with its `gate`.
    not_own = ("embedding",) if model.mlp_bias else ("embedding", "mlp/up/")
    per_period = sum(
        names.index("embed") < min(names.index(name) for name in DIVIDED & set(names))
        for path, _, names in _leaves(model)
        if "embed" in names and DIVIDED & set(names) and not any(part in path for part in not_own)
    )
    repeats = model.num_layers // len(shortest_period(model.layer_kinds))
    return per_period * (repeats if model.scan_layers else 1)


def link_bytes(each: Planned, mesh: Mapping[str, int], host: int) -> dict[str, float]:
    """Bytes through the links of one device.

    Devices are numbered with the last mesh axis fastest, so a group lies in one host as long as its
    span does. Rings inside of hosts and between them: all but a device's own part of the array
    comes in, and for a sum twice that.

    Args:
        each: a collective.
        mesh: sizes of the mesh axes.
        host: devices of a host.

    Returns:
        `nvlink` and `network`.
    """
    inside, hosts, stride = 1, 1, 1
    for axis in reversed(MESH_AXES):
        if axis in each.axes:
            here = max(1, min(mesh[axis], host // stride))
            inside, hosts = inside * here, hosts * (mesh[axis] // here)
        stride *= mesh[axis]
    if each.op == "collective-permute":
        return {"nvlink": 0.0 if hosts > 1 else each.bytes, "network": each.bytes * (hosts > 1)}
    # A gradient that stays divided is scattered; one that every device needs comes back too.
    ways = 2 if each.op == "reduce" and each.what != _SCATTERED else 1
    return {
        "nvlink": ways * each.bytes * (inside - 1) / inside,
        "network": ways * each.bytes * (hosts - 1) / hosts / inside,
    }

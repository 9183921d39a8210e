"""One step of training or evaluation, as pure functions of a state and a batch."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from asa_jax.config import Config
from asa_jax.context_parallel import row_multiple
from asa_jax.errors import ConfigError
from asa_jax.model.transformer import abstract_model, init_params
from asa_jax.sharding import batch_sharding, check_groups, param_shardings
from asa_jax.training.losses import summed_nll
from asa_jax.training.optimizer import Schedule, make_optimizer, make_schedule, schedule_factor

# int32 [B, T] each, tokens in the order of `context_parallel.placement`.
BATCH = ("inputs", "targets", "positions", "segment_ids")
Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]

# The average gradient norm that a spike is measured by is a plain mean at first, then one with this
# memory; fewer updates than the second number say too little to judge by.
SPIKE_AVERAGE_STEPS = 100
SPIKE_FIRST_STEPS = 20

STEP_OPTIONS = {
    # A kernel whose result a scan over layers keeps would run twice: once for what follows, and
    # once fused with the write into the stacked array.
    "xla_gpu_enable_dynamic_slice_fusion": False,
    # XLA computes products anew where a step needs more than so many percent of 80% of the memory
    # that its state leaves; a run takes more than that (`device_memory`).
    "xla_gpu_memory_limit_slop_factor": 110,
}


class TrainState(NamedTuple):
    """Everything that a step changes.

    Attributes:
        params: nested dict of float32 arrays.
        opt_state: moments and counters of the optimizer.
        step: batches consumed, int32.
        skipped_steps: those among them whose update was left out.
        skipped_in_a_row: those at the end of the run so far.
        grad_norm_average: of the updates made, over about the last SPIKE_AVERAGE_STEPS.
    """

    params: Any
    opt_state: Any
    step: jax.Array
    skipped_steps: jax.Array
    skipped_in_a_row: jax.Array
    grad_norm_average: jax.Array


class Trainer(NamedTuple):
    """The jitted functions of a run and the shapes they work on.

    Attributes:
        mesh: the devices.
        state: TrainState of ShapeDtypeStruct with shardings.
        schedule: of the learning rate, for `step`.
        init: makes the state of step 0.
        step: maps a state, which it consumes, a batch and a schedule to the next state and metrics:
            scalars loss, grad_norm, grad_norm_average, learning_rate, tokens, targets,
            target_bytes, skipped_steps, skipped_in_a_row.
        evaluate: maps parameters and a batch to sums: nll (nats), tokens (that are read), targets
            (that count), target_bytes.
    """

    mesh: Mesh
    state: TrainState
    schedule: Schedule
    init: Callable[[], TrainState]
    step: Callable[[TrainState, Batch, Schedule], tuple[TrainState, Metrics]]
    evaluate: Callable[[Any, Batch], Metrics]

    def lower(self, batch: Mapping[str, Any]) -> jax.stages.Lowered:
        """Lowers the step for batches like this one, which may be `batch_shapes`."""
        return self.step.lower(self.state, batch, self.schedule)  # type: ignore[attr-defined]


def make_trainer(config: Config, mesh: Mesh, byte_lengths: np.ndarray) -> Trainer:
    """Builds the functions of a run; nothing is computed yet.

    Args:
        config: the run.
        mesh: devices; call the functions under `jax.set_mesh(mesh)`.
        byte_lengths: int [tokens], UTF-8 bytes of every token of the tokenizer.

    Returns:
        The jitted functions.

    Raises:
        ConfigError: the batch or a parameter does not divide over the mesh.
    """
    _check_mesh(config, mesh)
    graphdef, shapes, axes = abstract_model(config.model)
    optimizer = make_optimizer(config.optimizer, axes)

    # Seed and schedule are arguments, so that runs which differ in them alone share their programs.
    def init(key: jax.Array) -> TrainState:
        params = init_params(config.model, jax.random.wrap_key_data(key))
        # One array each: the step consumes its state, and a buffer can be given up only once.
        return TrainState(
            params=params,
            opt_state=optimizer.init(params),
            step=jnp.zeros((), jnp.int32),
            skipped_steps=jnp.zeros((), jnp.int32),
            skipped_in_a_row=jnp.zeros((), jnp.int32),
            grad_norm_average=jnp.zeros(()),
        )

    state = jax.eval_shape(init, jax.ShapeDtypeStruct((2,), jnp.uint32))
    shardings = _state_shardings(mesh, state, param_shardings(mesh, axes, shapes))
    init_sharded = jax.jit(init, out_shardings=shardings)
    sums = make_sums(graphdef, byte_lengths, config.training.loss_chunk_tokens)
    batch, one = batch_sharding(mesh), NamedSharding(mesh, P())
    return Trainer(
        mesh=mesh,
        state=with_shardings(state, shardings),
        schedule=make_schedule(config.optimizer, config.training.steps),
        init=lambda: init_sharded(_key_data(config.training.seed)),
        step=jax.jit(
            make_step(sums, axes, config, config.batch_parts(mesh.shape)),
            in_shardings=(shardings, batch, one),
            out_shardings=(shardings, one),
            donate_argnums=0,
            compiler_options=STEP_OPTIONS,
        ),
        evaluate=jax.jit(sums, in_shardings=(shardings.params, batch), out_shardings=one),
    )


def batch_shapes(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch, to lower or trace a step without one."""
    shape = (config.data.batch_size, config.data.sequence_length)
    return {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in BATCH}


def _key_data(seed: int) -> np.ndarray:
    """A key as an array of the host, which is the same in all processes."""
    return np.asarray(jax.random.key_data(jax.random.key(seed)))


def make_sums(
    graphdef: Any, byte_lengths: np.ndarray, chunk_tokens: int
) -> Callable[[Any, Batch], Metrics]:
    """Returns the function from parameters and a batch to what `Trainer.evaluate` gives."""

    def sums(params: Any, batch: Batch) -> Metrics:
        model = nnx.merge(graphdef, params)
        hidden = model(batch["inputs"], batch["positions"], batch["segment_ids"])
        targets, counted = jnp.maximum(batch["targets"], 0), _learnt(batch)
        return {
            "nll": summed_nll(hidden, model.unembedding(), targets, counted, chunk_tokens),
            "tokens": jnp.sum(batch["segment_ids"] > 0),
            "targets": jnp.sum(counted),
            "target_bytes": jnp.sum(jnp.asarray(byte_lengths)[targets], where=counted),
        }

    return sums


def make_step(
    sums: Callable[[Any, Batch], Metrics], axes: Any, config: Config, parts: int
) -> Callable[[TrainState, Batch, Schedule], tuple[TrainState, Metrics]]:
    """Returns the training step: one update by the mean nll of the batch's targets, in equal parts.

    A loss or gradient that is not finite, or a gradient norm `spike_factor` times its average,
    leaves parameters and optimizer state as they are. That is decided before clipping, which would
    turn one infinite gradient into NaN everywhere.
    """
    is_cosine = config.optimizer.schedule == "cosine"
    spike_factor = config.training.spike_factor

    def step(state: TrainState, batch: Batch, schedule: Schedule) -> tuple[TrainState, Metrics]:
        loss, gradients, totals = _differentiate(sums, state.params, batch, parts)
        grad_norm = optax.tree.norm(gradients)
        updates_done = state.step - state.skipped_steps
        sound = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        sound &= ~_is_spike(grad_norm, state.grad_norm_average, updates_done, spike_factor)
        factor = schedule_factor(schedule, is_cosine, updates_done)
        learning_rate = schedule.learning_rate * factor
        with jax.named_scope("optimizer"):
            optimizer = make_optimizer(
                config.optimizer, axes, learning_rate, schedule.adam_learning_rate * factor
            )
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        weight = 1 / jnp.minimum(updates_done + 1, SPIKE_AVERAGE_STEPS)
        average = state.grad_norm_average + weight * (grad_norm - state.grad_norm_average)
        params, opt_state, average = jax.tree.map(
            lambda new, old: jnp.where(sound, new, old),
            (params, opt_state, average),
            (state.params, state.opt_state, state.grad_norm_average),
        )
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "grad_norm_average": state.grad_norm_average,
            "learning_rate": learning_rate,
            "tokens": totals["tokens"],
            "targets": totals["targets"],
            "target_bytes": totals["target_bytes"],
        }
        state = TrainState(
            params=params,
            opt_state=opt_state,
            step=state.step + 1,
            skipped_steps=state.skipped_steps + ~sound,
            skipped_in_a_row=jnp.where(sound, 0, state.skipped_in_a_row + 1),
            grad_norm_average=average,
        )
        counts = {"skipped_steps": state.skipped_steps, "skipped_in_a_row": state.skipped_in_a_row}
        return state, metrics | counts

    return step


def _differentiate(
    sums: Callable[[Any, Batch], Metrics], params: Any, batch: Batch, parts: int
) -> tuple[jax.Array, Any, Metrics]:
    """The mean nll of the batch's targets, its gradients and the sums, in equal parts."""
    # Of all parts, so that their losses and gradients add up to those of the whole batch.
    targets = jnp.maximum(jnp.sum(_learnt(batch)), 1)

    def mean_nll(params: Any, part: Batch) -> tuple[jax.Array, Metrics]:
        totals = sums(params, part)
        return totals["nll"] / targets, totals

    gradients, totals = _accumulate(jax.grad(mean_nll, has_aux=True), params, batch, parts)
    return totals["nll"] / targets, gradients, totals


def _learnt(batch: Batch) -> jax.Array:
    """Where the targets are that count: neither in padding nor in a prompt."""
    return (batch["segment_ids"] > 0) & (batch["targets"] >= 0)


def _is_spike(norm: jax.Array, average: jax.Array, updates: jax.Array, factor: float) -> jax.Array:
    """Whether a gradient norm is out of all proportion; never where the factor is 0."""
    known = (updates >= SPIKE_FIRST_STEPS) & (factor > 0)
    return known & (norm > factor * average)


def _accumulate(
    gradient: Callable[[Any, Batch], tuple[Any, Metrics]], params: Any, batch: Batch, parts: int
) -> tuple[Any, Metrics]:
    """Sums gradients and totals over equal parts of the batch, one part in memory at a time."""
    if parts == 1:
        return gradient(params, batch)

    def split(x: jax.Array) -> jax.Array:
        # Every part takes rows from every device, so that no row moves.
        return jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)

    def body(total: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(params, part)), None

    parted = jax.tree.map(split, batch)
    one = jax.tree.map(lambda x: x[0], parted)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, params, one)
    )
    return jax.lax.scan(body, zeros, parted)[0]


def _check_mesh(config: Config, mesh: Mesh) -> None:
    if "global" in config.model.layer_kinds:
        check_groups(config.model.num_latent_groups, mesh.shape["tensor"])
    shards, parts = mesh.shape["data"] * mesh.shape["fsdp"], config.batch_parts(mesh.shape)
    if config.data.batch_size % (shards * parts):
        raise ConfigError(
            f"config.data.batch_size = {config.data.batch_size}: must be a multiple of "
            f"mesh.data * mesh.fsdp * optimizer.accumulation_steps = {shards} * {parts}"
        )
    multiple = row_multiple(config.model.alignment, mesh.shape["context"])
    if config.data.sequence_length % multiple:
        raise ConfigError(
            f"config.data.sequence_length = {config.data.sequence_length}: must be a multiple of "
            f"2 * mesh.context * model.selection_block_size = {multiple}"
        )


def _state_shardings(mesh: Mesh, state: TrainState, params: Any) -> TrainState:
    """Shards parameters as given, moments like their parameters, counters not at all."""
    by_path = dict(jax.tree_util.tree_leaves_with_path(params))
    whole = NamedSharding(mesh, P())

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        # The path of a moment ends in the path of its parameter.
        tails = (path[start:] for start in range(len(path)))
        return next((by_path[tail] for tail in tails if tail in by_path), whole)

    return jax.tree_util.tree_map_with_path(sharding, state)


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Joins trees of shapes and shardings into one of ShapeDtypeStruct."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )

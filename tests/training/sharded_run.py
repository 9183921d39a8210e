"""Trains a few steps on several meshes of simulated devices, for test_sharded_training.py.

Reads {"config": ..., "meshes": [...], "workdir": ...} from stdin. Writes the losses of each mesh,
whether checkpoints of one restore exactly on the others, and whether all get the same batch of the
config's data.
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np

from asa_jax.config import MeshConfig, config_from_dict
from asa_jax.context_parallel import place_rows, row_order
from asa_jax.data.shards import open_token_folder
from asa_jax.sharding import batch_sharding, make_mesh
from asa_jax.training.checkpoint import make_meta, restore_params, restore_state
from asa_jax.training.checkpoint_writer import CheckpointWriter
from asa_jax.training.feed import Feed
from asa_jax.training.step import make_trainer

STEPS = 3


def batches(config):
    rng = np.random.default_rng(0)
    shape = (config.data.batch_size, config.data.sequence_length)
    half = shape[1] // 2
    for _ in range(STEPS):
        tokens = rng.integers(0, config.model.vocab_size, (shape[0], shape[1] + 1), dtype="int32")
        segment_ids = np.ones(shape, "int32")
        # Two documents in every other row, and some padding.
        segment_ids[::2, half:] = 2
        segment_ids[1::4, -config.model.alignment :] = 0
        positions = np.tile(np.arange(shape[1], dtype="int32"), (shape[0], 1))
        positions[::2, half:] -= half
        yield {
            "inputs": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "segment_ids": segment_ids,
            "positions": positions,
        }


def first_batch(config, mesh):
    """The first batch of the data, brought back to the order of rows."""
    order = row_order(config.data.sequence_length, config.mesh.context)
    sources = [open_token_folder(Path(source)) for source in config.data.sources]
    with Feed(config, sources, mesh) as feed:
        return {name: np.asarray(rows)[:, order] for name, rows in feed.next()[0].items()}


def main() -> None:
    request = json.load(sys.stdin)
    workdir = Path(request["workdir"])
    (workdir / "checkpoints").mkdir()
    lengths = np.ones(request["config"]["model"]["vocab_size"], np.int32)
    losses, states, starts, fed, saved = [], [], [], [], None
    for sizes in request["meshes"]:
        config = config_from_dict(request["config"])
        config = dataclasses.replace(config, mesh=MeshConfig(**sizes))
        devices = jax.devices()[: int(np.prod(list(sizes.values())))]
        mesh = make_mesh(config.mesh, devices)
        fed.append(first_batch(config, mesh))
        with jax.set_mesh(mesh):
            trainer = make_trainer(config, mesh, lengths)
            meta = make_meta(config, mesh, trainer.state, {})
            if len(starts) < 2:
                starts.append(jax.tree.map(np.asarray, trainer.init()))
            # Copies, which the first step may consume.
            state = jax.tree.map(
                lambda x, s: jax.device_put(x.copy(), s.sharding), starts[0], trainer.state
            )
            values = []
            for batch in batches(config):
                batch = {
                    name: place_rows(rows, config.mesh.context) for name, rows in batch.items()
                }
                batch = jax.device_put(batch, batch_sharding(mesh))
                state, metrics = trainer.step(state, batch, trainer.schedule)
                values += [float(metrics["loss"]), float(metrics["grad_norm"])]
            losses.append(values)
            if saved is None:
                saved = jax.tree.map(np.asarray, state)
                with CheckpointWriter(workdir, keep=2) as writer:
                    writer.save(state, {}, meta)
            restored = restore_state(workdir, trainer.state, meta).state
            params = restore_params(workdir, mesh)[1]
            states.append(
                all(
                    bool(np.array_equal(x, y)) and x.sharding.is_equivalent_to(s.sharding, x.ndim)
                    for x, y, s in zip(
                        jax.tree.leaves((restored, params)),
                        jax.tree.leaves((saved, saved.params)),
                        jax.tree.leaves((trainer.state, trainer.state.params)),
                        strict=True,
                    )
                )
            )
    same_start = all(map(np.array_equal, *map(jax.tree.leaves, starts)))
    same_batch = all(np.array_equal(batch[name], fed[0][name]) for batch in fed for name in fed[0])
    result = {
        "losses": losses, "restored_exactly": states, "same_start": same_start,
        "same_batch": same_batch,
    }  # fmt: skip
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()

"""Batches of a run on its devices."""

import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh

from asa_jax.config import Config
from asa_jax.context_parallel import place_rows
from asa_jax.data.pipeline import TrainIterator, validation_batches
from asa_jax.data.shards import TokenFolder
from asa_jax.sharding import batch_sharding
from asa_jax.training.run_directory import run_fingerprint
from asa_jax.training.step import Batch


class Feed:
    """Training and validation batches, sharded over the mesh; a context manager.

    Attributes:
        train: the endless training stream, with `get_state` and `set_state`.
        fingerprint: what decides the content of that stream; a state belongs to one fingerprint.
    """

    def __init__(self, config: Config, sources: Sequence[TokenFolder], mesh: Mesh) -> None:
        """Opens the stream at its start.

        Args:
            config: data section and alignment are used.
            sources: opened token folders.
            mesh: devices that the batches go to.

        Raises:
            DataError: a shard is not as its manifest says.
        """
        self._limit = config.training.eval_batches
        self._sources = sources
        self._sharding, self._context = batch_sharding(mesh), mesh.shape["context"]
        self._rows: dict[str, Any] = {
            "sequence_length": config.data.sequence_length,
            "batch_size": config.data.batch_size,
            "alignment": config.model.alignment,
        }
        self._share = _row_share(mesh)
        self.fingerprint = run_fingerprint(config, sources)
        self.train = TrainIterator(
            sources,
            weights=config.data.weights,
            seed=config.data.seed,
            **self._rows,
            **self._share,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.train.close()

    def next(self) -> tuple[Batch, float]:
        """Returns the next training batch and the seconds that it was waited for."""
        asked = time.monotonic()
        batch = next(self.train)
        waited = time.monotonic() - asked
        return self._place(batch), waited

    def peek(self) -> Batch:
        """Returns the next training batch, which `next` gives again."""
        state = self.train.get_state()
        batch = self._place(next(self.train))
        self.train.set_state(state)
        return batch

    def validation(self) -> Iterator[Batch]:
        """The first `eval_batches` batches of validation data, the same each time."""
        batches = validation_batches(self._sources, **self._rows, **self._share)
        return map(self._place, itertools.islice(batches, self._limit))

    def _place(self, batch: dict[str, np.ndarray]) -> Batch:
        local_rows, length = batch["inputs"].shape
        first = self._share["process_index"] * local_rows
        shape = (self._rows["batch_size"], length)

        def place(rows: np.ndarray) -> jax.Array:
            rows = place_rows(rows, self._context)

            def shard(index: Any) -> np.ndarray:
                start, stop, _ = index[0].indices(shape[0])
                return rows[start - first : stop - first, index[1]]

            return jax.make_array_from_callback(shape, self._sharding, shard)

        return {name: place(rows) for name, rows in batch.items()}


def _row_share(mesh: Mesh) -> dict[str, Any]:
    """Which of how many equal shares of the rows the devices of this process hold.

    Processes that divide heads or the sequence of the same rows have the same share.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["context"]
    held = batch_sharding(mesh).addressable_devices_indices_map(shards).values()
    spans = [index[0].indices(shards[0]) for index in held if index is not None]
    first, last = min(span[0] for span in spans), max(span[1] for span in spans)
    return {
        "process_index": first // (last - first),
        "process_count": shards[0] // (last - first),
    }

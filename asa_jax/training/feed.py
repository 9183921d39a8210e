"""Batches of a run on its devices."""

import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh

from asa_jax.config import Config
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
        self._sharding = batch_sharding(mesh)
        self._rows: dict[str, Any] = {
            "sequence_length": config.data.sequence_length,
            "batch_size": config.data.batch_size,
            "alignment": config.model.alignment,
        }
        self._processes = {
            "process_index": jax.process_index(), "process_count": jax.process_count()
        }  # fmt: skip
        order = self._rows | {"weights": config.data.weights, "seed": config.data.seed}
        self.fingerprint = run_fingerprint(config, sources)
        self.train = TrainIterator(sources, **order, **self._processes)

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

    def validation(self) -> Iterator[Batch]:
        """The first `eval_batches` batches of validation data, the same each time."""
        batches = validation_batches(self._sources, **self._rows, **self._processes)
        return map(self._place, itertools.islice(batches, self._limit))

    def _place(self, batch: dict[str, np.ndarray]) -> Batch:
        return {
            name: jax.make_array_from_process_local_data(self._sharding, rows)
            for name, rows in batch.items()
        }

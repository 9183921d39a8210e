"""The documents that rows of a run are made of: attention ends at their borders."""

from collections import Counter

import numpy as np

from asa_jax.config import Config
from asa_jax.data.pipeline import TrainIterator
from asa_jax.training.run_directory import open_sources


def count_documents(config: Config, rows: int) -> dict[int, int]:
    """Reads the first rows that a run trains on.

    Args:
        config: the run; its sources are read.
        rows: how many at least; whole batches are read.

    Returns:
        How many documents, or parts of documents, have each number of tokens.

    Raises:
        ConfigError: a source is not there.
        DataError: a shard is not as its manifest says.
    """
    batches = TrainIterator(
        open_sources(config),
        weights=config.data.weights,
        seed=config.data.seed,
        sequence_length=config.data.sequence_length,
        batch_size=config.data.batch_size,
        alignment=config.model.alignment,
    )
    found: Counter[int] = Counter()
    for _ in range(0, rows, config.data.batch_size):
        for row in np.asarray(next(batches)["segment_ids"]):
            found.update(np.unique(row[row > 0], return_counts=True)[1].tolist())
    batches.close()
    return dict(sorted(found.items()))

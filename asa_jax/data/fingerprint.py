"""What decides the batches of a run, in a form to compare; imports neither grain nor jax."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from asa_jax.data.shards import TokenFolder

PIPELINE_VERSION = 1  # goes up whenever the same settings give other batches


def fingerprint(
    folders: Sequence[TokenFolder],
    *,
    weights: Sequence[float],
    sequence_length: int,
    batch_size: int,
    alignment: int,
    seed: int,
) -> dict[str, Any]:
    """What decides the order and content of training batches; a state belongs to one fingerprint.

    Args:
        folders: as for `asa_jax.data.pipeline.TrainIterator`.
        weights: as for `asa_jax.data.pipeline.TrainIterator`.
        sequence_length: as for `asa_jax.data.pipeline.TrainIterator`.
        batch_size: as for `asa_jax.data.pipeline.TrainIterator`.
        alignment: as for `asa_jax.data.pipeline.TrainIterator`.
        seed: as for `asa_jax.data.pipeline.TrainIterator`.

    Returns:
        A flat JSON-able dict, to compare field by field; paths are not in it.
    """
    shards = [[s.tokens_sha256 for s in f.shards if s.split == "train"] for f in folders]
    return {
        "pipeline_version": PIPELINE_VERSION,
        "sources": [hashlib.sha256(json.dumps(names).encode()).hexdigest() for names in shards],
        "tokenizers": [folder.tokenizer_fingerprint for folder in folders],
        "weights": [float(weight) for weight in weights],
        "sequence_length": sequence_length,
        "batch_size": batch_size,
        "alignment": alignment,
        "seed": seed,
    }

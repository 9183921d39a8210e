"""Caches in files: safetensors, which hold arrays and nothing that could be run.

The file holds the arrays of the row, cut to the tokens that there are, and its token ids. Metadata
name the format, the model and its weights, and a digest of all arrays, so that a damaged file and a
cache of another model are told before anything is drawn.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from asa_jax.decoding.rows import SavedRow, named_arrays, saved_length
from asa_jax.decoding.runner import Runner
from asa_jax.errors import CheckpointError, UserError

FORMAT = "asa_jax cache 1"
TOKENS = "tokens"
# What changes nothing about the numbers that a cache holds.
_FREE_FIELDS = ("init_stddev", "remat", "attention_implementation")


def write_cache_file(path: Path, saved: SavedRow, runner: Runner, tokenizer: str) -> None:
    """Writes a row; the file appears when it is whole.

    Args:
        path: the file.
        saved: the row.
        runner: of the model.
        tokenizer: fingerprint of the tokenizer.

    Raises:
        UserError: the row is empty, or the file cannot be written.
    """
    if not saved.tokens:
        raise UserError(f"{path}: there is no text yet whose cache could be saved")
    arrays = {TOKENS: np.array(saved.tokens, np.int32), **saved.arrays}
    metadata = {
        "format": FORMAT,
        "cache_length": str(saved.cache_length),
        "messages": json.dumps(list(saved.messages)),
        **_fingerprints(runner, tokenizer),
    }
    metadata["digest"] = _digest(arrays, metadata)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        safetensors.numpy.save_file(arrays, partial, metadata=metadata)
        partial.replace(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: cannot be written ({error})") from None
    finally:  # after an interrupt too
        partial.unlink(missing_ok=True)


def read_cache_file(path: Path, runner: Runner, tokenizer: str) -> SavedRow:
    """Reads a row and checks that it is whole and of this model; arguments as `write_cache_file`.

    Raises:
        CheckpointError: it is not.
    """
    arrays, metadata = _load(path)
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path}: is no cache of format {FORMAT!r}; save it anew")
    for name, value in _fingerprints(runner, tokenizer).items():
        if metadata.get(name) != value:
            raise CheckpointError(f"{path}: was made by another {name}; read the text anew")
    if metadata.pop("digest", None) != _digest(arrays, metadata):
        raise CheckpointError(f"{path}: damaged, its digest does not match; read the text anew")
    tokens = arrays.pop(TOKENS).tolist()
    shapes = named_arrays(runner.shapes(saved_length(runner, tokens)))
    wanted = {name: (leaf.shape, leaf.dtype) for name, leaf in shapes.items()}
    if {name: (array.shape, array.dtype) for name, array in arrays.items()} != wanted:
        raise CheckpointError(f"{path}: its arrays are not those of this model; read the text anew")
    messages = json.loads(metadata.get("messages", "[]"))  # not in files of before
    return SavedRow(tokens, arrays, int(metadata["cache_length"]), messages)


def _load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (safetensors.SafetensorError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: is no cache file, or damaged ({error})") from None


def _digest(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).reshape(-1))
    return digest.hexdigest()


def _fingerprints(runner: Runner, tokenizer: str) -> dict[str, str]:
    """What a cache depends on, by the name that errors call it."""
    fields = dataclasses.asdict(runner.cfg)
    numbers = {name: value for name, value in fields.items() if name not in _FREE_FIELDS}
    model = hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()
    sums = runner.fetch(_checksums(runner.params))
    weights = hashlib.sha256(np.array(jax.tree.leaves(sums)).tobytes()).hexdigest()
    return {"model": model, "weights": weights, "tokenizer": tokenizer}


@jax.jit
def _checksums(params: Any) -> Any:
    """For each array a sum of its bits, weighted by their place, modulo 2^32."""

    def checksum(x: jax.Array) -> jax.Array:
        words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
        words = words.astype(jnp.uint32).reshape(-1)
        weights = 2 * jax.lax.iota(jnp.uint32, words.size) + 1
        return jnp.sum(words * weights, dtype=jnp.uint32)

    return jax.tree.map(checksum, params)

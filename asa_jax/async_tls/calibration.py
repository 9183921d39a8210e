"""Which channels of keys the labels hold: found once from sample text, kept in a small file.

A channel c of a key head counts by the mean of |q_c k_c| over tokens and over the query heads that
share it, with RoPE applied to both; the r channels that count most are kept. The score q . k is the
sum of these terms, so the kept channels are those that move it most. For absorbed latents the
same is done with absorbed queries and [latent | rotated key].

The file is safetensors; its metadata name the format and the fingerprint of the model.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from asa_jax.config import ModelConfig
from asa_jax.errors import CheckpointError, UserError

FORMAT = "asa_jax channels 1"
_CHANNELS = "channels"
# Fields of the architecture that change nothing about the numbers.
_FREE_FIELDS = ("init_stddev", "remat", "attention_implementation")


def add_sample(totals: jax.Array, query: jax.Array, key: jax.Array) -> jax.Array:
    """Adds the weight of each channel in one sample of text.

    Args:
        totals: float32 [K, H], of the samples before; zeros at first.
        query: [B, T, N, H], of the same tokens as key.
        key: [B, T, K, H].

    Returns:
        float32 [K, H], sums of |q_c k_c|.
    """
    key = jnp.abs(key.astype(jnp.float32))
    grouped = jnp.abs(query.astype(jnp.float32)).reshape(*key.shape[:3], -1, key.shape[3])
    return totals + jnp.einsum("BTKGH,BTKH->KH", grouped, key)


def choose_channels(totals: jax.Array, num_channels: int) -> np.ndarray:
    """The channels of the greatest weight, of equal ones the first.

    Args:
        totals: [K, H].
        num_channels: r.

    Returns:
        int32 [K, r], ascending.

    Raises:
        ValueError: r is greater than H, or some weight is not finite.
    """
    weights = np.asarray(totals)
    if num_channels > weights.shape[1]:
        raise ValueError(f"num_channels: {num_channels} of the {weights.shape[1]} of a key")
    if not np.isfinite(weights).all():
        raise ValueError("totals: the sample's queries or keys are not finite")
    best = np.argsort(-weights, axis=1, kind="stable")[:, :num_channels]
    return np.sort(best, axis=1).astype(np.int32)


def model_fingerprint(fields: Mapping[str, Any], params: Any) -> str:
    """What calibrated channels depend on, as a digest.

    Args:
        fields: of the model's config, as JSON takes them.
        params: a tree of arrays.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return digest.hexdigest()


def fingerprint_of(cfg: ModelConfig, params: Any) -> str:
    """`model_fingerprint` of a model; how it is computed does not count."""
    fields = dataclasses.asdict(cfg)
    return model_fingerprint({n: v for n, v in fields.items() if n not in _FREE_FIELDS}, params)


def save_channels(path: Path, channels: Sequence[np.ndarray], fingerprint: str) -> None:
    """Writes the channels of all layers; the file appears when it is whole.

    Args:
        path: the file.
        channels: of each layer, int32 [K, r].
        fingerprint: of the model.

    Raises:
        UserError: the file cannot be written.
    """
    metadata = {"format": FORMAT, "model": fingerprint}
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        safetensors.numpy.save_file({_CHANNELS: np.stack(channels)}, partial, metadata=metadata)
        partial.replace(path)
    except (OSError, safetensors.SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error})") from None


def load_channels(
    path: Path, shape: tuple[int, int, int], head_dim: int, fingerprint: str
) -> np.ndarray:
    """Reads channels and checks that they are of this model.

    Args:
        path: the file.
        shape: layers, key heads and channels, [layers, K, r].
        head_dim: features of a key, H.
        fingerprint: of the model.

    Returns:
        int32 [layers, K, r].

    Raises:
        CheckpointError: they are not, or the file is damaged.
    """
    channels, metadata = _read(path)
    if metadata.get("format") != FORMAT or channels is None:
        raise CheckpointError(f"{path}: is no file of format {FORMAT!r}; calibrate anew")
    if metadata.get("model") != fingerprint:
        raise CheckpointError(f"{path}: was calibrated for another model; calibrate anew")
    if channels.dtype != np.int32 or channels.shape != shape:
        found = f"{channels.dtype} {list(channels.shape)}"
        raise CheckpointError(
            f"{path}: holds channels {found}, not int32 {list(shape)}; calibrate anew"
        )
    ascending = (np.diff(channels, axis=-1) > 0).all()
    if not (ascending and (channels >= 0).all() and (channels < head_dim).all()):
        raise CheckpointError(f"{path}: its channels are not ascending numbers below {head_dim}")
    return channels


def _read(path: Path) -> tuple[np.ndarray | None, dict[str, str]]:
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            array = file.get_tensor(_CHANNELS) if names == [_CHANNELS] else None
            return array, file.metadata() or {}
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (safetensors.SafetensorError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: is no file of channels, or damaged ({error})") from None

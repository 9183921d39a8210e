"""Bytes of key/value caches, from the shapes of the caches that decoding allocates."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx

from asa_jax.config import ModelConfig
from asa_jax.model.param_layout import shortest_period, split_kinds
from asa_jax.model.transformer import abstract_model


class CacheBytes(NamedTuple):
    """Bytes of the caches of some layers, by what they hold.

    Attributes:
        tokens: keys, values and latents of tokens.
        rope_keys: rotated keys that latents keep beside them.
        compression: summaries of blocks, and the open block of NSA's compression.
        compression_rope_keys: the rotated keys of those summaries.
        lists: the selected blocks in force: a constant, whatever the length.
    """

    tokens: int
    rope_keys: int
    compression: int
    compression_rope_keys: int
    lists: int

    @property
    def total(self) -> int:
        """Everything but the lists."""
        return sum(self) - self.lists

    @property
    def without_rope_keys(self) -> int:
        return self.tokens + self.compression

    @property
    def without_compression(self) -> int:
        return self.tokens + self.rope_keys


class KindBytes(NamedTuple):
    """The layers of one kind together, for one sequence.

    Attributes:
        num_layers: how many there are.
        allocated: as decoding allocates them: layers with a window keep the window.
        unevicted: were the windows as long as the sequence.
    """

    num_layers: int
    allocated: CacheBytes
    unevicted: CacheBytes


class CacheReport(NamedTuple):
    """The cache of one sequence of `length` tokens.

    Attributes:
        length: tokens.
        kinds: by layer kind.
    """

    length: int
    kinds: dict[str, KindBytes]

    @property
    def whole(self) -> KindBytes:
        """All layers together."""
        return KindBytes(
            sum(kind.num_layers for kind in self.kinds.values()),
            _add(kind.allocated for kind in self.kinds.values()),
            _add(kind.unevicted for kind in self.kinds.values()),
        )


def cache_report(cfg: ModelConfig, lengths: Sequence[int]) -> list[CacheReport]:
    """Measures the cache of one sequence; allocates nothing.

    Args:
        cfg: the architecture.
        lengths: tokens of the sequence.

    Returns:
        A report for each length, in order.
    """
    endless = dataclasses.replace(cfg, window_size=max(*lengths, cfg.window_size))
    return [
        CacheReport(
            length,
            {
                kind: KindBytes(cfg.layer_kinds.count(kind), allocated, unevicted)
                for (kind, allocated), unevicted in zip(
                    _bytes_by_kind(cfg, length).items(),
                    _bytes_by_kind(endless, length).values(),
                    strict=True,
                )
            },
        )
        for length in lengths
    ]


def allocated_bytes(cfg: ModelConfig, batch: int, length: int) -> int:
    """Bytes of all arrays of a cache for `batch` rows of at most `length` tokens."""
    return tree_bytes(cache_shapes(cfg, batch, length))


def cache_shapes(cfg: ModelConfig, batch: int, length: int) -> Any:
    """Shapes and dtypes of the caches of `batch` rows of at most `length` tokens."""
    graphdef, params = _abstract_model(cfg)
    return jax.eval_shape(lambda p: nnx.merge(graphdef, p).init_cache(batch, length), params)


def _bytes_by_kind(cfg: ModelConfig, length: int) -> dict[str, CacheBytes]:
    # Stacked, the cache has one entry for each layer before the repetition and for each of its
    # period, which holds all the repeats.
    caches = cache_shapes(dataclasses.replace(cfg, scan_layers=True), 1, length)
    first, rest = split_kinds(cfg)
    kinds = first + shortest_period(rest)
    layers = list(zip(kinds, map(_measure, caches), strict=True))
    return {
        kind: _add(size for other, size in layers if other == kind)
        for kind in dict.fromkeys(cfg.layer_kinds)
    }


@functools.lru_cache(maxsize=8)
def _abstract_model(cfg: ModelConfig) -> tuple[Any, Any]:
    graphdef, params, _ = abstract_model(cfg)
    return graphdef, params


def _measure(cache: Any) -> CacheBytes:
    """Sorts the arrays of a layer's cache by the names of its fields."""
    sizes = dict.fromkeys(CacheBytes._fields, 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(cache):
        sizes[_part([entry.name for entry in path])] += tree_bytes(leaf)
    return CacheBytes(**sizes)


def _part(fields: list[str]) -> str:
    match fields:
        case ["block_indices"]:
            return "lists"
        case ["rope_key"]:
            return "rope_keys"
        case ["compressed_rope_key"]:
            return "compression_rope_keys"
        case ["compressed_latent"] | ["compressed" | "recent", "key" | "value"]:
            return "compression"
        case ["latent" | "key" | "value"] | ["tokens" | "window", "key" | "value"]:
            return "tokens"
    raise ValueError(f"cache field {'.'.join(fields)} is not known")


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays, or of arrays of such shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _add(sizes: Iterable[CacheBytes]) -> CacheBytes:
    return CacheBytes(*map(sum, zip(*sizes, strict=True)))

"""What a program of `decode` walks: sizes, splits of a row, and the tiles of keys of one split."""

# mypy: disable-error-code="no-untyped-def"

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels.cache_arguments import KEYS_MULTIPLE
from pallas_kernels.mosaic import tiles
from pallas_kernels.mosaic.key_walk import MULTIPROCESSORS
from pallas_kernels.mosaic.tiles import ROWS

KEYS = 64  # of a tile
MAX_SLOTS = 4  # tiles of keys in shared memory
SHARED_MEMORY_BYTES = 227 * 2**10  # of a multiprocessor; each program wastes some by alignment
ALIGNMENT_BYTES = 4 * 2**10
# What a program costs beside its tiles, and what a kernel of the merge costs, in tiles. XLA merges
# up to 8 splits in one kernel and more in two.
PROGRAM_TILES, MERGE_TILES, MERGED_AT_ONCE = 2, 2, 8
MAX_SPLITS = 2 * MULTIPROCESSORS


@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of rows, with what else a query needs to score them.

    Attributes:
      key: [B, S, K, R].
      value: [B, S, K, h], or None: the keys.
      rope_key: [B, S, HR], further numbers of the key of every head, or None.
    """

    key: jax.Array
    value: jax.Array | None
    rope_key: jax.Array | None

    @property
    def value_dim(self) -> int:
        return (self.key if self.value is None else self.value).shape[3]


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Static sizes of a program.

    Attributes:
      warpgroups: Parts of a value, and of a key that is one too.
      slots: Tiles of keys in shared memory.
      resident: Programs that run at a time on the whole device.
      piece: Neighbouring keys of a tile.
    """

    warpgroups: int
    slots: int
    resident: int
    piece: int

    @property
    def pieces(self) -> int:
        """Pieces of a tile."""
        return KEYS // self.piece


def tiling(cache: Cache, piece: int = KEYS) -> Tiling:
    """Chooses the sizes: two programs a multiprocessor where they fit, and as many slots as do.

    Args:
      cache: Keys and values.
      piece: Neighbouring keys of a tile.

    Raises:
      NotImplementedError: The kernel does not take such a cache.
    """
    check_cache(cache, piece)
    width, value_width = cache.key.shape[3], 0 if cache.value is None else cache.value_dim
    rope_width = 0 if cache.rope_key is None else cache.rope_key.shape[2]
    itemsize = cache.key.dtype.itemsize
    query_bytes = ROWS * (width + rope_width) * itemsize
    tile_bytes = KEYS * (width + rope_width + value_width) * itemsize
    for programs in (2, 1):
        room = SHARED_MEMORY_BYTES // programs - ALIGNMENT_BYTES - query_bytes
        if (slots := min(MAX_SLOTS, room // tile_bytes)) >= 2:
            warpgroups = pl.cdiv(cache.value_dim, tiles.MAX_COLUMNS)
            return Tiling(warpgroups, slots, programs * MULTIPROCESSORS, piece)
    raise NotImplementedError(f"key: {width} + {rope_width} numbers do not fit in shared memory")


def check_cache(cache: Cache, piece: int) -> None:
    """Raises NotImplementedError, naming the value, for what the kernel does not take."""
    key, value, rope_key = cache.key, cache.value, cache.rope_key
    if key.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"key: {key.dtype}, the kernel takes bfloat16 and float16")
    if any(x is not None and x.dtype != key.dtype for x in (value, rope_key)):
        raise NotImplementedError("value, rope_key: not of the type of key")
    if value is not None and (key.shape[3] not in (64, 128) or value.shape != key.shape):
        raise NotImplementedError(f"value: {key.shape[3]}/{value.shape[3]} are not 64 or 128 both")
    if value is None and key.shape[3] not in (64, 128, 256, 512):
        raise NotImplementedError(f"key: {key.shape[3]} numbers, not 64, 128, 256 or 512")
    if rope_key is not None and rope_key.shape[2] not in (32, 64):
        raise NotImplementedError(f"rope_key: {rope_key.shape[2]} numbers, not 32 or 64")
    if piece not in (16, 32, 64):
        raise NotImplementedError(f"block_size: {piece} is not 16, 32 or 64")
    if key.shape[1] < piece or key.shape[1] % KEYS_MULTIPLE:
        raise NotImplementedError(
            f"key: {key.shape[1]} tokens, not a multiple of {KEYS_MULTIPLE} of at least {piece}"
        )


def check_group(query: jax.Array, cache: Cache) -> None:
    """Raises NotImplementedError where the query heads of a key head are more than a tile takes."""
    if (group := query.shape[1] // cache.key.shape[2]) > ROWS:
        raise NotImplementedError(f"query: {group} heads of one key head are over {ROWS}")


def num_splits(num_programs: int, num_tiles: int, resident: int) -> int:
    """Returns in how many splits a row takes least: waves of programs times the tiles of each.

    Args:
      num_programs: Rows times key heads.
      num_tiles: Of the longest row.
      resident: Programs that run at a time.
    """

    def cost(splits: int) -> int:
        waves = pl.cdiv(num_programs * splits, resident)
        merge = MERGE_TILES * ((splits > 1) + (splits > MERGED_AT_ONCE))
        return waves * (pl.cdiv(num_tiles, splits) + PROGRAM_TILES) + merge

    return min(range(1, min(num_tiles, MAX_SPLITS) + 1), key=cost)


@dataclasses.dataclass(frozen=True)
class Walk:
    """The tiles of keys of one split, and what a row may see of them.

    Attributes:
      sizes: Static sizes.
      num_keys: S.
      entries: Reference to the lists of blocks [B, K, L], or None.
      batch_id: Row of the batch.
      head: Key head.
      length: Keys that there are.
      begin: First tile.
      count: Tiles.
    """

    sizes: Tiling
    num_keys: int
    entries: Any
    batch_id: Any
    head: Any
    length: Any
    begin: Any
    count: Any

    def piece(self, tile: Any, number: int) -> tuple[Any, Any, Any]:
        """Returns where to copy a piece of a tile of the split from, and which of it is seen.

        The last keys of a cache may be too few for a piece, which then starts before its place.
        """
        index, size = (self.begin + tile) * self.sizes.pieces + number, self.sizes.piece
        first = index * size if self.entries is None else self._entry(index) * size
        start = jnp.clip(first, 0, self.num_keys - size)
        end = jnp.minimum(self.length, first + size)
        if self.entries is not None:  # no block, or one that was there before
            repeated = self._entry(jnp.maximum(index - 1, 0)) == self._entry(index)
            end = jnp.where((first < 0) | ((index > 0) & repeated), 0, end)
        return start, first - start, end - start

    def mask(self, tile: Any, scores: jax.Array) -> jax.Array:
        """Sets to -inf the scores of a tile that are not seen."""
        size, pieces = self.sizes.piece, []
        column = tiles.column_ids(ROWS, size)
        for number in range(self.sizes.pieces):
            _, first, end = self.piece(tile, number)
            piece = scores[:, number * size : (number + 1) * size]
            pieces.append(jnp.where((column >= first) & (column < end), piece, -jnp.inf))
        return jnp.concatenate(pieces, axis=1) if len(pieces) > 1 else pieces[0]

    def _entry(self, index: Any) -> Any:
        return self.entries[self.batch_id, self.head, index]


def walk_split(
    sizes: Tiling, num_keys: int, lengths: Any, entries: Any, splits: int
) -> Walk:  # fmt: skip
    """Returns the walk of this program."""
    batch_id, split, head = (lax.axis_index(name) for name in ("batch", "split", "head"))
    length = jnp.minimum(lengths[batch_id], num_keys)
    num_tiles: Any = lax.div(length + (KEYS - 1), jnp.int32(KEYS))
    if entries is not None:
        num_tiles = jnp.int32(entries.shape[2] // sizes.pieces)
    each = lax.div(num_tiles + (splits - 1), jnp.int32(splits))
    begin = split * each
    count = jnp.clip(num_tiles - begin, 0, each)
    if entries is not None:  # what comes behind the first -1 is nothing but -1
        used = jnp.int32(0)
        for tile in range(pl.cdiv(entries.shape[2] // sizes.pieces, splits)):
            index = jnp.minimum(begin + tile, num_tiles - 1) * sizes.pieces
            is_used = (tile < count) & (entries[batch_id, head, index] >= 0)
            used = used + is_used.astype(jnp.int32)
        count = used
    return Walk(sizes, num_keys, entries, batch_id, head, length, begin, count)

"""Calls of the operations on a cache by their sizes, shared by tests and benchmark."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.blocks import number_of_blocks
from pallas_kernels.cache_arguments import KEYS_MULTIPLE
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.decode_select_blocks import decode_select_blocks
from pallas_kernels.decode_selected_attention import decode_selected_attention

ITEM_BYTES = 2  # bfloat16
PERIOD = 4093  # tokens after which random numbers repeat: a prime, so that blocks differ


@dataclasses.dataclass(frozen=True)
class DecodeCase:
    """Sizes of one operation on a cache.

    Attributes:
      name: Of the case.
      op: 'dense' over all keys, 'window' over a ring, 'compressed' over blocks, 'lists' of blocks,
        'selected' over the tokens of listed blocks.
      num_heads: N.
      num_kv_heads: K.
      width: R, numbers of a key that are its head's own.
      rope_dim: Further numbers of a key that the heads share.
      has_value: Whether values have an array of their own, as wide as keys.
      window_size: Slots of the ring.
      compression_block_size: Tokens of a compressed block.
      compression_stride: Tokens between the starts of neighbouring compressed blocks.
      block_size: Tokens of a block of a list.
      num_selected_blocks: L.
      queries_per_selection: Tokens that share a list.
      starts_list: Whether the rows need a new list; where only that is computed.
    """

    name: str
    op: Literal["dense", "window", "compressed", "lists", "selected"]
    num_heads: int
    num_kv_heads: int
    width: int
    rope_dim: int = 0
    has_value: bool = False
    window_size: int = 512
    compression_block_size: int = 16
    compression_stride: int = 16
    block_size: int = 16
    num_selected_blocks: int = 64
    queries_per_selection: int = 4
    starts_list: bool = True

    def __str__(self) -> str:
        return self.name

    def seen_keys(self, context: int) -> int:
        """Keys of a row that a call reads, of `context` tokens."""
        if self.op == "window":
            return min(self.window_size, context)
        if self.op in ("compressed", "lists"):
            return number_of_blocks(context, self.compression_block_size, self.compression_stride)
        if self.op == "selected":
            return min(self.num_selected_blocks * self.block_size, context)
        return context

    def shapes(self, batch: int, context: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the floating-point arrays of a call."""
        num_keys = context if self.op == "selected" else self.seen_keys(context)
        num_keys += -num_keys % KEYS_MULTIPLE
        keys = (batch, num_keys, self.num_kv_heads, self.width)
        shapes: dict[str, tuple[int, ...]] = {
            "query": (batch, self.num_heads, self.width + self.rope_dim),
            "key": keys,
        }
        if self.has_value and self.op != "lists":
            shapes["value"] = keys
        if self.rope_dim:
            shapes["rope_key"] = (batch, num_keys, self.rope_dim)
        return shapes

    def arguments(self, batch: int, context: int) -> dict[str, jax.Array]:
        """Random arguments of `run` for rows of `context` tokens."""
        shapes = self.shapes(batch, context)
        arrays = {name: draw(i, shape) for i, (name, shape) in enumerate(shapes.items())}
        if self.op == "lists":
            group = self.queries_per_selection
            context = (context - 1) // group * group + (1 if self.starts_list or group == 1 else 2)
            arrays["lse"] = jnp.full((batch, self.num_heads), 8.0)
            arrays["block_indices"] = self.lists(batch, context)
        if self.op == "selected":
            arrays["block_indices"] = self.lists(batch, context)
        counted = context if self.op in ("lists", "selected") else self.seen_keys(context)
        arrays["lengths"] = jnp.full(batch, counted, jnp.int32)
        return arrays

    def lists(self, batch: int, context: int) -> jax.Array:
        """Lists int32 [B, K, L] of the first, the last and random blocks, one of each stretch."""
        length, num_blocks = self.num_selected_blocks, -(-context // self.block_size)
        shape = (batch, self.num_kv_heads, length)
        ends = jnp.arange(length + 1) * num_blocks // length
        inside = jax.random.randint(jax.random.key(9), shape, ends[:-1], jnp.maximum(ends[1:], 1))
        lists = inside.at[..., 0].set(0).at[..., -1].set(num_blocks - 1)
        every = jnp.arange(length)
        few = jnp.where(every < num_blocks, every, -1)
        return jnp.where(num_blocks <= length, few, lists).astype(jnp.int32)

    def run(
        self, arrays: dict[str, jax.Array], implementation: dispatch.Implementation | None
    ) -> Any:
        """Calls the operation."""
        given: dict[str, Any] = {"rope_key": None, **arrays, "implementation": implementation}
        if self.op == "lists":
            return decode_select_blocks(
                **given, block_size=self.block_size,
                compression_block_size=self.compression_block_size,
                compression_stride=self.compression_stride,
                queries_per_selection=self.queries_per_selection,
            )  # fmt: skip
        given.setdefault("value", None)
        if self.op == "selected":
            return decode_selected_attention(**given, block_size=self.block_size)
        return decode_attention(**given)

    def cache_bytes(self, batch: int, context: int) -> int:
        """Bytes of the keys and values that a call cannot do without."""
        if self.op == "lists" and not self.starts_list:
            return 0
        numbers = self.num_kv_heads * self.width * (2 if self.has_value else 1)
        if self.op == "lists":
            numbers = self.num_kv_heads * self.width
        # Listed blocks are others for each head; all other keys share what they share.
        numbers += self.rope_dim * (self.num_kv_heads if self.op == "selected" else 1)
        return batch * self.seen_keys(context) * numbers * ITEM_BYTES

    def floor_bytes(self, batch: int, context: int) -> int:
        """Bytes that a call cannot do without: of the cache, of queries and of results."""
        if self.op == "lists" and not self.starts_list:
            return 0
        of_query = self.num_heads * (self.width + self.rope_dim) * ITEM_BYTES
        of_output = self.num_heads * self.width * ITEM_BYTES
        if self.op == "lists":
            of_output = self.num_kv_heads * self.num_selected_blocks * 4
        return self.cache_bytes(batch, context) + batch * (of_query + of_output)


def draw(seed: int, shape: tuple[int, ...]) -> jax.Array:
    """Normal numbers that repeat along axis 1, so that large arrays take no more to draw."""
    batch, length = shape[:2]
    pattern = jax.random.normal(jax.random.key(seed), (PERIOD, *shape[2:]), jnp.bfloat16)
    return pattern[(1009 * jnp.arange(batch)[:, None] + jnp.arange(length)) % PERIOD]


def _sparse(name: str, **sizes: Any) -> tuple[DecodeCase, ...]:
    """The operations of a layer that selects blocks."""
    lists = DecodeCase(f"lists, {name}", "lists", **sizes)
    return (
        DecodeCase(f"compressed, {name}", "compressed", **sizes),
        lists,
        dataclasses.replace(lists, name=f"lists kept, {name}", starts_list=False),
        DecodeCase(f"selected, {name}", "selected", **sizes),
    )


_ASA: dict[str, Any] = {"num_heads": 16, "num_kv_heads": 2}
_NSA: dict[str, Any] = {"num_heads": 16, "num_kv_heads": 4, "has_value": True}
_NSA_PAPER: dict[str, Any] = {
    **_NSA,
    "compression_block_size": 32,
    "block_size": 64,
    "num_selected_blocks": 16,
    "queries_per_selection": 1,
}

# Layers of configs/*_340m.py and *_1b.py, and of Qwen3-8B and GLM-4.7-Flash.
DECODE_CASES = (
    DecodeCase("dense, 16/4 x 64", "dense", 16, 4, 64, has_value=True),
    DecodeCase("dense, 16/4 x 128", "dense", 16, 4, 128, has_value=True),
    DecodeCase("dense, 32/8 x 128", "dense", 32, 8, 128, has_value=True),
    DecodeCase("dense, 16 on 288/256", "dense", 16, 1, 256, 32),
    DecodeCase("dense, 16 on 576/512", "dense", 16, 1, 512, 64),
    DecodeCase("dense, 20 on 576/512", "dense", 20, 1, 512, 64),
    DecodeCase("window, 16/4 x 64", "window", 16, 4, 64, has_value=True),
    DecodeCase("window, 16 on 288/256", "window", 16, 1, 256, 32),
    DecodeCase("window, 16 on 576/512", "window", 16, 1, 512, 64),
    *_sparse("16/2 on 160/128", width=128, rope_dim=32, **_ASA),
    *_sparse("16/2 on 320/256", width=256, rope_dim=64, **_ASA),
    *_sparse("16/4 x 64", width=64, num_selected_blocks=32, **_NSA),
    *_sparse("16/4 x 128", width=128, num_selected_blocks=32, **_NSA),
    *_sparse("16/4 x 64, blocks of 64", width=64, **_NSA_PAPER),
    *_sparse("16/4 x 128, blocks of 64", width=128, **_NSA_PAPER),
)

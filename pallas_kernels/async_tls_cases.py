"""Decoding by AsyncTLS and by what it is compared with, by sizes; shared by tests and benchmark.

Every method attends from one token a row to a cache that is all in device memory, and all but the
dense one to the same number of tokens. What is chosen from random keys is scattered as in the worst
case for the gather; no method's time depends on the numbers otherwise, but for ties.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.async_tls_attention import async_tls_attention
from pallas_kernels.async_tls_select_blocks import async_tls_select_blocks
from pallas_kernels.async_tls_select_tokens import async_tls_select_tokens
from pallas_kernels.async_tls_select_tokens.reference import Labels
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.decode_cases import ITEM_BYTES, draw
from pallas_kernels.decode_selected_attention import decode_selected_attention
from pallas_kernels.double_sparsity import best_tokens
from pallas_kernels.token_lists import MAX_KEPT_BLOCKS

type Method = Literal[
    "dense", "async_tls", "blocks", "tokens", "attention", "quest", "double_sparsity",
    "double_sparsity_top_k",
]  # fmt: skip
METHODS: tuple[Method, ...] = Method.__value__.__args__
LABEL_EXTRA_BYTES = 4  # step and zero of a label


@dataclasses.dataclass(frozen=True)
class AsyncTLSCase:
    """Sizes of a layer, and of what is selected from its cache.

    Attributes:
      name: Of the case.
      num_heads: N.
      num_kv_heads: K.
      width: R, numbers of a key that are its head's own.
      rope_dim: Further numbers of a key that the heads share.
      has_value: Whether values have an array of their own, as wide as keys.
      num_channels: Channels of a label.
      scale: Factor of the scores.
      num_blocks: Blocks that level 1 chooses.
      token_budget: Tokens that level 2 chooses; those of the blocks that are kept come on top.
      block_size: Tokens of a block.
    """

    name: str
    num_heads: int
    num_kv_heads: int
    width: int
    rope_dim: int
    has_value: bool
    num_channels: int
    scale: float
    num_blocks: int = 128
    token_budget: int = 1024
    block_size: int = 64

    def __str__(self) -> str:
        return self.name

    @property
    def head_dim(self) -> int:
        """Numbers of a query."""
        return self.width + self.rope_dim

    @property
    def num_listed(self) -> int:
        """Entries of a list of blocks."""
        return self.num_blocks + MAX_KEPT_BLOCKS

    @property
    def num_attended(self) -> int:
        """Tokens that a sparse method attends to."""
        return self.token_budget + MAX_KEPT_BLOCKS * self.block_size

    def arguments(self, method: Method, batch: int, context: int) -> dict[str, Any]:
        """Random arguments of `run`, those that the method needs."""
        keys = (batch, context, self.num_kv_heads, self.width)
        by_head = (batch, self.num_kv_heads)
        num_blocks = context // self.block_size
        arrays: dict[str, Any] = {"query": draw(0, (batch, self.num_heads, self.head_dim))}
        if method not in ("blocks", "tokens"):
            arrays["key"] = draw(1, keys)
            if self.has_value:
                arrays["value"] = draw(2, keys)
            if self.rope_dim:
                arrays["rope_key"] = draw(3, (batch, context, self.rope_dim))
        if method in ("blocks", "async_tls", "quest"):
            bounds = draw(4, (batch, num_blocks, self.num_kv_heads, 2 * self.head_dim))
            arrays["bounds"] = jnp.abs(bounds).swapaxes(1, 2)
        if method in ("tokens", "async_tls", "double_sparsity", "double_sparsity_top_k"):
            tokens = (*by_head, context)
            codes = (*tokens, self.num_channels // 2)
            bytes_ = jax.random.randint(jax.random.key(5), codes, 0, 256, jnp.uint8)
            steps = jax.random.uniform(jax.random.key(6), tokens, jnp.float16, 0.1, 0.2)
            arrays["labels"] = Labels(bytes_, steps, -8 * steps)
        if method == "tokens":
            entries = jnp.arange(self.num_listed) * num_blocks // self.num_listed
            few = jnp.where(jnp.arange(self.num_listed) < num_blocks, entries, -1)
            arrays["block_indices"] = jnp.broadcast_to(few, (*by_head, self.num_listed))
        if method == "attention":
            lists = (*by_head, self.num_attended)
            arrays["positions"] = jax.random.randint(jax.random.key(7), lists, 0, context)
        arrays["lengths"] = jnp.full(batch, context, jnp.int32)
        return arrays

    def run(
        self, method: Method, arrays: dict[str, Any], implementation: dispatch.Implementation | None
    ) -> Any:
        """Runs a method, or a part of AsyncTLS by itself."""
        lengths = arrays["lengths"]
        if method == "blocks":
            return self._blocks(arrays, self.num_blocks, implementation)
        if method == "tokens":
            return self._tokens(arrays, arrays["block_indices"], implementation)
        if method == "attention":
            return self._attend(arrays, arrays["positions"], implementation)
        cache = self._cache(arrays)
        options: dict[str, Any] = {"scale": self.scale, "implementation": implementation}
        if method == "dense":
            return decode_attention(**cache, lengths=lengths, **options)
        if method == "quest":
            blocks = self._blocks(arrays, self.token_budget // self.block_size, implementation)
            return decode_selected_attention(
                **cache, block_indices=blocks, lengths=lengths, block_size=self.block_size,
                **options,
            )  # fmt: skip
        if method == "async_tls":
            blocks = self._blocks(arrays, self.num_blocks, implementation)
            return self._attend(
                arrays, self._tokens(arrays, blocks, implementation), implementation
            )
        positions = best_tokens(
            self._label_query(arrays["query"]), arrays["labels"], lengths, self.token_budget,
            self.block_size, self.scale, sorts=method == "double_sparsity_top_k",
            implementation=implementation,
        )  # fmt: skip
        return self._attend(arrays, positions, implementation)

    def _label_query(self, query: jax.Array) -> jax.Array:
        """The channels of labels, spread over the numbers of a query."""
        stride = self.head_dim // self.num_channels
        return query[..., : self.num_channels * stride : stride]

    def _cache(self, arrays: dict[str, Any]) -> dict[str, Any]:
        return {name: arrays.get(name) for name in ("query", "key", "value", "rope_key")}

    def _blocks(self, arrays: dict[str, Any], num_blocks: int, implementation: Any) -> jax.Array:
        return async_tls_select_blocks(
            arrays["query"], arrays["bounds"], arrays["lengths"],
            num_blocks=num_blocks, block_size=self.block_size, implementation=implementation,
        )  # fmt: skip

    def _tokens(self, arrays: dict[str, Any], blocks: jax.Array, implementation: Any) -> jax.Array:
        return async_tls_select_tokens(
            self._label_query(arrays["query"]), arrays["labels"], blocks, arrays["lengths"],
            token_budget=self.token_budget, block_size=self.block_size, scale=self.scale,
            implementation=implementation,
        )  # fmt: skip

    def _attend(self, arrays: dict[str, Any], positions: jax.Array, implementation: Any) -> Any:
        cache = self._cache(arrays)
        return async_tls_attention(
            **cache, positions=positions, scale=self.scale, implementation=implementation
        )

    def floor_bytes(self, method: Method, batch: int, context: int) -> int:
        """Bytes that a call cannot do without: of the cache and its index, query and output."""
        of_token = self.num_kv_heads * self.width * (2 if self.has_value else 1) * ITEM_BYTES
        shared = self.rope_dim * ITEM_BYTES
        num_blocks = -(-context // self.block_size)
        attended = min(self.num_attended, context) * (of_token + shared * self.num_kv_heads)
        bounds = self.num_kv_heads * num_blocks * 2 * self.head_dim * ITEM_BYTES
        label = self.num_kv_heads * (self.num_channels // 2 + LABEL_EXTRA_BYTES)
        labels = min(self.num_blocks * self.block_size, context) * label
        of_index = {
            "dense": 0,
            "blocks": bounds,
            "tokens": labels,
            "attention": 0,
            "async_tls": bounds + labels,
            "quest": bounds,
            "double_sparsity": context * label,
            "double_sparsity_top_k": context * label,
        }[method]
        of_cache = context * (of_token + shared) if method == "dense" else attended
        of_query = self.num_heads * (self.head_dim + self.width) * ITEM_BYTES
        if method in ("blocks", "tokens"):
            of_cache, of_query = 0, self.num_heads * self.head_dim * ITEM_BYTES
        return batch * (of_index + of_cache + of_query)


# Layers of Qwen3-8B and of GLM-4.7-Flash, whose scores are scaled for keys of 256.
ASYNC_TLS_CASES = (
    AsyncTLSCase("Qwen3-8B, 32/8 x 128", 32, 8, 128, 0, True, 32, 128**-0.5),
    AsyncTLSCase("GLM-4.7-Flash, 20 on 576/512", 20, 1, 512, 64, False, 128, 256**-0.5),
)

"""What AsyncTLS keeps, from how many blocks, and when it asks again."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from asa_jax.config import ModelConfig
from asa_jax.config_checks import require, require_choice, require_positive, require_range
from asa_jax.errors import ConfigError

SECTION = "async_tls"
# The first block, the tail and the block before it are attended to whatever the scores are.
NUM_ALWAYS_KEPT = 3
# The value of drift_cosine that switches the guard off.
NEVER = -1.0
# The value of num_channels for a quarter of what is not rotated alone: 32 of 128, 128 of 512 + 64.
A_QUARTER = 0
# The first chooses: see ffi_gather.chosen_backend.
BACKENDS = ("auto", "ffi_gather", "host_thread", "simulated")
SERVED_KINDS = ("full", "mla")

# What --config.async_tls.* changes; their reasons: docs/async_tls.md.
DEFAULTS: dict[str, Any] = {
    "block_size": 64,
    "num_blocks": 128,
    "token_budget": 1024,
    "num_channels": A_QUARTER,
    "drift_cosine": NEVER,
    "lagged": True,
    "num_dense_layers": 2,
    "backend": "auto",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AsyncTLSConfig:
    """Sizes of the two levels, in tokens or features; the defaults' reasons: docs/async_tls.md."""

    block_size: int
    # blocks that level 1 keeps
    num_blocks: int
    # tokens that level 2 keeps in those blocks, for each key head
    token_budget: int
    # features of a key in its label: even
    num_channels: int
    # a key head whose queries turned so far that the cosine of one fell below this selects anew
    # before attention; -1 never does
    drift_cosine: float

    def __post_init__(self) -> None:
        require_positive(SECTION, self, "block_size", "num_blocks", "token_budget", "num_channels")
        even = self.num_channels % 2 == 0
        require(even, f"{SECTION}.num_channels", self.num_channels, "even: two share a byte")
        cosine = self.drift_cosine
        require(NEVER <= cosine <= 1, f"{SECTION}.drift_cosine", cosine, "between -1 and 1")
        most = self.num_blocks * self.block_size
        require(
            self.token_budget <= most, f"{SECTION}.token_budget", self.token_budget,
            f"at most num_blocks * block_size = {most}",
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingConfig:
    """How a whole model is decoded."""

    sizes: AsyncTLSConfig
    # whether blocks are those that the query of the step before chose
    lagged: bool
    # layers from the first on that attend to all tokens, with their caches on the device
    num_dense_layers: int
    # of the blocks of all other layers: see transfers.py
    backend: str

    def __post_init__(self) -> None:
        require_range(SECTION, self, 0, "num_dense_layers")
        require_choice(SECTION, "backend", self.backend, BACKENDS)


class KeyShape(NamedTuple):
    """Keys of a layer: heads K, features H, and those of them that are the value, None for none."""

    num_kv_heads: int
    head_dim: int
    value_dim: int | None


def key_shape(cfg: ModelConfig) -> KeyShape:
    """What the layers of a model keep of a token.

    Raises:
        ConfigError: its layers are not all full or all mla.
    """
    others = [kind for kind in cfg.layer_kinds if kind not in SERVED_KINDS]
    kinds = ", ".join(sorted(set(others or cfg.layer_kinds)))
    if others or len(set(cfg.layer_kinds)) > 1:
        raise ConfigError(
            f"model.layer_kinds: {kinds}: sparse decoding takes models whose layers are all "
            f"{' or all '.join(SERVED_KINDS)}"
        )
    if cfg.layer_kinds[0] == "full":
        return KeyShape(cfg.num_kv_heads, cfg.head_dim, None)
    return KeyShape(1, cfg.kv_lora_rank + cfg.qk_rope_head_dim, cfg.kv_lora_rank)


def decoding_config(values: Mapping[str, Any], cfg: ModelConfig) -> DecodingConfig:
    """Makes checked settings for a model from what the command line gives.

    Args:
        values: the fields of DEFAULTS.
        cfg: the architecture.

    Raises:
        ConfigError: a field is out of range, or layers of the model are not served.
    """
    shape = key_shape(cfg)
    fields = {field.name: values[field.name] for field in dataclasses.fields(AsyncTLSConfig)}
    others = {name: value for name, value in values.items() if name not in fields}
    if fields["num_channels"] == A_QUARTER:
        fields["num_channels"] = max(2, (shape.value_dim or shape.head_dim) // 8 * 2)
    channels, head_dim = fields["num_channels"], shape.head_dim
    require(
        channels <= head_dim, f"{SECTION}.num_channels", channels, f"at most {head_dim}, of a key"
    )
    settings = DecodingConfig(sizes=AsyncTLSConfig(**fields), **others)
    require(
        settings.num_dense_layers <= cfg.num_layers, f"{SECTION}.num_dense_layers",
        settings.num_dense_layers, f"at most {cfg.num_layers}, the layers of the model",
    )  # fmt: skip
    return settings

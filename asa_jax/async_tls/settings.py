"""What AsyncTLS keeps, from how many blocks, and when it asks again."""

import dataclasses

from asa_jax.config_checks import require, require_positive

# The first block, the tail and the block before it are attended to whatever the scores are.
NUM_ALWAYS_KEPT = 3
# The value of drift_cosine that switches the guard off.
NEVER = -1.0


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
        section = "async_tls"
        require_positive(section, self, "block_size", "num_blocks", "token_budget", "num_channels")
        even = self.num_channels % 2 == 0
        require(even, f"{section}.num_channels", self.num_channels, "even: two share a byte")
        cosine = self.drift_cosine
        require(NEVER <= cosine <= 1, f"{section}.drift_cosine", cosine, "between -1 and 1")
        most = self.num_blocks * self.block_size
        require(
            self.token_budget <= most, f"{section}.token_budget", self.token_budget,
            f"at most num_blocks * block_size = {most}",
        )  # fmt: skip

"""The learned summary of a block in native sparse attention."""

import jax
from flax import nnx

from asa_jax.config import ModelConfig
from asa_jax.model.layers import Projection, normal_param


class BlockSummary(nnx.Module):
    """Summary of a block: silu((x + code) W_1) W_2 over its l tokens at once."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs) -> None:
        size, block, std = cfg.head_dim, cfg.compression_block_size, cfg.init_stddev
        self.code = normal_param((block, size), ("block", "head_dim"), std, rngs)
        into = (block, size, size)
        axes = ("block", "head_dim", "latent")
        self.into = Projection(into, axes, (block * size) ** -0.5, rngs=rngs)
        self.out = Projection(into[1:], ("latent", "head_dim"), size**-0.5, rngs=rngs)

    def __call__(self, blocks: jax.Array) -> jax.Array:
        """Maps blocks [B, C, l, K, H] to [B, C, K, H]."""
        code = self.code[...].astype(blocks.dtype)[:, None]
        hidden = jax.nn.silu(self.into("BCLKH,LHF->BCKF", blocks + code))
        return self.out("BCKF,FH->BCKH", hidden)

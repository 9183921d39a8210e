"""The architecture of a model: which layers it has, and their sizes."""

import dataclasses
from typing import Literal

from asa_jax.config_checks import (
    require,
    require_choice,
    require_multiple,
    require_positive,
    require_range,
)
from asa_jax.config_parts import ExpertsConfig, RopeScalingConfig

LAYER_KINDS = ("full", "mla", "sliding", "local", "global", "nsa")
NSA_BRANCHES = ("compression", "selection", "window")
LATENT_KINDS = ("mla", "local", "global")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture; head sizes, windows and blocks in tokens or features."""

    vocab_size: int
    hidden_size: int
    mlp_size: int
    layer_kinds: tuple[str, ...]
    num_heads: int
    # full, sliding, nsa
    num_kv_heads: int
    head_dim: int
    # full, sliding: queries and keys of each head pass through an RMSNorm before RoPE
    qk_norm: bool
    # full, sliding, mla, local: projections from and to the residual stream add a bias
    attention_bias: bool
    # sliding, local, nsa
    window_size: int
    # mla, local, global; q_lora_rank 0 means a full-rank query projection
    kv_lora_rank: int
    q_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    # mla, local, global: whether latents pass through an RMSNorm
    latent_norm: bool
    latent_norm_epsilon: float
    # global: each latent of group_kv_lora_rank features serves num_heads / num_latent_groups heads
    num_latent_groups: int
    group_kv_lora_rank: int
    # global, nsa
    compression_block_size: int
    compression_stride: int
    selection_block_size: int
    num_selected_blocks: int
    queries_per_selection: int
    # nsa
    nsa_branches: tuple[str, ...]
    nsa_share_kv: bool
    nsa_compression: str
    # all kinds
    mlp_bias: bool
    experts: ExpertsConfig
    rope_theta: float
    rope_scaling: RopeScalingConfig
    norm_epsilon: float
    init_stddev: float
    tie_embeddings: bool
    compute_dtype: str
    # auto: kernels where the hardware has them; xla: never
    attention_implementation: str
    remat: str
    scan_layers: bool

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_choices()
        self._check_heads()
        self._check_blocks()
        self._check_kinds("qk_norm", ("full", "sliding"))
        self._check_kinds("attention_bias", ("full", "sliding", "mla", "local"))
        self._check_parts()

    def _check_sizes(self) -> None:
        require_positive(
            "model", self, "vocab_size", "hidden_size", "mlp_size", "num_heads", "num_kv_heads",
            "head_dim", "window_size", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
            "v_head_dim", "num_latent_groups", "group_kv_lora_rank", "compression_block_size",
            "compression_stride", "selection_block_size", "queries_per_selection", "rope_theta",
            "norm_epsilon", "latent_norm_epsilon", "init_stddev",
        )  # fmt: skip
        require_range("model", self, 0, "q_lora_rank")
        # The first, the previous and the own block are always selected.
        require_range("model", self, 3, "num_selected_blocks")

    def _check_choices(self) -> None:
        require(bool(self.layer_kinds), "model.layer_kinds", self.layer_kinds, "at least one layer")
        for kind in self.layer_kinds:
            require_choice("model", "layer_kinds", kind, LAYER_KINDS)
        require(bool(self.nsa_branches), "model.nsa_branches", self.nsa_branches, "not empty")
        for branch in self.nsa_branches:
            require_choice("model", "nsa_branches", branch, NSA_BRANCHES)
        require(
            "selection" not in self.nsa_branches or "compression" in self.nsa_branches,
            "model.nsa_branches", self.nsa_branches, "with compression, whose scores select blocks",
        )  # fmt: skip
        distinct = len(set(self.nsa_branches)) == len(self.nsa_branches)
        require(distinct, "model.nsa_branches", self.nsa_branches, "without repetition")
        require_choice("model", "nsa_compression", self.nsa_compression, ("mean", "mlp"))
        require_choice("model", "compute_dtype", self.compute_dtype, ("float32", "bfloat16"))
        require_choice("model", "remat", self.remat, ("none", "dots", "attention", "full"))
        require_choice(
            "model", "attention_implementation", self.attention_implementation, ("auto", "xla")
        )

    def _check_heads(self) -> None:
        require_multiple("model", self, "num_heads", "num_kv_heads")
        require_multiple("model", self, "num_heads", "num_latent_groups")
        for name in ("head_dim", "qk_rope_head_dim"):
            value = getattr(self, name)
            require(value % 2 == 0, f"model.{name}", value, "even (rotary embedding)")
        widest = self.qk_nope_head_dim + self.qk_rope_head_dim
        require(
            self.v_head_dim <= widest or "mla" not in self.layer_kinds,
            "model.v_head_dim", self.v_head_dim,
            f"at most qk_nope_head_dim + qk_rope_head_dim = {widest} where a layer is 'mla'",
        )  # fmt: skip

    def _check_kinds(self, name: str, kinds: tuple[str, ...]) -> None:
        """Only layers of `kinds` read the switch `name`."""
        others = [kind for kind in self.layer_kinds if kind not in kinds]
        require(
            not (getattr(self, name) and others), f"model.{name}", True,
            f"False where a layer is {others[0]!r}" if others else "",
        )  # fmt: skip

    def _check_blocks(self) -> None:
        require_multiple("model", self, "compression_block_size", "compression_stride")
        require_multiple("model", self, "selection_block_size", "compression_stride")
        require_multiple("model", self, "selection_block_size", "queries_per_selection")
        size = self.selection_block_size
        require(
            self.compression_block_size <= size, "model.compression_block_size",
            self.compression_block_size, f"at most model.selection_block_size = {size}",
        )  # fmt: skip
        if "global" in self.layer_kinds:
            stride = self.compression_stride
            require(
                self.compression_block_size == stride == size, "model.compression_block_size",
                self.compression_block_size, f"equal to model.compression_stride = {stride} and "
                f"model.selection_block_size = {size} where a layer is 'global'",
            )  # fmt: skip

    def _check_parts(self) -> None:
        """The sections of a model against the rest of it."""
        dense, layers = self.experts.num_dense_layers, len(self.layer_kinds)
        require(
            dense < layers or not self.experts.num_experts, "model.experts.num_dense_layers",
            dense, f"below the number of layers, {layers}",
        )  # fmt: skip
        require(
            self.rope_theta > 1 or self.rope_scaling.kind != "yarn", "model.rope_theta",
            self.rope_theta, "above 1 where model.rope_scaling.kind is 'yarn'",
        )  # fmt: skip
        factor = self.rope_scaling.score_factor
        require(
            factor == 1 or "nsa" not in self.layer_kinds, "model.rope_scaling.score_factor",
            factor, "1 where a layer is 'nsa'",
        )  # fmt: skip

    @property
    def num_layers(self) -> int:
        return len(self.layer_kinds)

    def score_scale(self, size: int) -> float:
        """Factor on attention scores over `size` features."""
        return self.rope_scaling.score_factor * size**-0.5

    @property
    def implementation(self) -> Literal["xla"] | None:
        """What `pallas_kernels` are asked for; None: the kernel where there is one."""
        return "xla" if self.attention_implementation == "xla" else None

    @property
    def alignment(self) -> int:
        """Tokens to which packed documents are aligned: the selection block."""
        return self.selection_block_size

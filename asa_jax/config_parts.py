"""Parts of `ModelConfig` that hang together: how RoPE is stretched, and mixtures of experts."""

import dataclasses

from asa_jax.config_checks import (
    require,
    require_choice,
    require_multiple,
    require_positive,
    require_range,
)

ROPE_SCALINGS = ("none", "llama3", "yarn")
SCORINGS = ("softmax", "sigmoid")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScalingConfig:
    """How RoPE is stretched beyond the length of pretraining; see `asa_jax/model/rope.py`."""

    kind: str
    # by which the slow wavelengths grow
    factor: float
    # tokens of a row in pretraining
    original_length: int
    # llama3: wavelengths of original_length / these bound those that are interpolated in part
    low_frequency_factor: float
    high_frequency_factor: float
    # yarn: features that turn this often in original_length bound them; truncate: whole features
    beta_fast: float
    beta_slow: float
    truncate: bool
    # yarn: factors on rotated features, and on all attention scores
    attention_factor: float
    score_factor: float

    def __post_init__(self) -> None:
        section = "model.rope_scaling"
        require_choice(section, "kind", self.kind, ROPE_SCALINGS)
        require_positive(
            section, self, "original_length", "low_frequency_factor", "beta_slow",
            "attention_factor", "score_factor",
        )  # fmt: skip
        require_range(section, self, 1, "factor")
        for high, low in (
            ("high_frequency_factor", "low_frequency_factor"), ("beta_fast", "beta_slow"),
        ):  # fmt: skip
            value, least = getattr(self, high), getattr(self, low)
            require(value > least, f"{section}.{high}", value, f"above {section}.{low} = {least}")
        for name in ("attention_factor", "score_factor"):
            value = getattr(self, name)
            only = self.kind == "yarn" or value == 1
            require(only, f"{section}.{name}", value, f"1 where {section}.kind is not 'yarn'")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """Mixtures of experts in place of MLPs; see `asa_jax/model/mixture_of_experts.py`."""

    # 0: every MLP is dense
    num_experts: int
    num_experts_per_token: int
    # width of an expert; the shared ones are one MLP of num_shared_experts times this
    expert_size: int
    num_shared_experts: int
    # layers from the first on that keep a dense MLP
    num_dense_layers: int
    # a token's experts are of the num_selected_groups best of num_groups
    num_groups: int
    num_selected_groups: int
    # softmax: as DeepSeek-V2; sigmoid: as DeepSeek-V3, with a bias that corrects the choice
    scoring: str
    # whether the weights of a token's experts sum to 1, before routed_scale
    normalize: bool
    routed_scale: float

    def __post_init__(self) -> None:
        section = "model.experts"
        require_range(section, self, 0, "num_experts", "num_shared_experts", "num_dense_layers")
        require_positive(
            section, self, "num_experts_per_token", "expert_size", "num_groups",
            "num_selected_groups", "routed_scale",
        )  # fmt: skip
        require_choice(section, "scoring", self.scoring, SCORINGS)
        if self.num_experts:
            self._check_groups(section)

    def _check_groups(self, section: str) -> None:
        require_multiple(section, self, "num_experts", "num_groups")
        groups, size = self.num_selected_groups, self.num_experts // self.num_groups
        require(
            groups <= self.num_groups, f"{section}.num_selected_groups", groups,
            f"at most {section}.num_groups = {self.num_groups}",
        )  # fmt: skip
        require(
            self.num_experts_per_token <= groups * size, f"{section}.num_experts_per_token",
            self.num_experts_per_token, f"at most {groups * size}, the experts of selected groups",
        )  # fmt: skip
        require(
            size >= 2 or self.scoring == "softmax" or self.num_groups == 1,
            f"{section}.num_groups", self.num_groups,
            "such that a group has at least 2 experts, whose scores a sigmoid adds",
        )  # fmt: skip

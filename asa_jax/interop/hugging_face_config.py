"""Fields of a Hugging Face config.json, each checked where it is read. Imports no jax."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asa_jax.config import ModelConfig, config_from_dict
from asa_jax.errors import ConfigError, ImportedModelError
from asa_jax.interop.safetensors_files import read_json_object
from configs import base

CONFIG_FILE = "config.json"
# Far more layers or experts than a model has.
MAX_COUNT = 2**12
_MISSING = object()
_ROPE_SCALINGS = {"default": "none", "llama3": "llama3", "yarn": "yarn"}


class HuggingFaceConfig:
    """A config.json, or a section of it; every error names the file and the field."""

    def __init__(self, path: Path, values: Mapping[str, Any], section: str = "") -> None:
        self.path, self._values, self._section = path, values, section

    @classmethod
    def of_folder(cls, folder: Path) -> "HuggingFaceConfig":
        """Reads the config.json of a model folder.

        Raises:
            ImportedModelError: it cannot be read.
        """
        return cls(folder / CONFIG_FILE, read_json_object(folder / CONFIG_FILE))

    def error(self, name: str, requirement: str) -> ImportedModelError:
        """The error of a field that is not as required."""
        value = self._values.get(name)
        return ImportedModelError(
            f"{self.path}: {self._section}{name} = {value!r}: must be {requirement}"
        )

    def has(self, name: str) -> bool:
        """Whether a field is there, and not null."""
        return self._values.get(name) is not None

    def integer(self, name: str, default: Any = _MISSING) -> int:
        """An int of 64 bits; its default where it is missing or null."""
        return self._get(name, default, _is_integer, "an int of at most 64 bits")

    def count(self, name: str, default: Any = _MISSING) -> int:
        """An int of things that are gone through one by one."""
        count = self.integer(name, default)
        if not 0 <= count <= MAX_COUNT:
            raise self.error(name, f"from 0 to {MAX_COUNT}")
        return count

    def number(self, name: str, default: Any = _MISSING) -> float:
        """A finite number; its default where it is missing or null."""
        return float(self._get(name, default, _is_number, "a number"))

    def flag(self, name: str, default: Any = _MISSING) -> bool:
        """True or False; its default where it is missing or null."""
        return self._get(name, default, lambda v: type(v) is bool, "true or false")

    def text(self, name: str, default: Any = _MISSING) -> str:
        """A string; its default where it is missing or null."""
        return self._get(name, default, lambda v: type(v) is str, "a string")

    def names(self, name: str) -> list[str]:
        """A list of strings; empty where it is missing or null."""
        return self._get(name, [], _is_names, "a list of strings")

    def has_sections(self) -> bool:
        """Whether a value is an object."""
        return any(isinstance(value, dict) for value in self._values.values())

    def section(self, name: str) -> "HuggingFaceConfig":
        """An object in the object; empty where it is missing or null."""
        values = self._get(name, {}, lambda v: isinstance(v, dict), "an object")
        return HuggingFaceConfig(self.path, values, f"{self._section}{name}.")

    def require(self, name: str, default: Any, *allowed: Any) -> None:
        """Raises ImportedModelError unless a field, or its default, is one of `allowed`."""
        value = self._values.get(name)
        if (default if value is None else value) not in allowed:
            raise self.error(name, " or ".join(map(repr, allowed)) + "; others are not supported")

    def _get(self, name: str, default: Any, is_valid: Any, requirement: str) -> Any:
        value = self._values.get(name)
        if value is None and default is not _MISSING:
            return default
        if not is_valid(value):
            raise self.error(name, requirement)
        return value


def _is_integer(value: Any) -> bool:
    return type(value) is int and _is_number(value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 2**63


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def model_config(source: HuggingFaceConfig, **fields: Any) -> ModelConfig:
    """Makes the configuration of an imported model.

    Args:
        source: its config.json.
        **fields: of `ModelConfig`, all that its layers read; the rest keeps the value of
            `configs/base.py`.

    Returns:
        The checked configuration.

    Raises:
        ImportedModelError: a value is out of range.
    """
    config = base.get_config().to_dict()
    experts = config["model"]["experts"] | fields.pop("experts", {})
    config["model"] |= {**_common_fields(source), "experts": experts, **fields}
    try:
        return config_from_dict(config).model
    except ConfigError as error:
        raise ImportedModelError(f"{source.path}: {error}") from None


def _common_fields(source: HuggingFaceConfig) -> dict[str, Any]:
    """Fields of `ModelConfig` that all architectures have under the same names."""
    source.require("hidden_act", "silu", "silu")
    if source.has("quantization_config"):
        raise source.error("quantization_config", "absent; quantised weights are not supported")
    section, scaling = rope_scaling(source)
    return {
        "vocab_size": source.integer("vocab_size"),
        "hidden_size": source.integer("hidden_size"),
        "mlp_size": source.integer("intermediate_size"),
        "num_heads": source.integer("num_attention_heads"),
        "num_latent_groups": 1,
        "norm_epsilon": source.number("rms_norm_eps", 1e-6),
        "latent_norm_epsilon": 1e-6,
        "attention_bias": source.flag("attention_bias", False),
        "tie_embeddings": source.flag("tie_word_embeddings", False),
        "init_stddev": source.number("initializer_range", 0.02),
        "rope_theta": section.number("rope_theta", source.number("rope_theta", 10000.0)),
        "rope_scaling": scaling,
        "compute_dtype": _compute_dtype(source),
    }


def _compute_dtype(source: HuggingFaceConfig) -> str:
    """The dtype of the checkpoint; half precision is computed in bfloat16."""
    dtype = source.text("dtype", source.text("torch_dtype", "float32"))
    return "bfloat16" if dtype in ("bfloat16", "float16") else "float32"


def rope_scaling(source: HuggingFaceConfig) -> tuple[HuggingFaceConfig, dict[str, Any]]:
    """Reads how RoPE is stretched.

    Args:
        source: a config.json, with `rope_parameters` (transformers 5) or `rope_scaling` (before).

    Returns:
        The section that it is in, and the fields of `RopeScalingConfig`.

    Raises:
        ImportedModelError: a field is wrong or the kind not known.
    """
    section = source.section("rope_parameters")
    if not source.has("rope_parameters"):
        section = source.section("rope_scaling")
    if section.has_sections():
        raise source.error("rope_parameters", "one object for all layers")
    for place in (source, section):
        place.require("partial_rotary_factor", 1.0, 1.0)
    field = "rope_type" if section.has("rope_type") else "type"
    section.require(field, "default", *_ROPE_SCALINGS)
    kind = section.text(field, "default")
    fields = base.get_config().model.rope_scaling.to_dict() | {"kind": _ROPE_SCALINGS[kind]}
    if kind != "default":
        fields |= _stretch(source, section)
    if kind == "llama3":
        fields["low_frequency_factor"] = section.number("low_freq_factor")
        fields["high_frequency_factor"] = section.number("high_freq_factor")
    if kind == "yarn":
        fields |= _yarn(section, fields["factor"])
    return section, fields


def _stretch(source: HuggingFaceConfig, section: HuggingFaceConfig) -> dict[str, Any]:
    name = "original_max_position_embeddings"
    place = source if source.has(name) else section
    original = place.integer(name, source.integer("max_position_embeddings", 2048))
    if not section.has("factor") and original > 0:
        factor = source.integer("max_position_embeddings", 2048) / original
    else:
        factor = section.number("factor")
    return {"original_length": original, "factor": factor}


def _yarn(section: HuggingFaceConfig, factor: float) -> dict[str, Any]:
    on_rotated, on_all = section.number("mscale", 0), section.number("mscale_all_dim", 0)
    for name in ("mscale", "mscale_all_dim"):
        if section.number(name, 0) < 0:
            raise section.error(name, "at least 0")
    if on_rotated and on_all:
        attention_factor = yarn_mscale(factor, on_rotated) / yarn_mscale(factor, on_all)
    else:
        attention_factor = yarn_mscale(factor, 1)
    return {
        "beta_fast": section.number("beta_fast", 32),
        "beta_slow": section.number("beta_slow", 1),
        "truncate": section.flag("truncate", True),
        "attention_factor": section.number("attention_factor", attention_factor),
    }


def yarn_mscale(factor: float, weight: float) -> float:
    """Temperature of attention over a context stretched by `factor` (arXiv 2309.00071, 3.4)."""
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

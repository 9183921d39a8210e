"""The checked configuration: every wrong field is named in one line."""

import copy
import dataclasses
import json
import math
from typing import Any

import hypothesis
import pytest
from absl.testing import parameterized
from hypothesis import strategies as st

from asa_jax.config import Config, config_from_dict, config_to_dict
from asa_jax.errors import ConfigError
from configs import asa_340m, base


def _values() -> dict[str, Any]:
    return asa_340m.get_config().to_dict()


FIELDS = [(section, name) for section, fields in _values().items() for name in fields]
NUMBERS = [(s, n) for s, n in FIELDS if type(_values()[s][n]) in (int, float)]
# Numbers that may be 0.
ZERO = {
    "q_lora_rank", "seed", "final_learning_rate_ratio", "warmup_steps", "decay_fraction", "b1",
    "b2", "weight_decay", "eval_every_steps", "accumulation_steps", "profile_start_step",
    "profile_steps", "spike_factor",
}  # fmt: skip


def _error(section: str, name: str, value: Any) -> str:
    """The message about a configuration in which one field has another value."""
    values = _values()
    values[section][name] = value
    with pytest.raises(ConfigError) as caught:
        config_from_dict(values)
    return _checked_message(caught.value)


def _checked_message(error: ConfigError) -> str:
    message = str(error)
    assert message and "\n" not in message
    assert error.exit_code == 2
    return message


class WrongTypeTest(parameterized.TestCase):
    @hypothesis.settings(max_examples=300, deadline=None)
    @hypothesis.given(field=st.sampled_from(FIELDS), data=st.data())
    def test_names_the_field(self, field, data):
        section, name = field
        right = type(_values()[section][name])
        allowed = {float: (float, int), int: (int,), str: (str,), bool: (bool,)}
        wrong = st.one_of(
            st.none(), st.booleans(), st.integers(), st.floats(), st.text(),
            st.dictionaries(st.text(), st.integers()), st.lists(st.none(), min_size=1),
        ).filter(lambda value: type(value) not in allowed.get(right, ()))  # fmt: skip
        message = _error(section, name, data.draw(wrong))
        self.assertStartsWith(message, f"config.{section}.{name}")

    def test_bool_is_no_number(self):
        self.assertEqual(
            _error("model", "num_heads", True), "config.model.num_heads = True: must be of type int"
        )

    def test_elements_of_tuples(self):
        self.assertStartsWith(_error("data", "weights", (1.0, "2")), "config.data.weights[1] = '2'")

    @parameterized.parameters(*NUMBERS)
    def test_not_finite_or_too_large(self, section, name):
        too_large = [10**400] if type(_values()[section][name]) is float else []
        for value in (math.nan, math.inf, -math.inf, *too_large):
            self.assertStartsWith(_error(section, name, value), f"config.{section}.{name}")

    def test_section_that_is_no_mapping(self):
        values = {**_values(), "mesh": 8}
        with pytest.raises(ConfigError, match=r"^config\.mesh = 8: must be a section"):
            config_from_dict(values)

    @parameterized.parameters(*FIELDS)
    def test_missing_and_unknown_fields(self, section, name):
        values = _values()
        values[section][f"{name}_"] = values[section].pop(name)
        with pytest.raises(ConfigError) as caught:
            config_from_dict(values)
        self.assertStartsWith(
            _checked_message(caught.value), f"config.{section}.{name}_: unknown field"
        )
        del values[section][f"{name}_"]
        with pytest.raises(ConfigError) as caught:
            config_from_dict(values)
        self.assertEqual(str(caught.value), f"config.{section}.{name}: missing")

    @parameterized.parameters("model", "data", "optimizer", "training", "mesh", "evaluation")
    def test_missing_section(self, section):
        values = _values()
        del values[section]
        with pytest.raises(ConfigError, match=f"^config.{section}: missing$"):
            config_from_dict(values)


class WrongValueTest(parameterized.TestCase):
    @parameterized.parameters(*NUMBERS)
    def test_negative_and_zero(self, section, name):
        for value in (-3,) if name in ZERO else (-3, 0):
            message = _error(section, name, value)
            self.assertStartsWith(message, f"config.{section}.{name} = {value}")
            self.assertIn("must be", message)

    @parameterized.parameters(*sorted(ZERO - {"seed"}))
    def test_zero_is_allowed(self, name):
        values = _values()
        (section,) = (s for s, n in FIELDS if n == name)
        values[section][name] = 0
        self.assertEqual(getattr(getattr(config_from_dict(values), section), name), 0)

    @parameterized.parameters(
        ("model", "layer_kinds", ()),
        ("model", "layer_kinds", ("full", "round")),
        ("model", "nsa_branches", ()),
        ("model", "nsa_branches", ("selection",)),
        ("model", "nsa_branches", ("compression", "windows")),
        ("model", "nsa_branches", ("window", "window")),
        ("model", "nsa_compression", "max"),
        ("model", "compute_dtype", "float16"),
        ("model", "attention_implementation", "triton"),
        ("model", "remat", "some"),
        ("model", "num_heads", 18),
        ("model", "num_kv_heads", 5),
        ("model", "num_latent_groups", 3),
        ("model", "head_dim", 63),
        ("model", "qk_rope_head_dim", 31),
        ("model", "num_selected_blocks", 2),
        ("model", "compression_stride", 3),
        ("model", "compression_stride", 8),
        ("model", "selection_block_size", 24),
        ("model", "selection_block_size", 32),
        ("model", "compression_block_size", 32),
        ("model", "queries_per_selection", 3),
        ("data", "sources", ()),
        ("data", "weights", (1.0, 2.0)),
        ("data", "weights", (0.0,)),
        ("data", "sequence_length", 8200),
        ("data", "seed", 2**32),
        ("training", "seed", 2**64),
        ("evaluation", "seed", 2**32),
        ("optimizer", "name", "sgd"),
        ("optimizer", "schedule", "linear"),
        ("optimizer", "final_learning_rate_ratio", 1.5),
        ("optimizer", "decay_fraction", 1.01),
        ("optimizer", "b1", 1.0),
        ("optimizer", "b2", 1.0),
        ("optimizer", "warmup_steps", 10**9),
        ("training", "keep_checkpoints", 1),
        ("mesh", "fsdp", -2),
        ("evaluation", "tasks", ("perplexities",)),
        ("evaluation", "lengths", ()),
        ("evaluation", "lengths", (1,)),
        ("evaluation", "lengths", (2**40,)),
        ("evaluation", "depths", ()),
        ("evaluation", "depths", (0.5, 1.5)),
    )
    def test_names_a_field_of_the_check(self, section, name, value):
        """Of two fields that do not fit together the message names both."""
        self.assertIn(f"{section}.{name}", _error(section, name, value))

    def test_two_rests_in_the_mesh(self):
        self.assertStartsWith(_error("mesh", "tensor", -1), "config.mesh")

    def test_accumulation_that_does_not_divide_the_batch(self):
        message = _error("optimizer", "accumulation_steps", 7)
        self.assertEqual(
            message,
            "config.data.batch_size = 64: must be a multiple of optimizer.accumulation_steps = 7",
        )

    def test_parts_of_a_batch(self):
        """As few as leave a device `device_tokens` or one row; 64 rows of 8,192 tokens."""
        mesh = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1}
        parts = {}
        for name, changes in {
            "one device": {}, "eight": {"data": 8}, "six": {"fsdp": 6}, "half rows": {"context": 2},
        }.items():  # fmt: skip
            values = _values()
            values["optimizer"]["device_tokens"] = 65_536
            parts[name] = config_from_dict(values).batch_parts(mesh | changes)
        self.assertEqual(parts, {"one device": 8, "eight": 1, "six": 2, "half rows": 4})
        values["optimizer"]["device_tokens"] = 1000
        self.assertEqual(config_from_dict(values).batch_parts(mesh), 64)
        values["optimizer"]["accumulation_steps"] = 2
        self.assertEqual(config_from_dict(values).batch_parts(mesh), 2)

    def test_values_of_mla_that_are_wider_than_keys(self):
        values = _values()
        values["model"].update(layer_kinds=("mla",), v_head_dim=128)
        with pytest.raises(ConfigError, match=r"^config\.model\.v_head_dim = 128"):
            config_from_dict(values)

    def test_overlapping_blocks_need_no_global_layer(self):
        values = _values()
        blocks = {"compression_block_size": 32, "selection_block_size": 64}
        values["model"].update(layer_kinds=("nsa",), **blocks)
        self.assertEqual(config_from_dict(values).model.alignment, 64)
        values["model"].update(layer_kinds=("nsa", "global"))
        with pytest.raises(ConfigError, match="'global'"):
            config_from_dict(values)

    @hypothesis.settings(max_examples=300, deadline=None)
    @hypothesis.given(
        changes=st.lists(
            st.tuples(st.sampled_from(NUMBERS), st.integers(-(10**6), 10**6)),
            min_size=1,
            max_size=4,
        )
    )
    def test_any_numbers_give_a_config_or_one_line(self, changes):
        values = _values()
        for (section, name), value in changes:
            values[section][name] = value
        try:
            config = config_from_dict(copy.deepcopy(values))
        except ConfigError as error:
            message = _checked_message(error)
            self.assertTrue(
                any(name in message for (_, name), _ in changes) or "config.mesh" in message,
                message,
            )
        else:
            self.assertEqual(config_to_dict(config), values)


class RoundTripTest(parameterized.TestCase):
    def test_through_json(self):
        config = config_from_dict(base.get_config().to_dict())
        stored = json.dumps(config_to_dict(config))
        self.assertEqual(config_from_dict(json.loads(stored)), config)
        self.assertIsInstance(config_from_dict(json.loads(stored)).model.layer_kinds, tuple)

    def test_whole_numbers_become_floats(self):
        values = _values()
        values["model"]["rope_theta"] = 500_000
        theta = config_from_dict(values).model.rope_theta
        self.assertIs(type(theta), float)

    def test_is_frozen_and_hashable(self):
        config = config_from_dict(_values())
        self.assertEqual(hash(config), hash(config_from_dict(_values())))
        with self.assertRaises(dataclasses.FrozenInstanceError):
            config.model.num_heads = 3

    def test_no_field_has_a_default(self):
        """base.py names every field once; a forgotten one must not go unnoticed."""
        for section in dataclasses.fields(Config):
            is_section = dataclasses.is_dataclass(section.type)
            for field in dataclasses.fields(section.type) if is_section else (section,):
                self.assertIs(field.default, dataclasses.MISSING, field.name)
                self.assertIs(field.default_factory, dataclasses.MISSING, field.name)

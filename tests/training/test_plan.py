"""Plans against hand counts; test_plan_measured.py holds them to an H100."""

import json
import subprocess
import sys

import pytest

from asa_jax.config import config_from_dict
from asa_jax.errors import ConfigError
from asa_jax.flags import PROJECT
from asa_jax.training.plan import main, make_plan, table
from asa_jax.training.plan_documents import count_documents
from asa_jax.training.plan_share import trace_share
from configs import asa_340m

ONE = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1}


def config_of(arm="asa", **fields):
    values = asa_340m.get_config(arm)
    values.update_from_flattened_dict(fields)
    return config_from_dict(values.to_dict())


def test_products_by_hand():
    """6 a weight and token."""
    config = config_of(
        "sliding",
        **{
            "model.layer_kinds": ("sliding", "sliding"), "model.hidden_size": 64,
            "model.mlp_size": 96, "model.vocab_size": 512, "model.num_heads": 4,
            "model.num_kv_heads": 2, "model.head_dim": 16, "model.remat": "none",
            "data.sequence_length": 64, "data.batch_size": 4,
        },
    )  # fmt: skip
    layer = 64 * (4 * 16 + 2 * 2 * 16) + 4 * 16 * 64 + 3 * 64 * 96
    expected = 64 * 4 * 6 * (2 * layer + 64 * 512)
    share = trace_share(config, ONE)
    assert sum(each.flops * each.times for each in share.products) == expected
    # Each of four devices has a half of the rows and of heads, MLP and vocabulary.
    part = trace_share(config, {**ONE, "fsdp": 2, "tensor": 2})
    assert sum(each.flops * each.times for each in part.products) == expected / 4


def test_the_command_plans_for_devices_that_are_not_here(tmp_path):
    command = [
        sys.executable, "-m", "asa_jax.training.plan", "--config=configs/asa_1b.py",
        "--devices=64", "--config.mesh.fsdp=8", f"--json={tmp_path / 'plan.json'}",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["mesh"] == {"data": 8, "fsdp": 8, "tensor": 1, "context": 1}
    assert done.stdout.strip() == table(plan).strip()
    assert "assumed: one 400 Gb/s InfiniBand port" in done.stdout
    assert plan["tokens_per_second"] == pytest.approx(256 * 8192 / plan["step_seconds"])
    assert plan["days"] == pytest.approx(47_700 * plan["step_seconds"] / 86_400)
    # An eighth of what fsdp spreads; what makes keys of latents is whole on every device.
    parameters = plan["memory_bytes"]["parameters"]
    assert 4 * plan["parameters"] / 8 < parameters < 4 * plan["parameters"] / 6


def test_attention_ends_where_documents_do():
    """Two halves of a row have half of its pairs."""
    seconds = [
        make_plan(config_of("full"), 1, "H100", documents)["compute_seconds"]["attention: causal"]
        for documents in ({8192: 1}, {4096: 2})
    ]
    assert seconds[1] == pytest.approx(seconds[0] / 2, rel=1e-3)


def test_documents_are_those_of_the_rows(make_config, token_folder):
    config = make_config(**{"data.sources": (str(token_folder),)})
    rows, length = config.data.batch_size, config.data.sequence_length
    found = count_documents(config, rows + 1)  # so two batches are read
    assert max(found) <= length
    tokens = sum(tokens * number for tokens, number in found.items())
    assert rows * length < tokens <= 2 * rows * length


@pytest.mark.parametrize(
    ("share", "remark"),
    [
        (0.8, ""),
        (0.9, "near the 92% of a device that a run takes"),
        (0.95, "DOES NOT FIT the 92% of a device that a run takes"),
    ],
)
def test_what_memory_asks_for(share, remark):
    """A tenth, by which a plan may be wrong, is said."""
    plan = make_plan(config_of("sliding"), 1, "H100") | {"memory_share": share}
    (line, _) = [line for line in table(plan).splitlines() if "  together" in line]
    assert line.split(maxsplit=2)[2:] == ([remark] if remark else [])


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"model.experts.num_experts": 16}, "H100", "num_experts = 16: a plan does not know"),
        ({"model.compute_dtype": "float32"}, "H100", "compute_dtype = 'float32': rates are known"),
        ({"mesh.data": 3}, "H100", "config.mesh: data=3 x fsdp=1 .* but 4 are here"),
        ({}, "V100", "--device_kind=V100: no attained rates are known; one of H100, H200"),
    ],
)
def test_what_cannot_be_planned_is_one_line(fields, kind, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(config_of(**fields), 4, kind)


def test_a_folder_cannot_take_the_numbers(tmp_path):
    with pytest.raises(ConfigError, match=f"--json={tmp_path}: is a directory"):
        main(config_of(), 1, "H100", 0, str(tmp_path))

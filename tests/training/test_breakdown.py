"""The breakdown of a step: kernels are counted once, where they belong."""

import pytest

from asa_jax.errors import UserError
from asa_jax.training.breakdown import (
    Kernel,
    break_down,
    kernel_rows,
    op_names,
    profile_steps,
    rows,
)

PROGRAM = """
  ROOT %gemm.1 = bf16[8]{0} custom-call(%x), metadata={op_name="jit(step)/jvp(mlp)/dot" id=1}
  fusion.2 = f32[] fusion(%a), metadata={op_name="jit(step)/transpose(jvp(attention))/norm/mul"}
  %k.3 = f32[] custom-call(), metadata={op_name="jit/attention/selected_attention/pallas_call"}
  %k.4 = f32[] custom-call(), metadata={op_name="jit/transpose(jvp())/checkpoint/rematted_computation/attention/selected_attention/pallas_call"}
  %add.5 = f32[] add(%a, %b), metadata={op_name="jit(step)/add"}
"""  # noqa: E501


def test_kernels_count_by_part_kind_and_pass():
    """Two overlap, between two nothing runs; one is of no instruction of the program."""
    kernels = [
        Kernel("nvjet_128", "gemm.1", 0.0, 2.0),
        Kernel("fusion_2", "fusion.2", 1.0, 2.5),
        Kernel("selected_attention_forward", "k.3", 4.0, 5.0),
        Kernel("selected_attention_forward", "k.4", 5.0, 7.0),
        Kernel("add_5", "add.5", 7.0, 7.5),
        Kernel("memset", "memset", 7.5, 8.0),
    ]
    result = break_down(kernels, op_names(PROGRAM), steps=2)
    assert result.parts == {
        ("mlp", "products", "forward"): 1.0,
        ("norm", "other", "backward"): 0.75,
        ("selected_attention", "kernel", "forward"): 0.5,
        ("selected_attention", "kernel", "recomputed"): 1.0,
        ("other", "other", "forward"): 0.25,
        ("unknown", "other", "forward"): 0.25,
    }
    assert (result.busy, result.span) == (3.25, 4.0)
    table = rows(result)
    assert table[0] == (
        "selected_attention", "kernel", "500.00", "1000.00", "0.00", "1500.00", "37.5"
    )  # fmt: skip
    longest = kernel_rows(result, PROGRAM, 3)
    assert longest[0] == ("1000.00", "0.5", "nvjet_128", "bf16[8]{0}", "jit(step)/jvp(mlp)/dot")
    assert [line[0] for line in longest] == ["1000.00", "1000.00", "750.00"]
    assert table[-1][0] == "no kernel runs" and table[-1][-2:] == ("750.00", "18.8")


def test_a_profile_without_kernels_is_one_line():
    with pytest.raises(UserError, match="profile of 3 steps holds no kernel"):
        break_down([], {}, steps=3)


@pytest.mark.usefixtures("fast_compilation")
def test_a_step_is_broken_down(make_config, token_folder):
    """On a CPU: time is found in every part of the model, forwards and backwards."""
    record = profile_steps(
        make_config(
            **{
                "model.layer_kinds": ("local", "global"),
                "model.remat": "full",
                "data.sources": (str(token_folder),),
            }
        )
    )
    parts, _, busy, span = record["breakdown"]
    found = {(part, name) for part, _, name in parts}
    for part in ("mlp", "attention", "norm", "selected_attention", "sliding_window_attention"):
        assert {(part, name) for name in ("forward", "recomputed", "backward")} <= found, part
    assert {("loss", "backward"), ("optimizer", "forward"), ("embedding", "forward")} <= found
    assert 0 < busy <= span <= 10 * record["step_seconds"] + 1
    assert record["argument_bytes"] > 0 and record["temporary_bytes"] > 0


@pytest.mark.parametrize("name", ["x.1", "%x.1", "ROOT %x.1"])
def test_names_of_instructions(name):
    assert op_names(f'  {name} = f32[] add(), metadata={{op_name="a/b"}}\n') == {"x.1": "a/b"}

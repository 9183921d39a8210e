"""The compile-time command compiles the step that trains."""

from asa_jax.config import config_from_dict
from asa_jax.training.compile_time import compile_time
from configs import tiny


def test_more_layers_need_more_memory():
    values = tiny.get_config().to_dict()
    values["data"].update(batch_size=1, sequence_length=128)
    values["model"].update(hidden_size=32, mlp_size=32, layer_kinds=("sliding",))
    one = compile_time(config_from_dict(values))
    values["model"]["layer_kinds"] = ("sliding",) * 3
    three = compile_time(config_from_dict(values))
    assert min(one["lower_seconds"], one["compile_seconds"]) > 0
    for what in ("state_bytes", "temporary_bytes"):
        assert three[what] > one[what] > 0

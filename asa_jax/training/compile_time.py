"""Times the compilation of a training step, without running it.

python -m asa_jax.training.compile_time --config=configs/asa_340m.py \\
    --config.model.scan_layers=False --config.data.batch_size=1
"""

from asa_jax.config import Config
from asa_jax.flags import exit_on_error, parse_config_flag, run_command

if __name__ == "__main__":
    CONFIG = exit_on_error(parse_config_flag)

import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from asa_jax.sharding import make_mesh
from asa_jax.training.step import batch_shapes, make_trainer


def lower_step(config: Config, mesh: Mesh) -> jax.stages.Lowered:
    """Lowers the training step of a run for a mesh, on shapes alone."""
    with jax.set_mesh(mesh):
        trainer = make_trainer(config, mesh, np.ones(config.model.vocab_size, np.int32))
        return trainer.lower(batch_shapes(config))


def compile_time(config: Config) -> dict[str, float]:
    """Lowers and compiles the step of a run on shapes alone.

    Args:
        config: the run; its mesh must fit the devices.

    Returns:
        lower_seconds and compile_seconds of wall time; of one device state_bytes, with the batch,
        and temporary_bytes.
    """
    mesh = make_mesh(config.mesh)
    start = time.monotonic()
    lowered = lower_step(config, mesh)
    middle = time.monotonic()
    compiled: Any = lowered.compile()
    end = time.monotonic()
    memory = compiled.memory_analysis()
    return {
        "lower_seconds": middle - start,
        "compile_seconds": end - middle,
        "state_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
    }


def main(config: Config) -> None:
    """Prints what `compile_time` measures."""
    times = compile_time(config)
    print(
        f"lower {times['lower_seconds']:.1f} s  compile {times['compile_seconds']:.1f} s  "
        f"state and batch {times['state_bytes'] / 2**20:,.0f} MiB  "
        f"temporaries {times['temporary_bytes'] / 2**20:,.0f} MiB on {jax.devices()[0].device_kind}"
    )


if __name__ == "__main__":
    run_command(lambda: main(CONFIG))

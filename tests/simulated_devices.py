"""Runs a script of the tests where JAX finds eight devices, which one process cannot add later."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from asa_jax.flags import PROJECT

# Compiling takes most of the time here.
FLAGS = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true"
)


def run_on_eight_devices(script: Path, request: Any) -> Any:
    """Gives a request to the script as JSON on its input and returns the JSON that it prints."""
    done = subprocess.run(
        [sys.executable, script],
        input=json.dumps(request),
        env=os.environ | {"XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)

"""Predicts memory, collectives, speed and days of a run on some devices, without touching one.

python -m asa_jax.training.plan --config=configs/asa_1b.py --devices=64 \\
    --config.mesh.data=-1 --config.mesh.fsdp=8

Everything is counted from shapes; `asa_jax/training/plan_rates.py` holds the attained rates with
their sources, and the output names the assumed ones. `--json=FILE` writes all numbers. Attention
sees whole rows unless `--document_rows=64` counts the documents of as many rows of the data.
"""

import os
from pathlib import Path

from absl import flags

from asa_jax.config import Config
from asa_jax.flags import exit_on_error, parse_config_flag, run_command

if __name__ == "__main__":
    flags.DEFINE_integer("devices", 1, "devices of the run", lower_bound=1)
    flags.DEFINE_string("device_kind", "H100", "of which attained rates are known")
    flags.DEFINE_integer(
        "document_rows",
        0,
        "counts the documents of so many rows of config.data.sources; 0: a row is one document",
        lower_bound=0,
    )
    flags.DEFINE_string("json", None, "writes all numbers to this file")
    CONFIG = exit_on_error(parse_config_flag)
    os.environ["JAX_PLATFORMS"] = "cpu"  # shapes alone; a GPU is left to others

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from asa_jax.errors import ConfigError
from asa_jax.sharding import MESH_AXES, mesh_sizes
from asa_jax.training.device_memory import MEMORY_SHARE
from asa_jax.training.flops import flops_per_token
from asa_jax.training.plan_collectives import planned_collectives
from asa_jax.training.plan_documents import count_documents
from asa_jax.training.plan_memory import memory_by_cause
from asa_jax.training.plan_rates import DeviceKind, device_kind
from asa_jax.training.plan_share import trace_share
from asa_jax.training.plan_time import step_time
from asa_jax.training.step import make_trainer

SECONDS_PER_DAY = 86_400
GIB, GB = 2**30, 1e9


def make_plan(
    config: Config, devices: int, kind: str, documents: Mapping[int, int] | None = None
) -> dict[str, Any]:
    """Predicts a run.

    Args:
        config: the run.
        devices: how many.
        kind: a name of `plan_rates.DEVICE_KINDS`.
        documents: how many of each number of tokens rows are made of; None: a row is one document.

    Returns:
        Numbers by name, as the JSON file holds them; bytes and seconds where not said otherwise.

    Raises:
        ConfigError: the mesh does not fit the devices or the model, or the device is not known.
    """
    device = device_kind(kind)
    _check(config)
    sizes = mesh_sizes(config.mesh, devices)
    # It has what shapes and shardings need, which is all that is asked of it.
    mesh: Any = AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    trainer = make_trainer(config, mesh, np.ones(config.model.vocab_size, np.int32))
    share = trace_share(config, mesh.shape)
    memory = memory_by_cause(config, mesh, trainer.state, share)
    most = sum(memory.values())
    documents = documents or {config.data.sequence_length: 1}
    found = planned_collectives(config, mesh.shape)
    time = step_time(config, mesh.shape, share, memory["parameters"], found, device, documents)
    params = sum(leaf.size for leaf in jax.tree.leaves(trainer.state.params))
    tokens = config.data.batch_size * config.data.sequence_length
    rate = tokens / time.total
    flops = flops_per_token(config.model, params, config.data.sequence_length)
    return {
        "devices": devices,
        "device_kind": kind,
        "mesh": dict(mesh.shape),
        "parameters": params,
        "memory_bytes": memory,
        "peak_bytes": most,
        "memory_share": most / device.memory,
        "collectives": [each._asdict() for each in found],
        "compute_seconds": time.compute,
        "overlapped_link_seconds": time.overlapped,
        "waited_link_seconds": time.waited,
        "link_use": time.link_use(),
        "step_seconds": time.total,
        "tokens_per_step": tokens,
        "tokens_per_second": rate,
        "mfu": rate * flops / (device.peak * devices),
        "steps": config.training.steps,
        "days": config.training.steps * time.total / SECONDS_PER_DAY,
        "documents": {str(length): number for length, number in documents.items()},
        "assumptions": _assumptions(config, device, documents),
    }


def _check(config: Config) -> None:
    """Refuses what the rates say nothing about."""
    if config.model.experts.num_experts:
        raise ConfigError(
            f"config.model.experts.num_experts = {config.model.experts.num_experts}: a plan does "
            "not know mixtures of experts; set it to 0"
        )
    if config.model.compute_dtype != "bfloat16":
        raise ConfigError(
            f"config.model.compute_dtype = {config.model.compute_dtype!r}: rates are known for "
            "bfloat16 alone"
        )


def _assumptions(config: Config, device: DeviceKind, documents: Mapping[int, int]) -> list[str]:
    """What the prediction takes for granted."""
    said = [
        f"{name} {rate.value:.3g}: {rate.source}"
        for name, rate in device.rates.items()
        if rate.source.startswith("assumed")
    ]
    if list(documents) == [config.data.sequence_length]:
        said.append("every row is one document")
    said += [
        "attention attains its rates at all head sizes, and with fewer than 65,536 tokens a device",
        "weights and gradients travel while layers are computed; activations are waited for",
        "input, evaluation, checkpoints and compilation take no time",
    ]
    if config.model.attention_implementation == "xla":
        said.append(
            "products of attention attain the rates of kernels, which this run does without"
        )
    if config.mesh.context != 1:
        said.append("kernels take parts of rows at the rate of whole ones")
    if config.optimizer.name == "muon":
        said.append("Muon's own products take no time")
    return said


def table(plan: dict[str, Any]) -> str:
    """The plan for a terminal."""
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan["mesh"].items() if size > 1)
    lines = [
        f"{plan['parameters']:,} parameters on {plan['devices']} {plan['device_kind']}, "
        f"mesh {mesh or 'of one device'}, {plan['tokens_per_step']:,} tokens a step",
        "",
        "memory of a device when it needs most, GiB",
    ]
    for cause, size in plan["memory_bytes"].items():
        lines.append(f"  {cause:<42}{size / GIB:8.2f}")
    together = f"{plan['peak_bytes'] / GIB:8.2f}{_remark(plan['memory_share'])}"
    lines += [f"  {'together':<42}{together}", ""]
    lines.append("collectives of a step, GB through a device")
    for each in plan["collectives"]:
        what = f"{each['op']} over {'+'.join(each['axes'])}"
        lines.append(f"  {what:<42}{each['bytes'] / GB:8.2f}  {each['what']}")
    lines += ["" if plan["collectives"] else "  none", "time of a step, seconds"]
    for cause, seconds in plan["compute_seconds"].items():
        lines.append(f"  {cause:<42}{seconds:8.3f}")
    for link, use in plan["link_use"].items():
        beside, alone = plan["overlapped_link_seconds"][link], plan["waited_link_seconds"][link]
        if beside + alone:
            text = f"{link}: beside it {beside:.3f}, waited for"
            lines.append(f"  {text:<42}{alone:8.3f}  busy {use:.0%} of a step")
    billions = plan["steps"] * plan["tokens_per_step"] / 1e9
    lines += [
        f"  {'together':<42}{plan['step_seconds']:8.3f}",
        "",
        f"{plan['tokens_per_second']:,.0f} tokens/s, MFU {plan['mfu']:.1%}, {plan['days']:.2f} "
        f"days for {billions:,.1f}B tokens in {plan['steps']:,} steps",
        "",
        "assumptions",
        *(f"  {text}" for text in plan["assumptions"]),
    ]
    return "\n".join(lines)


def _remark(memory_share: float) -> str:
    """Whether that fits; empty where it does even if the plan is wrong by a tenth."""
    if 1.1 * memory_share <= MEMORY_SHARE:
        return ""
    taken = f"{MEMORY_SHARE:.0%} of a device that a run takes"
    return f"  {'DOES NOT FIT' if memory_share > MEMORY_SHARE else 'near'} the {taken}"


def main(config: Config, devices: int, kind: str, document_rows: int, output: str | None) -> None:
    """Prints the plan, and writes it where asked to."""
    if output is not None and not Path(output).parent.is_dir():
        raise ConfigError(f"--json={output}: {Path(output).parent} is not a directory")
    if output is not None and Path(output).is_dir():
        raise ConfigError(f"--json={output}: is a directory; name a file")
    documents = count_documents(config, document_rows) if document_rows else None
    plan = make_plan(config, devices, kind, documents)
    print(table(plan))
    if output is not None:
        Path(output).write_text(json.dumps(plan, indent=1) + "\n")


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    run_command(
        lambda: main(CONFIG, FLAGS.devices, FLAGS.device_kind, FLAGS.document_rows, FLAGS.json)
    )

"""Expected time of a training step: work over attained rates (`plan_rates`).

    step    = max(compute, weights and gradients) + activations
    compute = products + attention + elementwise + copies + optimizer

Each product takes the larger of its operations over the attained rate and its bytes over the
attained bandwidth; attention by operation, with the rate of its kernel, for the documents of a row;
elementwise work and the copies of a scan over layers the bytes that fused operations move
(`plan_fusion`); the optimizer reads and writes its state. Weights and gradients travel while layers
are computed and cost what is beyond; activations (`tensor` and `context`) are waited for.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from itertools import product
from typing import NamedTuple

from asa_jax.config import Config
from asa_jax.training.flops import attention_work
from asa_jax.training.plan_collectives import Planned, link_bytes
from asa_jax.training.plan_rates import DeviceKind
from asa_jax.training.plan_share import Share

# Of a float32 parameter: gradient (norm, then update), parameter and two moments read; parameter
# and moments written.
OPTIMIZER_BYTES = 8 * 4
LINKS = ("nvlink", "network")


class StepTime(NamedTuple):
    """Seconds of a step on one device.

    Attributes:
        compute: by cause.
        overlapped: on each link, of weights and gradients.
        waited: on each link, of activations.
    """

    compute: dict[str, float]
    overlapped: dict[str, float]
    waited: dict[str, float]

    @property
    def total(self) -> float:
        """Of the whole step."""
        hidden = max(sum(self.compute.values()), *self.overlapped.values())
        return hidden + sum(self.waited.values())

    def link_use(self) -> dict[str, float]:
        """The share of a step in which each link is busy."""
        return {link: (self.overlapped[link] + self.waited[link]) / self.total for link in LINKS}


def step_time(
    config: Config,
    mesh: Mapping[str, int],
    share: Share,
    parameter_bytes: float,
    found: list[Planned],
    device: DeviceKind,
    documents: Mapping[int, int],
) -> StepTime:
    """Seconds of a step.

    Args:
        config: the run.
        mesh: sizes of the mesh axes.
        share: what one device does.
        parameter_bytes: on one device.
        found: the collectives of a step.
        device: attained rates.
        documents: how many of each number of tokens rows are made of.
    """
    parts = config.batch_parts(mesh)
    rates = {name: rate.value for name, rate in device.rates.items()}
    products = sum(
        each.times * max(each.flops / rates["products"], each.bytes / rates["hbm"])
        for each in share.products
    )
    attention = attention_seconds(config, mesh, share.rows, rates, documents)
    compute = {
        "matrix products": parts * products,
        **{f"attention: {op}": parts * seconds for op, seconds in attention.items()},
        "elementwise": parts * share.demand.moved / rates["hbm"],
        "copies of a scan": parts * share.demand.copied / rates["hbm"],
        "optimizer": parameter_bytes / 4 * OPTIMIZER_BYTES / rates["hbm"],
    }
    times = [{link: 0.0 for link in LINKS} for _ in range(2)]
    for each in found:
        waits = "tensor" in each.axes or (each.axes == ("context",) and each.op != "reduce")
        for link, amount in link_bytes(each, mesh, device.host).items():
            times[waits][link] += amount / (rates[link] * rates["link_share"])
    return StepTime(compute, *times)


def attention_seconds(
    config: Config,
    mesh: Mapping[str, int],
    rows: int,
    rates: Mapping[str, float],
    documents: Mapping[int, int],
) -> dict[str, float]:
    """Seconds by operation of attention on one device, forwards (twice where recomputed) and back.

    Args:
        config: the run.
        mesh: sizes of the mesh axes.
        rows: of a device.
        rates: by name.
        documents: how many of each number of tokens rows are made of.
    """
    model = config.model
    queries = rows * config.data.sequence_length / mesh["context"] * model.num_heads
    queries /= mesh["tensor"] * sum(length * number for length, number in documents.items())
    forwards = 2 if model.remat == "full" else 1
    seconds: defaultdict[str, float] = defaultdict(float)
    for (kind, layers), (length, number) in product(
        Counter(model.layer_kinds).items(), documents.items()
    ):
        of_all = layers * queries * length * number
        for work in attention_work(model, kind, length):
            pairs = " pairs" if work.op == "selected" and kind == "nsa" else ""
            once = forwards * work.flops() / rates[f"{work.op}{pairs} forward"]
            if work.op != "select":
                once += work.flops(backward=True) / rates[f"{work.op}{pairs} backward"]
            seconds[work.op] += of_all * once
    return dict(seconds)

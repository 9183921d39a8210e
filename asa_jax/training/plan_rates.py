"""What devices attain, by which a plan turns work into time: every figure with its source.

A figure that was not measured by this project says `assumed`, and the plan says so in its output.
"""

from typing import NamedTuple

from asa_jax.errors import ConfigError

_KERNELS = "docs/results/kernels.md, 65,536 tokens"


class Rate(NamedTuple):
    """One attained rate.

    Attributes:
        value: in the unit of its name.
        source: where it was measured; begins with `assumed` where it was not.
    """

    value: float
    source: str


class DeviceKind(NamedTuple):
    """A device and the links to others of its kind.

    Attributes:
        peak: operations a second in bfloat16, of the data sheet, for the utilisation.
        memory: bytes.
        host: devices of a host.
        rates: attained rates by name: `products` and, by operation of attention, forwards and
            backwards, operations a second; `hbm`, `nvlink` and `network` bytes a second, the links
            of one device and one way; `link_share` is a factor.
    """

    peak: float
    memory: float
    host: int
    rates: dict[str, Rate]


H100 = DeviceKind(
    peak=989e12,
    memory=84.98e9,  # as the driver reports it; the data sheet says 80 GB
    host=8,
    rates={
        "products": Rate(752e12, "bfloat16 product of 8192 x 8192 matrices, one H100, jax 0.11.2"),
        "hbm": Rate(2839e9, "elementwise copy, one H100, jax 0.11.2"),
        # Operations of forward and backward products (benchmark_floors) over measured times.
        "window forward": Rate(267e12, f"{_KERNELS}: window 512, MLA"),
        "window backward": Rate(249e12, f"{_KERNELS}: window 512, MLA"),
        "compressed forward": Rate(600e12, f"{_KERNELS}: compressed, ASA"),
        "compressed backward": Rate(447e12, f"{_KERNELS}: compressed, ASA"),
        "select forward": Rate(204e12, f"{_KERNELS}: select, ASA"),
        "selected forward": Rate(278e12, "2.22 ms, ASA, 65,536 tokens: commit 870e720"),
        "selected backward": Rate(165e12, "11.8 ms with forward: commit 870e720"),
        "selected pairs forward": Rate(118e12, f"{_KERNELS}: selected, NSA 16/4 x 64"),
        "selected pairs backward": Rate(155e12, f"{_KERNELS}: selected, NSA 16/4 x 64"),
        "causal forward": Rate(455e12, f"assumed that of cuDNN in {_KERNELS}: dense, 16/4 x 64"),
        "causal backward": Rate(404e12, f"assumed that of cuDNN in {_KERNELS}: dense, 16/4 x 64"),
        "nvlink": Rate(450e9, "data sheet: 900 GB/s both ways"),
        "network": Rate(50e9, "assumed: one 400 Gb/s InfiniBand port for each device"),
        "link_share": Rate(0.8, "assumed share of a link that large collectives attain"),
    },
)
DEVICE_KINDS = {"H100": H100, "H200": H100._replace(memory=141e9)}


def device_kind(name: str) -> DeviceKind:
    """The table of a device.

    Raises:
        ConfigError: there is none.
    """
    if name not in DEVICE_KINDS:
        raise ConfigError(
            f"--device_kind={name}: no attained rates are known; one of {', '.join(DEVICE_KINDS)}"
        )
    return DEVICE_KINDS[name]

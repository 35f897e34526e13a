"""What devices can do, each number with its source, and the shares of it that programs are taken to reach."""

from __future__ import annotations

from dataclasses import dataclass, replace

from llama31_core.errors import ConfigError
from llama31_core.validation import did_you_mean

GB = 10**9


@dataclass(frozen=True)
class Efficiency:
    """Which share of a peak rate is reached: assumptions, the same for every model and layout, fitted to none.

    Attributes:
        products: of the matrix rate, in products of thousands of rows.
        attention: of the matrix rate, in fused attention, whose softmax runs beside the products.
        memory: of the memory's rate, in what only reads and writes.
        links: of a link's rate, in collectives of megabytes.
    """

    products: float = 0.75
    attention: float = 0.5
    memory: float = 0.8
    links: float = 0.7


@dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
        flops_per_s: of 16-bit matrix products (float32 on a CPU), one multiply-add counted as two.
        memory_bytes: there is.
        reserved_bytes: of it, what is not for tensors: runtime, graphs, buffers of the collectives.
        memory_bytes_per_s: reading or writing.
        link_bytes_per_s: from one device of a node to one other, one way; a device uses all its links at once.
        node_size: devices that such links join.
        network_bytes_per_s: from one device to other nodes, one way.
        collective_latency_s: of a collective, whatever its size.
        is_fused: attention keeps no scores, and numbers have 16 bits where the run's file says so; else float32.
        sources: where each number is from.
    """

    name: str
    title: str
    flops_per_s: float
    memory_bytes: int
    reserved_bytes: int
    memory_bytes_per_s: float
    link_bytes_per_s: float
    node_size: int
    network_bytes_per_s: float
    collective_latency_s: float
    is_fused: bool
    sources: tuple[tuple[str, str], ...]
    efficiency: Efficiency = Efficiency()

    @property
    def usable_bytes(self) -> int:
        """For tensors."""
        return self.memory_bytes - self.reserved_bytes

    def bandwidth(self, ranks: list[int]) -> float:
        """Bytes a second that each rank of a group sends in a collective, at the links' share of their rate."""
        nodes = {rank // self.node_size for rank in ranks}
        rate = self.link_bytes_per_s * (len(ranks) - 1) if len(nodes) == 1 else self.network_bytes_per_s
        return rate * self.efficiency.links


_CANN = "CANN ops-nn, cross_platform_migration_guide.md, Atlas A2 (910B2, says its issue 6033)"
_HCCS = "392 GB/s, as commonly given for Atlas 800T A2, both ways over seven HCCS links of a full mesh"
_NPU_LATENCY = "assumed, to start a collective"
_ASCEND_RESERVE = "MindFormers' files give the framework 58 of 64 GB (context.max_device_memory)"

CPU_RESERVED_BYTES = 330_000_000

_ASCEND_910B = Device(
    name="ascend910b",
    title="Ascend 910B2 (Atlas 800T A2, 900 A2 PoD)",
    flops_per_s=353.9e12,
    memory_bytes=64 * GB,
    reserved_bytes=6 * GB,
    memory_bytes_per_s=1.6e12,
    link_bytes_per_s=28e9,
    node_size=8,
    network_bytes_per_s=25e9,
    collective_latency_s=20e-6,
    is_fused=True,
    sources=(
        ("353.9 TFLOP/s", f"{_CANN}: 24 cube cores at 1.8 GHz; 376 counts the vector cores too"),
        ("64 GB, 1.6 TB/s", "the same guide"),
        ("6 GB reserved", _ASCEND_RESERVE),
        ("28 GB/s a link", _HCCS),
        ("25 GB/s network", "200 Gbit/s RoCE for each device: Atlas 800T A2"),
        ("20 us", _NPU_LATENCY),
    ),
)
_ASCEND_910B3 = replace(
    _ASCEND_910B,
    name="ascend910b3",
    title="Ascend 910B3",
    flops_per_s=294.9e12,
    sources=(("294.9 TFLOP/s", "20 cube cores instead of 24 at the same clock"), *_ASCEND_910B.sources[1:]),
)
_ASCEND_910A = Device(
    name="ascend910a",
    title="Ascend 910 (Atlas 800, 2019)",
    flops_per_s=256e12,
    memory_bytes=32 * GB,
    reserved_bytes=2 * GB,
    memory_bytes_per_s=1.2e12,
    link_bytes_per_s=30e9,
    node_size=4,
    network_bytes_per_s=12.5e9,
    collective_latency_s=20e-6,
    is_fused=True,
    sources=(
        ("256 TFLOP/s", "Huawei at Hot Chips 31 (2019): 32 cores, float16; bfloat16 is not among its types"),
        ("32 GB, 1.2 TB/s", "Hot Chips 31: four stacks of HBM2"),
        ("2 GB reserved", "assumed"),
        ("30 GB/s a link", "Hot Chips 31: three HCCS ports of 240 Gbit/s, which join four devices"),
        ("12.5 GB/s network", "assumed: one of the two RoCE ports of 100 Gbit/s that Hot Chips 31 shows"),
        ("20 us", _NPU_LATENCY),
    ),
)
_CPU = Device(
    name="cpu",
    title="a CPU of two cores, float32",
    flops_per_s=180e9,
    memory_bytes=16 * GB,
    reserved_bytes=CPU_RESERVED_BYTES,
    memory_bytes_per_s=20e9,
    link_bytes_per_s=1e9,
    node_size=1 << 20,
    network_bytes_per_s=1e9,
    collective_latency_s=200e-6,
    is_fused=False,
    sources=(
        ("180 GFLOP/s", "measured: float32 products of MindSpore on two cores with AVX-512"),
        ("16 GB", "assumed; ranks of one host share it"),
        ("0.33 GB reserved", "measured by tools/bench/plan.py: 0.33 GB with AVX-512, 0.24 GB with AVX2"),
        ("20 GB/s", "assumed of two cores"),
        ("1 GB/s, 200 us", "assumed of collectives over the loopback interface"),
    ),
    efficiency=Efficiency(products=0.8, attention=0.25),
)

DEVICES: dict[str, Device] = {d.name: d for d in (_ASCEND_910B, _ASCEND_910B3, _ASCEND_910A, _CPU)}


def find_device(name: str) -> Device:
    """A device by name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in DEVICES:
        raise ConfigError(f"device is {name!r}; {did_you_mean(name, DEVICES)}")
    return DEVICES[name]

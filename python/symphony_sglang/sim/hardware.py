"""Machines and models as numbers: what a prefill, a decode step and a byte of KV cost.

Published peaks are vendors' data-sheet values; the efficiencies below them are assumptions, stated
here, of the order that serving engines reach. A measured profile sets the speeds themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

from symphony_sglang.core.gate import GateSnapshot, Rate
from symphony_sglang.errors import ConfigError

# Of the peak, in large matrix products of a prefill, and of HBM bandwidth while decoding.
PREFILL_EFFICIENCY = 0.55
DECODE_EFFICIENCY = 0.7
# Scheduling and launch, for every step.
STEP_SECONDS = 0.003
LINK_LATENCY_SECONDS = 0.0001
DISK_LATENCY_SECONDS = 0.0002
# Weights, activations and fragmentation leave this share of HBM beyond the weights for KV.
KV_SHARE = 0.88


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A dense transformer in 16-bit weights."""

    name: str
    parameters: float
    layers: int
    hidden: int
    kv_heads: int
    head_size: int
    value_bytes: int = 2

    @property
    def token_bytes(self) -> int:
        """KV of one token, all layers."""
        return 2 * self.layers * self.kv_heads * self.head_size * self.value_bytes


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk, or a share of one."""

    name: str
    size_bytes: float
    read_bytes_per_second: float
    write_bytes_per_second: float


@dataclass(frozen=True, slots=True)
class Machine:
    """One accelerator and its share of a host. Rates in bytes (or operations) a second."""

    name: str
    operations_per_second: float
    hbm_bytes: float
    hbm_bytes_per_second: float
    link_bytes_per_second: float  # host to device, one direction
    host_bytes: float
    disk: Disk
    network_bytes_per_second: float


MODELS = {
    shape.name: shape
    for shape in (
        ModelShape("llama-3.1-8b", 8.03e9, 32, 4096, 8, 128),
        ModelShape("llama-2-13b", 13.0e9, 40, 5120, 40, 128),
    )
}
# Host to device, one direction, as reached: PCIe 4.0 x16 carries some 25 of 32 GB/s, 5.0 twice as
# much.
# By blocks: copies of 16 tokens of one layer, 32 KiB with grouped heads, as vLLM swaps.
LINKS = {"pcie-4.0-x16": 25e9, "pcie-5.0-x16": 50e9, "pcie-4.0-x16-by-blocks": 6e9}
DISKS = {
    disk.name: disk
    for disk in (
        Disk("nvme", 4e12, 3.2e9, 2.0e9),
        Disk("nvme-quarter", 1e12, 0.8e9, 0.5e9),
        Disk("nvme-5.0-pair", 4e12, 12e9, 6e9),
    )
}
NETWORKS = {"100gbe": 12.5e9, "100gbe-quarter": 3.1e9}
MACHINES = {
    machine.name: machine
    for machine in (
        # SYMPHONY §5.1: nodes of four A100-80GB with 256 GB of memory, 4 TB of SSD and 100 Gb/s,
        # so a quarter of each for one GPU.
        Machine("a100-80g", 312e12, 80e9, 2.039e12, LINKS["pcie-4.0-x16"], 64e9,
                DISKS["nvme-quarter"], NETWORKS["100gbe-quarter"]),
        # SXM, with two NVMe drives, 256 GB and 100 GbE for itself.
        Machine("h200", 989e12, 141e9, 4.8e12, LINKS["pcie-5.0-x16"], 256e9,
                DISKS["nvme-5.0-pair"], NETWORKS["100gbe"]),
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Speeds:
    """Seconds of one worker's work, as straight lines; what the worker model runs on."""

    layers: int
    token_bytes: int
    step_seconds: float
    prefill_token_seconds: float
    prefill_pair_seconds: float  # of each (new token, earlier token) pair in attention
    decode_base_seconds: float
    decode_request_seconds: float
    decode_context_seconds: float  # of each token of context in the batch
    device_tokens: int
    host_tokens: int
    nvme_tokens: int
    link_bytes_per_second: float
    nvme_read_bytes_per_second: float
    nvme_write_bytes_per_second: float
    network_bytes_per_second: float
    link_latency_seconds: float = LINK_LATENCY_SECONDS
    disk_latency_seconds: float = DISK_LATENCY_SECONDS

    def prefill_seconds(self, new_tokens: int, context_tokens: int) -> float:
        """Compute `new_tokens` after `context_tokens` that are there, without the step's own."""
        pairs = new_tokens * (context_tokens + new_tokens / 2)
        return new_tokens * self.prefill_token_seconds + pairs * self.prefill_pair_seconds

    def decode_seconds(self, batch: int, context_tokens: int) -> float:
        """One step of a running batch."""
        return (
            self.decode_base_seconds
            + batch * self.decode_request_seconds
            + context_tokens * self.decode_context_seconds
        )

    def gate(self) -> GateSnapshot:
        """What this worker would have measured of itself, for the break-even gate."""
        return GateSnapshot(
            nvme_to_host=Rate(
                self.nvme_read_bytes_per_second / self.token_bytes, self.disk_latency_seconds
            ),
            host_to_device=Rate(
                self.link_bytes_per_second / self.token_bytes, self.link_latency_seconds
            ),
            prefill=Rate(1.0 / self.prefill_token_seconds, self.step_seconds),
        )


def speeds_of(machine: Machine, shape: ModelShape) -> Speeds:
    """A roofline: prefill bound by operations, decode by reading weights and KV.

    Raises:
        ConfigError: the model's weights leave no room for KV.
    """
    weight_bytes = shape.parameters * shape.value_bytes
    device_tokens = int((machine.hbm_bytes - weight_bytes) * KV_SHARE / shape.token_bytes)
    if device_tokens <= 0:
        raise ConfigError(f"{shape.name} needs {weight_bytes:.3g} bytes; {machine.name} has fewer")
    operations = machine.operations_per_second * PREFILL_EFFICIENCY
    bandwidth = machine.hbm_bytes_per_second * DECODE_EFFICIENCY
    return Speeds(
        layers=shape.layers,
        token_bytes=shape.token_bytes,
        step_seconds=STEP_SECONDS,
        prefill_token_seconds=2 * shape.parameters / operations,
        prefill_pair_seconds=4 * shape.layers * shape.hidden / operations,
        decode_base_seconds=STEP_SECONDS + weight_bytes / bandwidth,
        decode_request_seconds=2 * shape.parameters / operations,
        decode_context_seconds=shape.token_bytes / bandwidth,
        device_tokens=device_tokens,
        host_tokens=int(machine.host_bytes / shape.token_bytes),
        nvme_tokens=int(machine.disk.size_bytes / shape.token_bytes),
        link_bytes_per_second=machine.link_bytes_per_second,
        nvme_read_bytes_per_second=machine.disk.read_bytes_per_second,
        nvme_write_bytes_per_second=machine.disk.write_bytes_per_second,
        network_bytes_per_second=machine.network_bytes_per_second,
    )

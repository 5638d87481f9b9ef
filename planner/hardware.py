"""The machines a plan runs on: devices, their links, nodes, clusters and what they cost, as values.

Units, everywhere in this module: memory in bytes; rates in bytes per second and operations per second; link rates are for
one direction and one device; power in watts; money in USD per hour. A field that no source states is `None`; nothing is 0.

Rates are dense (no structured sparsity). `bf16`, `fp16` and `fp8` are matrix-unit rates with fp32 accumulation, `fp32` and
`fp64` are vector rates, `int8` counts integer operations. Values are read from profiles by `planner.readers.hardware_profiles`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from planner.errors import NotCovered, PlanError, UnknownField, nearest
from planner.sources import Source

__all__ = [
    "Cluster",
    "Device",
    "Link",
    "LinkRole",
    "MemoryBasis",
    "Node",
    "Price",
    "Provenance",
    "build_cluster",
    "override_device",
    "software_device",
]

MemoryBasis = Literal["torch", "driver", "nameplate"]
LinkRole = Literal["peer", "host", "network"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where one value of a profile comes from; `key` is its path, such as `dense_flops_per_second.bf16`."""

    key: str
    sources: tuple[Source, ...]
    note: str = ""

    @property
    def assumed(self) -> bool:
        """True when no first-hand source states the value, or when the sources contradict each other."""
        return any(source.kind == "assumed" for source in self.sources)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One kind of connection of one device.

    role: `peer` joins devices of one node or rack, `host` joins a device to its CPU, `network` leaves the node.
    bytes_per_second_per_direction: one way, all lanes of one device together; `None` when no source states it.
    bytes_per_second_per_peer_per_direction: the share towards one neighbour, where a mesh is wired point to point.
    reach_devices: how many devices it can join (a bridge: 2; a rack: 72); `None` when the node decides.
    spans_nodes: the fabric joins devices of several machines (a 72-GPU rack, a TPU pod).
    optional: a bridge that is bought separately; a plan must ask for it.
    """

    name: str
    role: LinkRole
    bytes_per_second_per_direction: int | None = None
    bytes_per_second_per_peer_per_direction: int | None = None
    reach_devices: int | None = None
    spans_nodes: bool = False
    optional: bool = False
    topology: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator as it is sold.

    nameplate_memory_bytes: the printed size, GB read as 10^9 and GiB as 2^30 (vendors mix the two).
    visible_memory_bytes: the total that the driver reports (nvidia-smi, rocm-smi).
    torch_total_memory_bytes: `torch.cuda.get_device_properties().total_memory`; smaller again, and what an allocator gets.
    software_devices: how many devices the runtime shows for one package (an MI250X is two).
    """

    name: str
    title: str
    vendor: str
    form_factor: str
    architecture: str
    memory_type: str
    nameplate_memory_bytes: int | None = None
    visible_memory_bytes: int | None = None
    torch_total_memory_bytes: int | None = None
    memory_bandwidth_bytes_per_second: int | None = None
    dense_rates: tuple[tuple[str, int], ...] = ()
    tdp_watts: int | None = None
    multiprocessors: int | None = None
    compute_capability: tuple[int, int] | None = None
    l2_cache_bytes: int | None = None
    links: tuple[Link, ...] = ()
    software_devices: int = 1
    released: str = ""
    announced_only: bool = False
    reference_node: str | None = None
    aliases: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    provenance: tuple[Provenance, ...] = ()

    @property
    def memory_capacity_bytes(self) -> int:
        """The bytes a plan may count on: torch's own total if known, else the driver's, else the nameplate.

        The order goes from what an allocator is given to what is printed on the box; `memory_capacity_basis` names the
        one that was used. Raises NotCovered when a profile states none of the three.
        """
        for known in (self.torch_total_memory_bytes, self.visible_memory_bytes, self.nameplate_memory_bytes):
            if known is not None:
                return known
        raise NotCovered(
            f'no source states the memory of "{self.name}"; give its size in bytes in a profile of your own.'
        )

    @property
    def memory_capacity_basis(self) -> MemoryBasis:
        """Which of the three sizes `memory_capacity_bytes` is."""
        if self.torch_total_memory_bytes is not None:
            return "torch"
        return "driver" if self.visible_memory_bytes is not None else "nameplate"

    @property
    def memory_capacity_assumption(self) -> str:
        """One sentence to state beside a verdict; empty when the capacity is torch's own figure.

        Measured pairs: torch sees 0.3 to 0.9 GiB less than nvidia-smi's total on the NVIDIA profiles that state both.
        """
        match self.memory_capacity_basis:
            case "torch":
                return ""
            case "driver":
                return f"capacity of {self.name} is the driver's total; torch usually sees up to 1 GiB less."
            case _:
                return (
                    f"capacity of {self.name} is the printed size, GB read as 10^9 bytes; no reported total is known."
                )

    @property
    def dense_flops_per_second(self) -> dict[str, int]:
        """Dense peak rate by number format, in operations per second."""
        return dict(self.dense_rates)

    def dense_rate(self, number_format: str) -> int:
        """The dense peak of one format, in operations per second; NotCovered if no source states it for this device."""
        for name, rate in self.dense_rates:
            if name == number_format:
                return rate
        known = ", ".join(name for name, _ in self.dense_rates) or "none"
        raise NotCovered(f'no dense {number_format} rate is known for "{self.name}"; known: {known}.')

    @property
    def host_link(self) -> Link | None:
        """The link to the CPU's memory, used by offloading."""
        return next((link for link in self.links if link.role == "host"), None)

    def peer_link(self, devices: int = 2, *, bridged: bool = False) -> Link | None:
        """The link that joins `devices` devices of one node; the host link where there is no peer link that reaches.

        Bridges sold separately count only with `bridged=True`, and only for as many devices as one bridge joins.
        """
        for link in self.links:
            reaches = link.reach_devices is None or devices <= link.reach_devices
            if link.role == "peer" and reaches and (bridged or not link.optional):
                return link
        return self.host_link

    def source_of(self, key: str) -> Provenance:
        """The origin of one value, by its path in the profile (`tdp_watts`, `dense_flops_per_second.bf16`, ...)."""
        for entry in self.provenance:
            if entry.key == key:
                return entry
        raise NotCovered(f'"{self.name}" states no {key}; {nearest(key, [entry.key for entry in self.provenance])}')

    @property
    def doubtful(self) -> tuple[Provenance, ...]:
        """The values that no first-hand source states, or that sources contradict."""
        return tuple(entry for entry in self.provenance if entry.assumed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One machine: how many devices it holds, how they are joined, and how it reaches the next one.

    network_bytes_per_second: all network cards of the node together, one direction.
    scale_up_domain_devices: devices behind one peer fabric; more than `gpus_per_node` when a rack shares it.
    """

    name: str
    provider: str
    instance: str
    device: str
    gpus_per_node: int
    scale_up_domain_devices: int
    peer_fabric: str
    peer_bytes_per_second_per_direction: int | None = None
    network: str = ""
    network_bytes_per_second: int | None = None
    host_memory_bytes: int | None = None
    vcpus: int | None = None
    local_storage_bytes: int | None = None
    aliases: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    provenance: tuple[Provenance, ...] = ()

    @property
    def network_bytes_per_second_per_gpu(self) -> int | None:
        """The node's network divided among its devices, one direction; `None` when the network is not known."""
        return None if self.network_bytes_per_second is None else self.network_bytes_per_second // self.gpus_per_node


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """`nodes` equal nodes of `gpus_per_node` devices. Rates are per device and direction; `None` is unknown."""

    device: Device
    gpus_per_node: int
    nodes: int
    scale_up_domain_devices: int
    peer_bytes_per_second_per_direction: int | None = None
    network_bytes_per_second_per_gpu: int | None = None
    node_name: str | None = None
    assumptions: tuple[str, ...] = ()

    @property
    def devices(self) -> int:
        """All devices of the cluster."""
        return self.gpus_per_node * self.nodes

    def group_bytes_per_second(self, size: int | NDArray[np.int64]) -> int | NDArray[np.int64]:
        """The slowest link inside a group of `size` neighbouring ranks, in bytes per second, device and direction.

        A group that fits the scale-up domain uses the peer fabric, a larger one is held back by the network. `size` may be
        an array. Ranks are taken as placed in order, so that a group of at most a domain does not straddle two.
        Raises NotCovered when the link that is needed has no known rate (groups of one need none and answer the peer rate).
        """
        sizes = np.asarray(size)
        within = sizes <= self.scale_up_domain_devices
        if self.peer_bytes_per_second_per_direction is None and bool(np.any(within & (sizes > 1))):
            raise NotCovered(
                f'the rate between the devices of a "{self._label}" node is not known; give it in the plan.'
            )
        if self.network_bytes_per_second_per_gpu is None and not bool(np.all(within)):
            raise NotCovered(
                f'the network between "{self._label}" nodes is not known; give it in the plan or name a node.'
            )
        rates = np.where(
            within, self.peer_bytes_per_second_per_direction or 0, self.network_bytes_per_second_per_gpu or 0
        ).astype(np.int64)
        return int(rates) if np.ndim(size) == 0 else rates

    @property
    def _label(self) -> str:
        return self.node_name or self.device.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """One line of a price list: a whole instance, USD per hour, at one date.

    gpu: the profile's name, `None` when no profile describes the accelerator; `gpu_as_listed` keeps the seller's word.
    gpu_basis: `named` (the listing says so), `instance` (read off the instance), `assumed` (variant not stated) or `unprofiled`.
    gpu_count: devices of the instance; below 1 for a slice of one; `None` if not stated.
    region_scope: `exact` one region, `min` cheapest on-demand region, `median` over `regions_counted` regions, `min_spot`.
    host_included: False when the listing is the accelerator alone and the machine around it costs extra.
    date: ISO date of the snapshot, or `unknown`.
    """

    provider: str
    instance: str
    region: str
    region_scope: str
    regions_counted: int
    gpu: str | None
    gpu_as_listed: str
    gpu_basis: Literal["named", "instance", "assumed", "unprofiled"]
    gpu_count: float | None
    on_demand_usd_per_hour: float
    spot_usd_per_hour: float | None
    vcpus: float | None
    host_memory_bytes: int | None
    host_included: bool
    date: str
    source: Source
    note: str = ""

    @property
    def on_demand_usd_per_gpu_hour(self) -> float | None:
        """On-demand price divided by the devices; `None` when their number is not stated."""
        return None if self.gpu_count is None else self.on_demand_usd_per_hour / self.gpu_count

    @property
    def spot_usd_per_gpu_hour(self) -> float | None:
        """Spot price divided by the devices; `None` without a spot price or a number of devices."""
        if self.gpu_count is None or self.spot_usd_per_hour is None:
            return None
        return self.spot_usd_per_hour / self.gpu_count


def software_device(device: Device) -> Device:
    """One device as the runtime shows it: sizes, rates and power of the package divided by `software_devices`.

    An MI250X package of 128 GB is two devices of 64 GB. Peer links are left whole: no source splits them.
    """
    parts = device.software_devices
    if parts == 1:
        return device

    def share(value: int | None) -> int | None:
        return None if value is None else value // parts

    return replace(
        device,
        software_devices=1,
        nameplate_memory_bytes=share(device.nameplate_memory_bytes),
        visible_memory_bytes=share(device.visible_memory_bytes),
        torch_total_memory_bytes=share(device.torch_total_memory_bytes),
        memory_bandwidth_bytes_per_second=share(device.memory_bandwidth_bytes_per_second),
        dense_rates=tuple((name, rate // parts) for name, rate in device.dense_rates),
        tdp_watts=share(device.tdp_watts),
        multiprocessors=share(device.multiprocessors),
        l2_cache_bytes=share(device.l2_cache_bytes),
    )


_OVERRIDABLE = (
    "nameplate_memory_bytes",
    "visible_memory_bytes",
    "torch_total_memory_bytes",
    "memory_bandwidth_bytes_per_second",
    "tdp_watts",
    "multiprocessors",
    "l2_cache_bytes",
)


def override_device(
    device: Device, *, dense_flops_per_second: Mapping[str, int] | None = None, **values: int
) -> Device:
    """The device with some of its numbers replaced by the user's, each marked so in `provenance`.

    `dense_flops_per_second` replaces or adds single formats. Values must be positive whole numbers; UnknownField names the
    nearest field for any other key.
    """
    given = Source(title="given by the user", kind="assumed")
    changed: dict[str, Any] = {}
    for key, value in values.items():
        if key not in _OVERRIDABLE:
            raise UnknownField(f'a device has no number "{key}" to override; {nearest(key, _OVERRIDABLE)}')
        changed[key] = _positive(key, value)
    keys = list(changed)
    if dense_flops_per_second:
        rates = dict(device.dense_rates)
        for name, rate in dense_flops_per_second.items():
            rates[name] = _positive(f"dense_flops_per_second.{name}", rate)
            keys.append(f"dense_flops_per_second.{name}")
        changed["dense_rates"] = tuple(rates.items())
    kept = tuple(entry for entry in device.provenance if entry.key not in keys)
    return replace(device, **changed, provenance=(*kept, *(Provenance(key=key, sources=(given,)) for key in keys)))


def build_cluster(
    device: Device, *, gpus_per_node: int | None = None, nodes: int = 1, node: Node | None = None, bridged: bool = False
) -> Cluster:
    """A cluster of `nodes` machines, from a known `node` type or from a device and a count (one, if not given).

    A node that holds a different device is refused. Fewer devices than the node holds keep its fabric and divide its network
    as the full node does. Without a node, the peer fabric is taken from the device, its domain is the node (or the
    link's own reach, as in a rack), and the network is unknown.
    """
    count = gpus_per_node if gpus_per_node is not None else (node.gpus_per_node if node else 1)
    for key, value in (("gpus_per_node", count), ("nodes", nodes)):
        _positive(key, value)
    if node is None:
        link = device.peer_link(count, bridged=bridged)
        domain = max(count, link.reach_devices or count) if link and link.spans_nodes else count
        return Cluster(
            device=device,
            gpus_per_node=count,
            nodes=nodes,
            scale_up_domain_devices=domain,
            peer_bytes_per_second_per_direction=link.bytes_per_second_per_direction if link else None,
            assumptions=(f"{count} x {device.name} joined by {link.name}.",) if link and count > 1 else (),
        )
    if node.device != device.name:
        raise PlanError(
            f'node "{node.name}" holds {node.device}, not {device.name}; name another node or leave it out.'
        )
    if count > node.gpus_per_node:
        raise PlanError(f'node "{node.name}" holds {node.gpus_per_node} devices, fewer than the {count} asked for.')
    shares_rack = node.scale_up_domain_devices > node.gpus_per_node
    # A rack-wide fabric joins whole trays, so only trays filled as built keep the rack's domain.
    domain = node.scale_up_domain_devices if shares_rack and count == node.gpus_per_node else count
    return Cluster(
        device=device,
        gpus_per_node=count,
        nodes=nodes,
        scale_up_domain_devices=domain,
        peer_bytes_per_second_per_direction=node.peer_bytes_per_second_per_direction,
        network_bytes_per_second_per_gpu=node.network_bytes_per_second_per_gpu,
        node_name=node.name,
    )


def _positive(key: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise PlanError(f"{key} must be a positive whole number, not {value!r}.")
    return value


# Every overridable name is a field; a renamed field must not silently stop being overridable.
assert set(_OVERRIDABLE) <= {field.name for field in fields(Device)}

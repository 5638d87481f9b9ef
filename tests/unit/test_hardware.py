"""Values of `planner.hardware`: capacities, links, clusters and overrides. Figures are the test's own, not a profile's."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest

from planner.errors import NotCovered, PlanError, UnknownField
from planner.hardware import Device, Link, Node, Price, build_cluster, override_device, software_device
from planner.sources import Source

GIB = 2**30


def device(**changes: Any) -> Device:
    values: dict[str, Any] = {
        "name": "card",
        "title": "Card",
        "vendor": "Maker",
        "form_factor": "PCIe",
        "architecture": "One",
        "memory_type": "HBM",
        "nameplate_memory_bytes": 24 * 10**9,
        "dense_rates": (("fp32", 10**12), ("bf16", 10**14)),
        "links": (
            Link(name="bridge", role="peer", bytes_per_second_per_direction=50 * 10**9, reach_devices=2, optional=True),
            Link(name="PCIe 4 x16", role="host", bytes_per_second_per_direction=31 * 10**9),
        ),
    }
    return Device(**{**values, **changes})


def rack_device() -> Device:
    fabric = Link(
        name="fabric", role="peer", bytes_per_second_per_direction=900 * 10**9, reach_devices=72, spans_nodes=True
    )
    return device(links=(fabric,))


def node(**changes: Any) -> Node:
    values: dict[str, Any] = {
        "name": "box",
        "provider": "maker",
        "instance": "Box",
        "device": "card",
        "gpus_per_node": 8,
        "scale_up_domain_devices": 8,
        "peer_fabric": "fabric",
        "peer_bytes_per_second_per_direction": 450 * 10**9,
        "network_bytes_per_second": 400 * 10**9,
    }
    return Node(**{**values, **changes})


def test_capacity_prefers_torch_then_driver_then_nameplate() -> None:
    printed = device()
    assert (printed.memory_capacity_bytes, printed.memory_capacity_basis) == (24 * 10**9, "nameplate")
    driver = device(visible_memory_bytes=24 * GIB)
    assert (driver.memory_capacity_bytes, driver.memory_capacity_basis) == (24 * GIB, "driver")
    torch = device(visible_memory_bytes=24 * GIB, torch_total_memory_bytes=23 * GIB)
    assert (torch.memory_capacity_bytes, torch.memory_capacity_basis) == (23 * GIB, "torch")
    assert torch.memory_capacity_assumption == ""
    assert "driver" in driver.memory_capacity_assumption
    assert "printed" in printed.memory_capacity_assumption


def test_capacity_without_any_size_is_refused() -> None:
    with pytest.raises(NotCovered, match="memory"):
        _ = device(nameplate_memory_bytes=None).memory_capacity_bytes


def test_unknown_rate_names_the_known_ones() -> None:
    assert device().dense_rate("bf16") == 10**14
    with pytest.raises(NotCovered, match="fp32, bf16"):
        device().dense_rate("fp8")


def test_a_bridge_counts_only_when_asked_for_and_within_its_reach() -> None:
    names = [
        link.name if (link := device().peer_link(count, bridged=bridged)) else None
        for count, bridged in ((2, False), (2, True), (4, True))
    ]
    assert names == ["PCIe 4 x16", "bridge", "PCIe 4 x16"]


def test_group_rate_falls_to_the_network_beyond_the_domain() -> None:
    cluster = build_cluster(device(), nodes=4, node=node())
    assert cluster.devices == 32
    assert cluster.group_bytes_per_second(8) == 450 * 10**9
    assert cluster.group_bytes_per_second(16) == 50 * 10**9
    grid = cluster.group_bytes_per_second(np.array([1, 8, 9, 32]))
    assert np.array_equal(grid, np.array([450, 450, 50, 50]) * 10**9)


def test_unknown_links_are_refused_only_when_needed() -> None:
    alone = build_cluster(device(links=()), gpus_per_node=2, nodes=2)
    assert alone.group_bytes_per_second(1) == 0
    with pytest.raises(NotCovered, match="between the devices"):
        alone.group_bytes_per_second(2)
    with pytest.raises(NotCovered, match="network"):
        build_cluster(device(), gpus_per_node=2, nodes=2).group_bytes_per_second(4)


def test_a_rack_fabric_spans_nodes_but_a_partly_used_tray_does_not() -> None:
    assert build_cluster(rack_device(), gpus_per_node=4, nodes=18).scale_up_domain_devices == 72
    tray = node(gpus_per_node=4, scale_up_domain_devices=72)
    assert build_cluster(rack_device(), nodes=18, node=tray).scale_up_domain_devices == 72
    assert build_cluster(rack_device(), gpus_per_node=2, nodes=18, node=tray).scale_up_domain_devices == 2
    assert build_cluster(device(), gpus_per_node=1, nodes=2, bridged=True).scale_up_domain_devices == 1


def test_a_node_refuses_foreign_devices_and_too_many() -> None:
    with pytest.raises(PlanError, match="holds other"):
        build_cluster(device(), node=node(device="other"))
    with pytest.raises(PlanError, match="fewer than the 16"):
        build_cluster(device(), gpus_per_node=16, node=node())
    with pytest.raises(PlanError, match="gpus_per_node"):
        build_cluster(device(), gpus_per_node=0)


def test_override_replaces_numbers_and_says_so() -> None:
    changed = override_device(device(), torch_total_memory_bytes=20 * GIB, dense_flops_per_second={"fp8": 3 * 10**14})
    assert changed.memory_capacity_bytes == 20 * GIB
    assert changed.dense_flops_per_second == {"fp32": 10**12, "bf16": 10**14, "fp8": 3 * 10**14}
    assert changed.source_of("torch_total_memory_bytes").assumed
    assert {entry.key for entry in changed.doubtful} == {"torch_total_memory_bytes", "dense_flops_per_second.fp8"}
    with pytest.raises(UnknownField, match="tdp_watts"):
        override_device(device(), tdp_wats=3)
    with pytest.raises(PlanError, match="positive"):
        override_device(device(), tdp_watts=0)


def test_a_package_of_two_dies_splits_into_software_devices() -> None:
    half = software_device(device(software_devices=2, memory_bandwidth_bytes_per_second=3 * 10**12, tdp_watts=560))
    assert half.nameplate_memory_bytes == 12 * 10**9
    assert half.dense_rate("bf16") == 5 * 10**13
    assert (half.memory_bandwidth_bytes_per_second, half.tdp_watts) == (15 * 10**11, 280)
    assert software_device(half) is half


def test_price_per_gpu_divides_and_stays_unknown_without_a_count() -> None:
    line = Price(
        provider="maker",
        instance="Box",
        region="here",
        region_scope="exact",
        regions_counted=1,
        gpu="card",
        gpu_as_listed="Card",
        gpu_basis="named",
        gpu_count=8,
        on_demand_usd_per_hour=16.0,
        spot_usd_per_hour=None,
        vcpus=None,
        host_memory_bytes=None,
        host_included=True,
        date="2026-01-01",
        source=Source(title="a list", kind="published"),
    )
    assert line.on_demand_usd_per_gpu_hour == 2.0
    assert line.spot_usd_per_gpu_hour is None


def test_values_are_hashable_and_can_cross_to_a_worker() -> None:
    cluster = build_cluster(device(), nodes=2, node=node())
    assert hash(cluster) == hash(pickle.loads(pickle.dumps(cluster)))

"""The shipped profiles and price lists, their names, and what the reader says of broken ones."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from planner.errors import ProfileError, UnknownName
from planner.readers import hardware_profiles as profiles
from planner.readers.price_list_format import parse_prices

DEVICES = profiles.device_names()
NODES = profiles.node_names()
FACTS = Path(__file__).parents[2].parent / "shared" / "facts"


@pytest.fixture(autouse=True)
def only_shipped_profiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test reads the profiles of the person who runs it."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PLANNER_PROFILES", raising=False)


def numbers(table: object, path: str = "") -> list[tuple[str, int | float]]:
    """Every number of a parsed document with its path."""
    if isinstance(table, bool):
        return []
    if isinstance(table, int | float):
        return [(path, table)]
    if isinstance(table, dict):
        return [found for key, value in table.items() for found in numbers(value, f"{path}.{key}")]
    if isinstance(table, list):
        return [found for at, value in enumerate(table) for found in numbers(value, f"{path}[{at}]")]
    return []


def test_the_catalogue_is_there() -> None:
    assert len(DEVICES) >= 60
    assert len(NODES) >= 50
    assert {"h100-sxm", "h200-sxm", "a100-sxm-80gb", "a100-sxm-40gb", "rtx-4090", "v100-sxm2-32gb", "mi300x"} <= set(
        DEVICES
    )


@pytest.mark.parametrize("name", DEVICES)
def test_every_device_loads_with_a_source_for_every_number(name: str) -> None:
    device = profiles.load_hardware(name)
    assert device.name == name
    document = tomllib.loads((profiles.profile_root() / "gpus" / f"{name}.toml").read_text("utf-8"))
    sourced = {entry.key for entry in device.provenance}
    for path, value in numbers(document):
        assert value > 0, path
        if not path.endswith("reach_devices"):
            assert path.removesuffix(".value").lstrip(".") in sourced
    for entry in device.provenance:
        assert entry.sources and all(source.title and source.kind for source in entry.sources), entry.key
    for entry in device.doubtful:
        assert any("first-hand" in source.title for source in entry.sources), entry.key


@pytest.mark.parametrize("name", DEVICES)
def test_every_named_source_is_used(name: str) -> None:
    document = tomllib.loads((profiles.profile_root() / "gpus" / f"{name}.toml").read_text("utf-8"))
    used = {source.title for entry in profiles.load_hardware(name).provenance for source in entry.sources}
    assert {source["title"] for source in document["sources"].values()} == used


@pytest.mark.parametrize("name", NODES)
def test_every_node_loads_and_holds_a_known_device(name: str) -> None:
    node = profiles.load_node(name)
    assert node.name == name
    assert node.device in DEVICES
    document = tomllib.loads((profiles.profile_root() / "nodes" / f"{name}.toml").read_text("utf-8"))
    sourced = {entry.key for entry in node.provenance}
    for path, value in numbers(document):
        assert value > 0, path
        assert path.removesuffix(".value").lstrip(".") in sourced


def test_reference_nodes_exist_and_hold_the_device() -> None:
    for device in profiles.devices():
        if device.reference_node is not None:
            assert profiles.load_node(device.reference_node).device == device.name


def test_prices_are_positive_dated_and_of_known_devices() -> None:
    lines = profiles.prices()
    assert len(lines) >= 1069
    for line in lines:
        assert line.gpu is None or line.gpu in DEVICES, line.gpu
        assert line.source.title and line.date, line
        assert line.gpu_count is not None and line.gpu_count > 0, line
    assert {line.provider for line in lines} == set(profiles.price_providers())


def test_prices_of_one_device_and_of_one_provider() -> None:
    chosen = profiles.prices("H100", "aws")
    assert chosen and all((line.gpu, line.provider) == ("h100-sxm", "aws") for line in chosen)
    newest = [line for line in chosen if line.date == "2026-07-20" and line.instance == "p5.48xlarge"]
    assert [line.on_demand_usd_per_gpu_hour for line in newest] == [55.04 / 8]
    with pytest.raises(UnknownName, match="lambda"):
        profiles.prices(provider="lamda")


def test_a_tpu_slice_is_priced_by_its_chips() -> None:
    [line] = [line for line in profiles.prices("tpu-v4") if line.gpu_as_listed == "TPU v4-8"]
    assert line.gpu_count == 4


# --- names ---


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("h100", "h100-sxm"), ("H100", "h100-sxm"), ("h100-80gb", "h100-sxm"), ("h100-sxm5", "h100-sxm"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"), ("NVIDIA H100 PCIe", "h100-pcie"), ("NVIDIA H100 NVL", "h100-nvl"),
        ("A100-80GB", "a100-sxm-80gb"), ("a100", "a100-sxm-80gb"), ("NVIDIA A100-SXM4-40GB", "a100-sxm-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie-80gb"), ("a100_40gb", "a100-sxm-40gb"),
        ("4090", "rtx-4090"), ("rtx4090", "rtx-4090"), ("geforce rtx 4090", "rtx-4090"), ("GeForceRTX4090", "rtx-4090"),
        ("3090", "rtx-3090"), ("l40s", "l40s"), ("mi300x", "mi300x"), ("AMD Instinct MI300X", "mi300x"), ("h200", "h200-sxm"),
        ("b200", "b200-sxm"), ("T4", "t4"), ("nvidia-tesla-t4", "t4"), ("v100", "v100-sxm2-16gb"),
        ("Tesla V100-SXM2-32GB", "v100-sxm2-32gb"), ("Tesla V100-PCIE-16GB", "v100-pcie-16gb"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada"), ("NVIDIA RTX A6000", "rtx-a6000"), ("NVIDIA GB10", "dgx-spark"),
        ("NVIDIA GH200 480GB", "gh200-96gb"), ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtx-pro-6000-server"),
        ("trillium", "tpu-v6e"), ("Intel Gaudi 3", "gaudi3"),
    ],
)  # fmt: skip
def test_names_that_people_and_drivers_use(given: str, name: str) -> None:
    assert profiles.resolve_device(given).name == name


def test_an_ambiguous_name_states_its_choice_and_an_exact_one_does_not() -> None:
    assert "a100-pcie-80gb" in profiles.resolve_device("A100").choice
    assert "h100-pcie" in profiles.resolve_device("nvidia h100").choice
    assert profiles.resolve_device("a100-sxm-80gb").choice == ""
    assert profiles.resolve_device("NVIDIA H100 80GB HBM3").choice == ""


@pytest.mark.parametrize(("given", "near"), [("rtx-4080", "rtx-4090"), ("h1000", "h100"), ("mi300", "mi300x")])
def test_unknown_names_name_the_nearest(given: str, near: str) -> None:
    with pytest.raises(UnknownName, match=near):
        profiles.load_hardware(given)


@pytest.mark.parametrize("given", ["", " ", "../../etc/passwd", "nvidia"])
def test_names_that_mean_nothing_are_unknown(given: str) -> None:
    with pytest.raises(UnknownName):
        profiles.load_hardware(given)


def test_instance_types_name_nodes() -> None:
    assert profiles.load_node("p5.48xlarge").name == "aws-p5-48xlarge"
    assert profiles.load_node("Standard_ND96isr_H100_v5").device == "h100-sxm"
    with pytest.raises(UnknownName, match="dgx-h100"):
        profiles.load_node("dgx-h10")


def test_the_index_repeats_the_aliases_of_the_profiles() -> None:
    index = tomllib.loads((profiles.profile_root() / "aliases.toml").read_text("utf-8"))
    assert index["gpus"] == {device.name: list(device.aliases) for device in profiles.devices() if device.aliases}
    assert index["nodes"] == {node.name: list(node.aliases) for node in profiles.nodes() if node.aliases}


def test_no_name_means_two_profiles() -> None:
    for kind, names, load, fold in (
        ("gpus", DEVICES, profiles.load_hardware, profiles._fold),
        ("nodes", NODES, profiles.load_node, profiles._fold_instance),
    ):
        meaning: dict[str, str] = {}
        for name in names:
            for written in (name, *load(name).aliases):
                assert meaning.setdefault(fold(written), name) == name, (kind, written)


def test_titles_resolve_to_their_own_profile() -> None:
    for device in profiles.devices():
        assert profiles.resolve_device(device.title).name == device.name


def test_every_choice_is_an_alias_of_what_it_chooses() -> None:
    index = tomllib.loads((profiles.profile_root() / "aliases.toml").read_text("utf-8"))
    for short, choice in index["choices"].items():
        assert short.casefold() in [alias.casefold() for alias in index["gpus"][choice["gpu"]]]
        assert profiles.resolve_device(short).choice == choice["why"]


# --- one profile at a time, and the user's own ---


def test_one_name_opens_one_profile() -> None:
    code = (
        "import json, sys, tomllib\n"
        "opened = []\n"
        "load = tomllib.load\n"
        "tomllib.load = lambda file: (opened.append(file.name), load(file))[1]\n"
        "from planner.readers.hardware_profiles import load_hardware\n"
        "load_hardware('h100-sxm'); load_hardware('h100-sxm'); load_hardware('4090')\n"
        "print(json.dumps([name.replace('\\\\', '/').split('/')[-1] for name in opened]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert json.loads(done.stdout) == ["h100-sxm.toml", "aliases.toml", "rtx-4090.toml"]


MINE = """
name = "my-card"
title = "My Card"
aliases = ["mine"]
nameplate_memory_bytes = { value = 10_000_000_000, source = ["box"] }

[dense_flops_per_second]
bf16 = { value = 1_000_000_000_000, source = ["box"] }

[identity]
vendor = "Me"
form_factor = "PCIe"
architecture = "One"
memory_type = "HBM"
source = ["box"]

[[links]]
role = "host"
name = "PCIe 4 x16"
bytes_per_second_per_direction = { value = 31_000_000_000, source = ["box"] }

[sources]
box = { title = "printed on the box", kind = "datasheet" }
"""


@pytest.mark.parametrize("by_environment", [True, False])
def test_a_users_folder_adds_and_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, by_environment: bool) -> None:
    folder = tmp_path / "own" if by_environment else tmp_path / "home/.config/planner/hardware_profiles"
    (folder / "gpus").mkdir(parents=True)
    (folder / "gpus" / "my-card.toml").write_text(MINE, "utf-8")
    (folder / "gpus" / "t4.toml").write_text(MINE.replace('"my-card"', '"t4"').replace('"mine"', '"other"'), "utf-8")
    if by_environment:
        monkeypatch.setenv("PLANNER_PROFILES", str(folder))
    assert profiles.load_hardware("Mine").title == "My Card"
    assert "my-card" in profiles.device_names()
    assert profiles.load_hardware("t4").nameplate_memory_bytes == 10**10
    assert profiles.load_hardware("h100").name == "h100-sxm"


def test_without_a_users_folder_only_the_shipped_profiles_are_seen() -> None:
    assert profiles.profile_roots() == (profiles.profile_root(),)
    assert "my-card" not in profiles.device_names()


def test_a_folder_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PLANNER_PROFILES", str(tmp_path / "nowhere"))
    with pytest.raises(ProfileError, match="PLANNER_PROFILES names .*nowhere"):
        profiles.load_hardware("h100")


def test_an_installed_package_reads_the_profiles_inside_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    inside = tmp_path / "_data" / "hardware_profiles"
    inside.mkdir(parents=True)
    monkeypatch.setattr(profiles.resources, "files", lambda package: tmp_path)
    profiles.profile_root.cache_clear()
    try:
        assert profiles.profile_root() == inside
    finally:
        profiles.profile_root.cache_clear()


# --- broken profiles ---


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("nameplate_memory_bytes", "nameplate_memory_gb", r"nameplate_memory_gb is not a key.*nameplate_memory_bytes"),
        ("value = 10_000_000_000", "value = 0", "nameplate_memory_bytes is 0; it must be positive"),
        ("value = 10_000_000_000", "value = -1", "nameplate_memory_bytes is -1; it must be positive"),
        ("value = 10_000_000_000", 'value = "10"', "nameplate_memory_bytes must be a whole number"),
        ("value = 10_000_000_000", "value = true", "nameplate_memory_bytes must be a whole number"),
        ("{ value = 10_000_000_000, source = ['box'] }".replace("'", '"'), "10_000_000_000", "every value names its source"),
        ('10_000_000_000, source = ["box"]', "10_000_000_000, source = []", "nameplate_memory_bytes has no source"),
        ('10_000_000_000, source = ["box"]', '10_000_000_000, source = ["bax"]', 'names a source "bax".*did you mean "box"'),
        ("bf16 =", "bf17 =", r"dense_flops_per_second\.bf17 is not a key.*bf16"),
        ('kind = "datasheet"', 'kind = "rumour"', r"sources\.box\.kind is \"rumour\""),
        ('vendor = "Me"', "", r"identity\.vendor is missing"),
        ('role = "host"', 'role = "guest"', r"links\[0\]\.role must be"),
        ('name = "my-card"', 'name = "your-card"', "must equal the file's name"),
        ('title = "My Card"', "title = ", "not a readable TOML file"),
        ("[dense", "visible_memory_bytes = { value = 12_000_000_000, source = ['box'] }\n[dense", "visible_memory_bytes is 120"),
    ],
)  # fmt: skip
def test_a_broken_profile_is_one_sentence_with_file_and_key(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, old: str, new: str, said: str
) -> None:
    assert old in MINE
    (tmp_path / "gpus").mkdir()
    path = tmp_path / "gpus" / "my-card.toml"
    path.write_text(MINE.replace(old, new, 1), "utf-8")
    monkeypatch.setenv("PLANNER_PROFILES", str(tmp_path))
    with pytest.raises(ProfileError, match=said) as raised:
        profiles.load_hardware("my-card")
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("column", "cell", "said"),
    [("on_demand", "0", "must be positive"), ("on_demand", "x", "not a number"), ("gpu", "", "unprofiled"), ("scope", "all", "scope")],
)  # fmt: skip
def test_a_broken_price_line_is_named(column: str, cell: str, said: str) -> None:
    header = "instance,region,scope,regions,listed_as,gpu,basis,count,vcpus,host_gib,on_demand,spot,host,note"
    line = "i,r,exact,1,T4,t4,named,1,4,16,0.5,,,"
    cells: dict[str, str] = dict(zip(header.split(","), line.split(","), strict=True))
    document: dict[str, Any] = {
        "provider": "me",
        "currency": "USD",
        "sources": {"s": {"title": "a list", "kind": "published"}},
        "snapshots": [{"date": "2026-01-01", "source": "s", "rows": f"{header}\n{','.join(cells.values())}\n"}],
    }
    assert len(parse_prices(document)) == 1
    cells[column] = cell
    document["snapshots"][0]["rows"] = f"{header}\n{','.join(cells.values())}\n"
    with pytest.raises(ProfileError, match=f"line 2.*{said}"):
        parse_prices(document)


# --- the collection that the profiles were made from, where it is at hand ---


def table(name: str) -> list[dict[str, str]]:
    path = FACTS / name
    if not path.is_file():
        pytest.skip("the collection of facts is not part of the project")
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_collected_accelerator_is_carried_over() -> None:
    by_title = {device.title: device for device in profiles.devices()}
    for row in table("accelerators.csv"):
        device = by_title[row["name"]]
        rates = device.dense_flops_per_second
        for column, name in [
            (f"{name}_TFLOPS", name) for name in ("fp64", "fp32", "tf32", "fp16", "bf16", "fp8", "fp4")
        ] + [("int8_TOPS", "int8")]:
            assert rates.get(name) == (round(float(row[column]) * 1e12) if row[column] else None), (row["name"], column)
        for column, value, scale in (
            ("memory_bytes_marketed", device.nameplate_memory_bytes, 1),
            ("usable_memory_mib_driver", device.visible_memory_bytes, 2**20),
            ("cuda_total_memory_gib", device.torch_total_memory_bytes, 2**30),
            ("mem_bandwidth_GBps", device.memory_bandwidth_bytes_per_second, 10**9),
            ("TDP_W", device.tdp_watts, 1),
            ("sms", device.multiprocessors, 1),
            ("l2_MB", device.l2_cache_bytes, 2**20),
        ):
            assert (value or 0) == pytest.approx(float(row[column] or 0) * scale, abs=1), (row["name"], column)
        assert ".".join(map(str, device.compute_capability or ())) == row["compute_capability"]
        assert [device.vendor, device.form_factor, device.architecture, device.memory_type] == [
            row[column] for column in ("vendor", "form_factor", "architecture", "memory_type")
        ]
        assert device.released == row["release"].removeprefix("announced ")
        if row["link_GBps_per_direction"]:
            rate = round(float(row["link_GBps_per_direction"]) * 1e9)
            assert rate in {link.bytes_per_second_per_direction for link in device.links}, row["name"]


def test_every_collected_node_is_carried_over() -> None:
    by_instance = {(node.provider, node.instance): node for node in profiles.nodes()}
    rows = table("nodes.csv")
    assert len(rows) == len(by_instance)
    for row in rows:
        node = by_instance[row["provider"], row["name"]]
        assert profiles.load_hardware(node.device).title == row["accelerator"]
        assert node.gpus_per_node == int(row["gpus_per_node"])
        assert node.scale_up_domain_devices == int(row["scale_up_domain_gpus"])
        network = row["inter_node_Gbps_total"]
        assert node.network_bytes_per_second == (round(float(network) * 1e9 / 8) if network else None)
        assert node.vcpus == (int(row["vcpus"].split()[0]) if row["vcpus"] else None)
        memory = row["cpu_ram_GiB"].split()
        assert (node.host_memory_bytes or 0) == pytest.approx(float(memory[0]) * 2**30 if memory else 0, rel=1e-3)
        storage = row["local_nvme_GB"].split()
        scale = 2**30 if "GiB" in row["local_nvme_GB"] else 10**9
        assert (node.local_storage_bytes or 0) == (float(storage[0]) * scale if storage else 0)
        peer = row["intra_node_GBps_per_gpu_per_direction"]
        assert node.peer_bytes_per_second_per_direction == (round(float(peer) * 1e9) if peer else None)


def test_every_collected_price_is_carried_over() -> None:
    mine = sorted(
        (line.provider, line.instance, line.region, line.region_scope, line.gpu_as_listed, line.date)
        + (line.on_demand_usd_per_hour, line.spot_usd_per_hour or 0.0)
        for line in profiles.prices()
    )
    theirs = sorted(
        (
            row["provider"],
            row["instance_type"],
            row["region"],
            row["region_scope"],
            row["gpu"],
            row["snapshot_date"] or "unknown",
        )
        + (float(row["price_hour"]), float(row["spot_price_hour"] or 0))
        for row in table("cloud_prices.csv")
    )
    assert mine == theirs

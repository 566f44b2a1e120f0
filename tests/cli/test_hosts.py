"""`kvm2 hosts` and `kvm2 plan`: plain text for pipes, and JSON with a schema."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kvm2.cli import hosts, plan
from kvm2.errors import HostError, UsageError
from kvm2.softkvm import profile

RUNNER = CliRunner()


def run(command: object, *arguments: str) -> Result:
    result = RUNNER.invoke(command, arguments)  # type: ignore[arg-type]
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_the_list() -> None:
    lines = run(hosts.command).stdout.splitlines()
    assert lines[0].split()[:3] == ["host", "IPA", "page"]
    assert [line.split()[0] for line in lines[1:]] == profile.names()
    m1 = next(line for line in lines if line.startswith("apple-m1"))
    assert m1.split()[1:3] == ["36", "16K"]
    assert not any("\x1b" in line for line in lines)


def test_the_list_as_json() -> None:
    data = json.loads(run(hosts.command, "--json").output)
    assert data["schema"] == "kvm2.hosts/1"
    assert [host["name"] for host in data["hosts"]] == profile.names()
    a64fx = next(host for host in data["hosts"] if host["name"] == "a64fx")
    assert a64fx["sve_bits"] == [128, 256, 512] and a64fx["ipa_limit"] == 40 and a64fx["page_size"] == 4096


def test_one_host() -> None:
    text = run(hosts.command, "raspberry-pi-4").output
    assert "44 bits" in text and "kernel log: IPA Size Limit: 44 bits" in text
    assert "Assumed, with no source of their own:" in text and "PMU counting" in text
    assert "no-lpa2" in run(hosts.command, "max-4k-6.1").output
    assert "0x1d" in run(hosts.command, "x86-64-snp").output


@pytest.mark.parametrize("name", profile.names())
def test_every_host_can_be_shown(name: str) -> None:
    assert run(hosts.command, name).output.startswith(f"{name}: ")
    data = json.loads(run(hosts.command, name, "--json").output)
    assert data["schema"] == "kvm2.host/1" and data["name"] == name


def test_one_host_as_json() -> None:
    data = json.loads(run(hosts.command, "max-4k-6.12", "--json").output)
    assert data["caps"]["KVM_CAP_ARM_VM_IPA_SIZE"] == 52 and data["ipa_limits"] == {"12": 52, "14": 52, "16": 52}
    assert data["registers"]["ID_AA64MMFR0_EL1"] == "0x32310201126"
    assert data["features"] == [
        "POWER_OFF",
        "EL1_32BIT",
        "PSCI_0_2",
        "PMU_V3",
        "SVE",
        "PTRAUTH_ADDRESS",
        "PTRAUTH_GENERIC",
    ]
    assert data["assumed"] == [] and "FEAT_SVE2" in data["not_executed"]


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rack.toml"
    path.write_text('base = "graviton3"\npa_bits = 44')
    assert json.loads(run(hosts.command, str(path), "--json").output)["ipa_limit"] == 44
    path.write_text("pa_bits = 45")
    with pytest.raises(HostError, match="45 is not one of the choices"):
        run(hosts.command, str(path))


def test_unknown() -> None:
    with pytest.raises(HostError, match="no described host 'nope'"):
        run(hosts.command, "nope")


def test_plan() -> None:
    result = run(plan.command, "--memory", "512M@1G", "--memory", "64G@1T", "--hosts", "apple-m1, graviton3")
    assert result.exit_code == 1
    assert "needs an IPA size of 41 bits: its last byte is at 0x10fffffffff" in result.output
    assert "41 bits by KVM_CREATE_VM2" in result.output and "this host has 36" in result.output
    assert (
        run(plan.command, "--memory", "512M@1G", "--hosts", "mainline-6.12")
        .output.splitlines()[-1]
        .endswith("32 bits by KVM_CREATE_VM type 0x20; the default of 40 would do")
    )


def test_plan_asks_every_arm64_host() -> None:
    result = run(plan.command, "--memory", "64G@1T", "--json")
    data = json.loads(result.output)
    assert result.exit_code == 0 and data["schema"] == "kvm2.plan/1"
    names = [host["name"] for host in data["hosts"]]
    assert names == [name for name in profile.names() if profile.load(name).arch == "arm64"]
    assert "apple-m1" in data["refused"] and "graviton2" in data["fits"]
    assert run(plan.command, "--memory", "4097@0").exit_code == 1  # none can


def test_plan_granule() -> None:
    data = json.loads(
        run(plan.command, "--memory", "64K@0", "--granule", "64K", "--hosts", "graviton2", "--json").output
    )
    assert data["granule"] == 16 and data["hosts"][0]["tables"]["granule"] == 16


def test_plan_usage() -> None:
    assert run(plan.command).exit_code == 2
    for memory in (["1G"], ["1G@0", "1G@512M"]):
        with pytest.raises(UsageError):
            run(plan.command, *(part for text in memory for part in ("--memory", text)))
    with pytest.raises(HostError):
        run(plan.command, "--memory", "1G@0", "--hosts", "nope")

"""The recipes give the published files, to the last note; and scenarios for 64K pages that nobody published."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from kvm2.lab import bundled
from kvm2.lab.oplist import check
from kvm2.lab.recipes import build
from kvm2.lab.recipes.recipe import Recipe, word
from kvm2.lab.scenarios import load_scenarios

AS, OBJCOPY = "aarch64-linux-gnu-as", "aarch64-linux-gnu-objcopy"


@pytest.mark.parametrize("page", [4096, 16384])
def test_the_published_scenarios_come_out(page: int) -> None:
    file = bundled.scenario_file(page)
    assert file is not None
    published, made = load_scenarios(file), build(page)
    assert [scenario.name for scenario in made] == [scenario.name for scenario in published]
    for want, have in zip(published, made, strict=True):
        for index, (first, second) in enumerate(zip(want.steps, have.steps, strict=True)):
            assert dict(first) == dict(second), f"{want.name} step {index}"


def test_64k_pages() -> None:
    small, large = ({scenario.name: scenario for scenario in build(page)} for page in (4096, 65536))
    assert bundled.scenario_file(65536) is None
    assert bundled.scenarios(65536) == tuple(large.values())
    assert small.keys() == large.keys()
    other = {name for name in small if small[name].steps != large[name].steps}
    assert {name.split("/")[0] for name in other} == {"ipa", "slots", "vgic"}
    for scenario in large.values():
        check(scenario)
    first = next(step for step in large["ipa/48/slots"].steps if step["op"] == "memslot")
    assert (first["gpa"], first["size"]) == (0, 65536)
    rules = [step for step in large["slots/rules"].steps if step["op"] == "memslot"]
    good = [step for step in rules if step["note"] in ("create", "move", "adjacent above", "move+flags")]
    assert len(good) == 4 and all(step["gpa"] % 65536 == step["size"] % 65536 == 0 for step in good)
    assert [step["size"] for step in rules if step["note"] == "4096 bytes"] == [4096]


def test_a_host_with_64k_pages_plays_them() -> None:
    """What is refused with 64K pages and fine with 4K, and the other way round."""
    from kvm2.lab.conform import Conform, Wanted

    only = ("slots/rules", "ipa/48/slots", "vcpu/ids")
    prepared = Conform(Wanted("neoverse-n1-64k", "neoverse-n1-64k", only=only))
    done = prepared.run()
    assert done.report.ok and done.place.page_size == 65536
    notes = {
        step["note"]: outcome.played.answers[index]
        for outcome, scenario in zip(done.report.outcomes, prepared.scenarios, strict=True)
        if scenario.name == "slots/rules"
        for index, step in enumerate(scenario.steps)
        if step["op"] == "memslot"
    }
    assert notes["create"] == notes["move"] == notes["adjacent above"] == [0, 0]
    assert notes["4096 bytes"] == notes["gpa at 4096 multiple"] == [-1, "EINVAL"]


@pytest.mark.skipif(not shutil.which(AS) or not shutil.which(OBJCOPY), reason=f"needs {AS} and {OBJCOPY}")
@pytest.mark.parametrize("name", sorted(bundled.guests()))
def test_guest_programs_come_from_their_source(name: str, tmp_path: Path) -> None:
    source, made, image = bundled.DATA / "guests.s", tmp_path / "guest.o", tmp_path / "guest.bin"
    subprocess.run([AS, "--defsym", f"GUEST_{name}=1", "-o", made, source], check=True)
    subprocess.run([OBJCOPY, "-O", "binary", "-j", ".text", made, image], check=True)
    assert image.read_bytes() == bundled.guests()[name]
    assert name == "off" or f".ifdef GUEST_{name}" in source.read_text()


def test_recipes_collect_steps() -> None:
    recipe = Recipe("a").machine(("PSCI_0_2",), 36).set("pc", 0x1000, "there").run("go", 300)
    scenario = recipe.scenario()
    check(scenario)
    assert [step["op"] for step in scenario.steps] == [
        "create_vm", "mem", "memslot", "create_vcpu", "vcpu_init", "set_reg", "run",
    ]  # fmt: skip
    assert scenario.steps[4]["note"] == "PSCI_0_2" and scenario.steps[5]["data"] == "0010000000000000"
    assert word(("SVE", "POWER_OFF")) == 17

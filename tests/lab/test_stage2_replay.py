"""The stage-2 replay: equal to every recorded dump, and able to say where something is not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from kvm2.errors import UsageError
from kvm2.lab.stage2_replay import replay_stage2
from kvm2.softkvm import profile

DUMPS = Path(__file__).parent.parent / "data" / "stage2"
HOSTS = {
    "stage2-max-4k": ("max-4k-6.12", 22),
    "stage2-max-4k-nvhe": ("max-4k-nvhe", 5),
    "stage2-max-16k": ("max-16k-6.12", 22),
    "stage2-max-4k-6.1": ("max-4k-6.1", 4),
    "stage2-a57-4k": ("cortex-a57-4k", 14),
}


def test_every_dump_has_a_host():
    assert {path.stem for path in DUMPS.glob("*.json")} == set(HOSTS)


@pytest.mark.parametrize("name", HOSTS)
def test_equal(name):
    host, dumps = HOSTS[name]
    report = replay_stage2(DUMPS / f"{name}.json", profile.load(host))
    assert report.differences == ()
    assert (report.dumps, report.equal) == (dumps, True)
    assert report.compared > 40 * dumps
    # QEMU cannot complete a 16K walk from level 0: that guest touched nothing but its first instruction
    assert report.incomplete == ((52,) if "16k" in name else ())


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"fwb": False}, "attributes"),
        ({"cnp": False}, "VTTBR_EL2.CnP"),
        ({"parange": 5}, "VTCR_EL2.PS"),
        ({"vmid_bits": 8}, "VTCR_EL2.VS"),
        ({"lpa2": False}, "VTCR_EL2.DS"),
        ({"page_shift": 14}, "page"),
    ],
)
def test_a_wrong_host_differs(change, what):
    report = replay_stage2(DUMPS / "stage2-max-4k.json", replace(profile.load("max-4k-6.12"), **change))
    assert not report.equal
    assert any(difference.what.endswith(what) for difference in report.differences)


def edited(tmp_path, edit):
    dump = json.loads((DUMPS / "stage2-max-4k.json").read_text())
    edit(dump["dumps"][0])
    file = tmp_path / "edited.json"
    file.write_text(json.dumps(dump))
    return replay_stage2(file, profile.load("max-4k-6.12")).differences


def test_each_kind_of_difference_is_found(tmp_path):
    def page(dump):
        return next(d for d in dump["descs"] if d["kind"] == "page")

    def set_desc(bit):
        return lambda dump: page(dump).update(desc=hex(int(page(dump)["desc"], 16) ^ bit))

    assert [d.what for d in edited(tmp_path, lambda dump: dump.update(start=0))] == ["start"]
    assert "attributes" in edited(tmp_path, set_desc(1 << 54))[0].what
    assert "attributes" in edited(tmp_path, set_desc(1 << 7))[0].what
    assert edited(tmp_path, set_desc(1 << 20)) == ()  # the machine's own address
    assert "size" in edited(tmp_path, lambda dump: page(dump).update(size=1))[0].what
    assert edited(tmp_path, lambda dump: dump["descs"].pop())[0].what == "descriptors"
    (vmid,) = edited(tmp_path, lambda dump: dump.update(vttbr=hex(int(dump["vttbr"], 16) + (1 << 48))))
    assert (vmid.recorded, vmid.here, vmid.ipa_bits) == ("2", "1", 40)


def test_a_size_that_the_host_refuses(tmp_path):
    report = replay_stage2(DUMPS / "stage2-max-4k.json", profile.load("cortex-a57-4k"))
    refused = [d for d in report.differences if d.what == "created"]
    assert {d.ipa_bits for d in refused} == set(range(45, 53))


def test_the_report_is_json():
    report = replay_stage2(DUMPS / "stage2-a57-4k.json", profile.load("max-4k-6.12"))
    data = json.loads(json.dumps(report.as_json()))
    assert (data["schema"], data["kind"], data["equal"]) == ("kvm2.replay/1", "stage2", False)
    assert set(data["differences"][0]) == {"ipa_bits", "what", "recorded", "here"}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"dumps": [{}], "create": {}, "page": 4096}', "7"])
def test_a_file_that_is_no_dump(tmp_path, text):
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(UsageError, match=r"x\.json"):
        replay_stage2(file, profile.load("max-4k-6.12"))
    with pytest.raises(UsageError, match="cannot be read"):
        replay_stage2(tmp_path / "none.json", profile.load("max-4k-6.12"))

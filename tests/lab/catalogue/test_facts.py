"""The facts of hosts, against what their descriptions say."""

from __future__ import annotations

import pytest

from kvm2.lab.catalogue import facts
from kvm2.lab.catalogue.play import facts_of, player_of
from kvm2.lab.places import place_of
from kvm2.softkvm import profile


@pytest.mark.parametrize("name", profile.names())
def test_what_is_asked_is_what_is_described(name: str) -> None:
    place, host = place_of(name), profile.load(name)
    with player_of(place) as player:
        found = facts_of(place, player)
    assert set(found) == set(facts.MEANINGS)
    assert (found["arch"], found["page"], found["limit"]) == (host.arch, 1 << host.page_shift, host.ipa_limit)
    assert (found["max_vcpus"], found["memslots"]) == (host.max_vcpus, host.nr_memslots)
    if host.arch != "arm64":
        assert (found["log2"], found["mmfr0"], found["gic_v3"], found["default"]) == (0, 0, 0, 0)
        return
    assert found["protected"] == (host.mode == "protected")
    assert found["vls"] == sum(1 << vq - 1 for vq in host.sve_vqs) and found["sve"] == bool(host.sve_vqs)
    assert (found["gic_v2"], found["gic_v3"]) == ("v2" in host.gic, "v3" in host.gic)
    assert found["mmfr0"] & 15 == host.parange and found["mmfr0"] and found["midr"]
    assert found["granules"] >> host.page_shift & 1
    assert found["vm2"] == host.create_vm2
    if host.type_word == "log2":
        assert found["log2"] == 1


def test_answers_that_are_missing_are_zero() -> None:
    steps = facts.questions("arm64").steps
    found = facts.read((None,) * len(steps), "arm64", 4096)
    assert set(found) == set(facts.MEANINGS)
    assert {found[key] for key in ("limit", "vls", "mmfr0", "gic_v3", "log2", "protected", "vm2")} == {0}

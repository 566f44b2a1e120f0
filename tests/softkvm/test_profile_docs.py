"""docs/hosts.md: its example is a host, and its tables are the declarations."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvm2.abi import caps as cap
from kvm2.abi import sysregs
from kvm2.softkvm import profile
from kvm2.softkvm.profile_keys import quirk_reference, reference

PAGE = (Path(__file__).parent.parent.parent / "docs" / "hosts.md").read_text()


def test_the_example(tmp_path: Path) -> None:
    match = re.search(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    assert match
    (tmp_path / "rack.toml").write_text(match[1])
    host = profile.load(tmp_path / "rack.toml")
    assert (host.name, host.ipa_limit, host.page_shift, host.sve_vqs) == ("rack", 44, 16, (1, 2))
    assert host.registers[sysregs.MIDR_EL1] == 0x413FD0C1
    assert host.caps[cap.KVM_CAP_STEAL_TIME] == 0 and cap.KVM_CAP_CREATE_VM2 not in host.caps
    assert host.sources["pa_bits"].startswith("dmesg of rack 7")


@pytest.mark.parametrize(("mark", "text"), [("keys", reference()), ("quirks", quirk_reference())])
def test_the_tables_are_generated(mark: str, text: str) -> None:
    match = re.search(rf"<!-- {mark}: [^\n]*-->\n(.*?)<!-- end -->", PAGE, re.DOTALL)
    assert match and match[1] == text

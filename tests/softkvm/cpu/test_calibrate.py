"""The private facts of the emulator: found, and refused by name where they are not what they must be."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from kvm2.errors import EnvironmentFault
from kvm2.softkvm.cpu import calibrate, engine, instance, peek
from kvm2.softkvm.cpu import registers as reg

from .machine import Machine


def test_the_layout_is_found_twice_the_same() -> None:
    again = calibrate.layout.__wrapped__()
    assert again == calibrate.layout()
    assert again.p_in_env == again.z_in_env + 32 * 256


def test_the_flag_for_precise_stops_is_what_it_is_said_to_be() -> None:
    """With the byte cleared before translation a load's code is longer: it has the check that must not be there."""
    sizes = []
    for flag in (1, 0):
        machine = Machine()
        core = machine.core
        core.instance._no_exit_request.value = flag
        machine.run("ldr x1, [x2]; ldr x1, [x2]; ldr x1, [x2]; ldr x1, [x2]; hvc #1", x2=machine.arena.base)
        size = core.instance.engine.LIB.tcg_code_size_aarch64
        size.restype = ctypes.c_size_t
        context = ctypes.c_uint64.from_address(core.instance.base + tcg_context_offset(machine)).value
        sizes.append(size(ctypes.c_void_p(context)))
        machine.close()
    assert sizes[1] - sizes[0] >= 4 * 8


def tcg_context_offset(machine: Machine) -> int:
    """`tcg_ctx` follows `l1_map` and its sizes in the instance: the pointer whose target begins with a memory pool."""
    blob = peek.peek_prefix(machine.core.instance.base, 0x2000)
    words = [int.from_bytes(blob[at : at + 8], "little") for at in range(0, len(blob), 8)]
    for index in range(4, len(words)):
        levels, shift_and_size = words[index - 1] & 0xFFFFFFFF, words[index - 2]
        if levels in range(1, 6) and 0 < shift_and_size >> 32 < 64 and words[index] > 1 << 20:
            return index * 8
    raise AssertionError("tcg_ctx")


@pytest.mark.parametrize(
    ("name", "value", "fact"),
    [
        ("_EXCP_HVC", 12, "exception number 12"),
        ("_BAD_ADDRESS", 0x10000, "exception number 4"),
        ("_EXCLUSIVE_VALUE", 0, "exclusive monitor"),
        ("_ID_BLOCK", (reg.ID_AA64MMFR0_EL1,) * 7, "ID registers"),
    ],
)
def test_another_library_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: object, fact: str) -> None:
    """Each fact replaced by a wrong expectation, as another library would break it."""
    monkeypatch.setattr(calibrate, name, value)
    with pytest.raises(EnvironmentFault, match=f"{fact}.*2\\.1\\.4"):
        calibrate.layout.__wrapped__()


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "VERSION", (2, 2, 0))
    with pytest.raises(EnvironmentFault, match=r"checked with Unicorn 2\.2\.0, and .* is version 2\.1\.4"):
        engine.engine.__wrapped__()


def test_without_unicorn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match="pip install unicorn"):
        engine._library_path()


def test_a_library_without_the_internals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(engine._SIGNATURES, "no_such_function", ([], None))
    with pytest.raises(EnvironmentFault, match="no_such_function"):
        engine.Engine(engine._library_path())


def test_unknown_models_and_registers() -> None:
    with pytest.raises(EnvironmentFault, match="known: a72, max"):
        instance.Instance("m1")
    machine = Machine()
    with pytest.raises(EnvironmentFault, match="does not know system register"):
        machine.core.override(reg.ZCR_EL1, lambda: 0, None)
    assert not machine.core.knows(reg.ZCR_EL1)
    assert machine.core.knows(reg.SCTLR_EL1)
    machine.close()
    machine.close()  # twice is harmless


def test_importing_the_core_does_not_import_the_unicorn_package() -> None:
    code = "import sys; import kvm2.softkvm.cpu.core as c; c.Core('a72', bool).close(); print('unicorn' in sys.modules)"
    source = Path(calibrate.__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=source, check=True)
    assert done.stdout == "False\n"


def test_only_the_tlbs_of_guests_have_entries() -> None:
    machine = Machine()
    core = machine.core.instance
    sizes = [
        ctypes.c_uint64.from_address(core.cpu + core.layout.tlbs_in_cpu + 16 * number).value // 64 + 1
        for number in range(calibrate.TLBS)
    ]
    assert [number for number, size in enumerate(sizes) if size > 1] == [0, 2, 3]
    machine.run("str x1, [x2]; hvc #1", x1=7, x2=machine.arena.base + 0x20000)
    machine.core.flush_tlb()
    assert machine.arena.word(machine.arena.base + 0x20000) == 7
    machine.close()

"""The baselines on Unicorn itself, by its Python binding: the emulated core without a hypervisor around it."""

from __future__ import annotations

from collections.abc import Callable

from bench.a64 import HVC, LOAD_ADDRESS, branch, code

RAM_BYTES = 4 << 20
SCR_EL3, HCR_EL2 = (3, 6, 1, 1, 0), (3, 4, 1, 1, 0)  # op0, op1, CRn, CRm, op2: the binding's order


def machine(program: bytes):  # type: ignore[no-untyped-def]  # unicorn has no types
    """A core with 4 MiB of memory that may be read, written and executed (`mem_map` gives that), with a program."""
    from unicorn import Uc
    from unicorn.arm64_const import UC_CPU_ARM64_MAX
    from unicorn.unicorn_const import UC_ARCH_ARM64, UC_MODE_ARM

    core = Uc(UC_ARCH_ARM64, UC_MODE_ARM, UC_CPU_ARM64_MAX)
    # Without these two a new core is Secure at EL1, and takes EL1 for AArch32.
    core.cpr_write(*SCR_EL3, 0x531)
    core.cpr_write(*HCR_EL2, 1 << 31)
    core.mem_map(LOAD_ADDRESS, RAM_BYTES)
    core.mem_write(LOAD_ADDRESS, program)
    return core


def exits() -> Callable[[int], None]:
    """So many exits: `emu_start` up to an HVC, `emu_stop` in its hook, one `reg_read`."""
    from unicorn.arm64_const import UC_ARM64_REG_PC
    from unicorn.unicorn_const import UC_HOOK_INTR

    core = machine(code(HVC, branch(-1)))
    core.hook_add(UC_HOOK_INTR, lambda uc, number, data: uc.emu_stop())

    def run(count: int) -> None:
        pc = LOAD_ADDRESS
        for _ in range(count):
            core.emu_start(pc, 0)
            pc = core.reg_read(UC_ARM64_REG_PC)

    return run


def loop(program: bytes) -> Callable[[int], None]:
    """A program that counts X19 down to its end, so many times round."""
    from unicorn.arm64_const import UC_ARM64_REG_X19

    core = machine(program)

    def run(count: int) -> None:
        core.reg_write(UC_ARM64_REG_X19, count)
        core.emu_start(LOAD_ADDRESS, LOAD_ADDRESS + len(program))

    return run

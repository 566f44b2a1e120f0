/* Exceptions from EL1 and EL0: each is written down with its registers; the addresses go into the report. */
#include "rt.h"

extern u32 at_svc[], at_brk[], at_udf[], at_ldr[], at_str[], at_mrs[], at_exclusive[];
extern u32 el0_code[], el0_svc[], el0_brk[], el0_udf[], el0_msr[], el0_wfx[], el0_odd[];

asm(".globl el0_code, el0_svc, el0_brk, el0_udf, el0_msr, el0_odd\n"
    "el0_code: mrs x9, tpidrro_el0\n add x19, x0, #1\n"
    "el0_svc: svc #0x123\n"
    "el0_brk: brk #0x77\n"
    "el0_udf: udf #5\n"
    "el0_msr: msr vbar_el1, x0\n"
    "el0_odd: ldr x1, [x20]\n"
    "mov x0, x19\n svc #0x7f\n");

u64 main(u64 cpu, u64 x0) {
	/* 0: SVC, 1: BRK, 2: UDF, 3: a load and 4: a store beyond the IPA space */
	asm volatile(".globl at_svc\nat_svc: svc #0xabc");
	asm volatile(".globl at_brk\nat_brk: brk #0x1234");
	asm volatile(".globl at_udf\nat_udf: udf #0");
	asm volatile(".globl at_ldr\nat_ldr: ldr w3, [%0, #8]" ::"r"(1UL << BITS) : "x3");
	asm volatile(".globl at_str\nat_str: str x3, [%0]" ::"r"((1UL << BITS) + 0xff0) : "memory");
	/* 5: an exclusive load is never allowed at an odd address, 6: a fetch outside of the IPA space */
	asm volatile(".globl at_exclusive\nat_exclusive: ldaxr x3, [%0]" ::"r"(HEAP + 1) : "x3");
	asm volatile("adr x3, 1f\n str x3, [%0]\n br %1\n1:" ::"r"(&resume[0]), "r"(1UL << BITS) : "x3", "x4", "memory");
	/* 7: an EL2 register */
	asm volatile(".globl at_mrs\nat_mrs: mrs x3, vttbr_el2" ::: "x3");
	report((u64)at_svc), report((u64)at_brk), report((u64)at_udf), report((u64)at_ldr), report((u64)at_str);
	report((u64)at_exclusive), report((u64)at_mrs);
	report((u64)el0_svc), report((u64)el0_brk), report((u64)el0_udf), report((u64)el0_msr), report((u64)el0_odd);
	/* 8..12: from EL0 */
	asm volatile("mov x20, %0" ::"r"(1UL << BITS) : "x20");
	report(call_el0((u64)el0_code, 41, HEAP + 0x10000));
	return 0;
}

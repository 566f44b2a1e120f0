/* What the architecture makes of addresses that are not aligned: with SCTLR_EL1.A, and in the PC. */
#include "rt.h"

u64 main(u64 cpu, u64 x0) {
	if (PART == 0) {
		SYS_SET(sctlr_el1, SYS_GET(sctlr_el1) | 2);
		ISB();
		asm volatile("ldr w3, [%0]" ::"r"(HEAP + 2) : "x3");
	} else {
		asm volatile("adr x3, 1f\n str x3, [%0]\n adr x4, 2f + 2\n br x4\n2: nop\n nop\n1:" ::"r"(&resume[0]) : "x3", "x4", "memory");
	}
	return 0;
}

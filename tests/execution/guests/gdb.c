/* Something to debug: functions, a counter, a global that changes, its own BRK, a second CPU, page tables. */
#include "rt.h"

vu64 watched, other, rounds, second;

u64 __attribute__((noinline)) square(u64 n) {
	other = n;
	watched = n * n;
	return watched;
}

u64 __attribute__((noinline)) add_up(u64 count) {
	u64 sum = 0;
	for (u64 n = 1; n <= count; n++)
		sum += square(n);
	return sum;
}

void __attribute__((noinline)) spin(void) {
	for (;;)
		second++;
}

#ifdef HIGH
/* 4K pages: the image as it is, and again with the upper half's addresses. */
static u64 l1_low[512] __attribute__((aligned(4096)));

static void mmu_on(void) {
	l1_low[RAM >> 30] = RAM | 1 << 10 | 3 << 8 | 1;
	l1_low[0] = 1 << 10 | 1;
	SYS_SET(mair_el1, 0xff);
	SYS_SET(tcr_el1, 25UL | 25UL << 16 | 2UL << 30 | 1UL << 8 | 1UL << 10 | 3UL << 12 | 1UL << 24 | 1UL << 26 | 3UL << 28 | 2UL << 32);
	SYS_SET(ttbr0_el1, (u64)l1_low);
	SYS_SET(ttbr1_el1, (u64)l1_low);
	ISB();
	SYS_SET(sctlr_el1, SYS_GET(sctlr_el1) | 1);
	ISB();
}
#endif

static void forget(void *address) {
	asm volatile("tlbi vaae1is, %0\n dsb ish\n isb" ::"r"((u64)address >> 12) : "memory");
}

u64 main(u64 cpu, u64 x0) {
	if (cpu)
		spin();
#ifdef HIGH
	mmu_on();
#endif
	asm volatile("brk #0x800");		/* as Linux does for WARN: the guest's own business */
	forget(main);
	if (SECOND) {
		psci(0xc4000003, 1, (u64)_start, 0);
		while (!second)
			;
	}
	for (rounds = 0; rounds < ROUNDS; rounds++)
		report(add_up(4)), forget(add_up);
	return 0;
}

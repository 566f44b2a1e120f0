/* A GICv2 from the inside: SGIs with their senders, priorities, preemption, EOI modes, both groups, an SPI, the timer. */
#include "gic.h"

#define GICC 0x08010000UL
enum { CTLR = GICC, PMR = GICC + 4, BPR = GICC + 8, IAR = GICC + 12, EOIR = GICC + 16, RPR = GICC + 20,
       HPPIR = GICC + 24, ABPR = GICC + 28, DIR = GICC + 0x1000,
       SGIR = GICD + 0xf00 };

static volatile u64 journal[4][64], entries[4], taken[4][64], nested, pong;

static void note(u64 cpu, u64 what) { if (entries[cpu] < 64) journal[cpu][entries[cpu]++] = what; }

static void sgi(u64 intid, u64 targets) { DSB(); W32(SGIR, targets << 16 | intid); }

int fixup(struct frame *f) {
	u64 cpu = this_cpu(), iar, intid;
	if (f->vector != 5 && f->vector != 6)
		return 0;
	LOG(cpu)[0]--;
	iar = R32(IAR);
	note(cpu, iar + (f->vector == 6 ? 0x10000 : 0));
	intid = iar & 0x3ff;
	if (intid < 64)
		taken[cpu][intid]++;
	if (intid == 27)
		SYS_SET(cntv_ctl_el0, 0);
	if (intid == nested && nested) {
		u64 elr = SYS_GET(elr_el1), spsr = SYS_GET(spsr_el1);
		report(R32(RPR));
		nested = 0;
		sgi(2, 1 << cpu);
		sgi(3, 1 << cpu);
		UNMASK();
		for (int i = 0; i < 100; i++)
			ISB();
		MASK();
		SYS_SET(elr_el1, elr);
		SYS_SET(spsr_el1, spsr);
	}
	if (intid == 9 && pong)
		sgi(10, 1);
	W32(EOIR, iar);
	return 1;
}

static void journal_out(u64 cpu) {
	report(entries[cpu]);
	for (u64 i = 0; i < entries[cpu]; i++)
		report(journal[cpu][i]);
	entries[cpu] = 0;
}

static void spin(void) {
	UNMASK();
	for (int i = 0; i < 50; i++)
		ISB();
	MASK();
}

static void cpu_up(void) {
	W32(GICD + 0x100, 0xffffffff);
	for (int i = 0; i < 32; i += 4)
		W32(GICD + 0x400 + i, 0xa0a0a0a0);
	W8(GICD + 0x402, 0x80); /* SGI 2 */
	report(R32(GICD + 0x400));
	W32(PMR, 0xff);
	W32(BPR, 0);
	W32(CTLR, 1);
}

static void one_cpu(void) {
	report(R32(PMR) << 16 | R32(BPR) << 8 | R32(ABPR));
	sgi(1, 1);
	sgi(2, 1);
	report(R32(HPPIR));
	spin();
	journal_out(0);
	nested = 1;
	sgi(1, 1);
	spin();
	journal_out(0);
	/* EOImode 1: active until DIR. */
	W32(CTLR, 1 | 1 << 9);
	sgi(1, 1);
	spin();
	report(R32(GICD + 0x300) & 0xffff);
	W32(DIR, 1);
	report(R32(GICD + 0x300) & 0xffff);
	/* Group 1: IAR does not give it away with AckCtl clear. QEMU's GICV has no AIAR, so none is used here. */
	W32(CTLR, 3);
	W32(GICD + 0x80, 1 << 4);
	sgi(4, 1);
	report(R32(IAR));
	report(R32(HPPIR));
	W32(CTLR, 3 | 4);
	report(R32(IAR));
	W32(EOIR, 4);
	/* Group 0 as FIQ, group 1 as IRQ. */
	W32(CTLR, 3 | 4 | 8);
	entries[0] = 0;
	sgi(4, 1);
	sgi(2, 1);
	spin();
	journal_out(0);
	W32(GICD + 0x80, 0);
	W32(CTLR, 1);
	/* The virtual timer, an SPI. */
	SYS_SET(cntv_cval_el0, SYS_GET(cntvct_el0) + 62500);
	SYS_SET(cntv_ctl_el0, 1);
	while (!taken[0][27]) {
		WFI();
		UNMASK();
		MASK();
	}
	W8(GICD + 0x800 + 41, 1);
	W32(GICD + 0x104, 1 << 9);
	W32(GICD + 0x204, 1 << 9);
	spin();
	journal_out(0);
}

static volatile u64 up[4];

static void secondary(u64 cpu) {
	cpu_up();
	up[cpu] = 1;
	DSB();
	for (;;) {
		WFI();
		UNMASK();
		MASK();
	}
}

static void several(void) {
	for (u64 cpu = 1; cpu < CPUS; cpu++) {
		report(psci(0xc4000003, cpu, (u64)_start, 0));
		while (!up[cpu])
			asm volatile("yield");
	}
	pong = 1;
	for (u64 round = 0; round < ROUNDS; round++) {
		u64 before = taken[0][10], cpu = 1 + round % (CPUS - 1);
		sgi(9, 1 << cpu);
		while (taken[0][10] == before) {
			if (round & 1)
				WFI();
			UNMASK();
			MASK();
		}
	}
	pong = 0;
	report(taken[0][10]);
	/* All others: each of them answers, and both answers count although the number is one. */
	entries[0] = 0;
	pong = 1;
	W32(SGIR, 1UL << 24 | 9);
	while (entries[0] < CPUS - 1) {
		UNMASK();
		MASK();
	}
	u64 senders = 0;
	for (u64 i = 0; i < entries[0]; i++)
		senders |= 1 << (journal[0][i] >> 10);
	report(senders);
	/* An SPI that goes to another CPU. */
	W8(GICD + 0x800 + 42, 2);
	report(R8(GICD + 0x800 + 42));
	W32(GICD + 0x104, 1 << 10);
	W32(GICD + 0x204, 1 << 10);
	while (!taken[1][42])
		asm volatile("wfe");
	report(taken[0][42]);
}

u64 main(u64 cpu, u64 x0) {
	if (cpu)
		secondary(cpu);
	W32(GICD, 1);
	report(R32(GICD + 4) >> 5 & 7);
	report(R32(GICD + 8));
	report(R32(GICD + 0x800));
	cpu_up();
	one_cpu();
	if (CPUS > 1)
		several();
	return 0;
}

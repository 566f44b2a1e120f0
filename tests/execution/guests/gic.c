/* A GICv3 from the inside: SGIs, priorities, preemption, EOI modes, groups, timers, a device's SPI, several CPUs. */
#include "gic.h"

#define DEVICE 0x0b000000UL /* the test raises SPI 8 (INTID 40) on a write, lowers it on a read */

#define ICC_PMR "S3_0_c4_c6_0"
#define ICC_IAR0 "S3_0_c12_c8_0"
#define ICC_EOIR0 "S3_0_c12_c8_1"
#define ICC_DIR "S3_0_c12_c11_1"
#define ICC_RPR "S3_0_c12_c11_3"
#define ICC_SGI1R "S3_0_c12_c11_5"
#define ICC_SGI0R "S3_0_c12_c11_7"
#define ICC_IAR1 "S3_0_c12_c12_0"
#define ICC_EOIR1 "S3_0_c12_c12_1"
#define ICC_HPPIR1 "S3_0_c12_c12_2"
#define ICC_CTLR "S3_0_c12_c12_4"
#define ICC_SRE "S3_0_c12_c12_5"
#define ICC_IGRPEN0 "S3_0_c12_c12_6"
#define ICC_IGRPEN1 "S3_0_c12_c12_7"

/* What the handler has seen, per CPU: a journal of INTIDs, 0x1000 added where it was a FIQ, 0x100 at the way out. */
static volatile u64 journal[4][64], entries[4], taken[4][64];
static volatile u64 nested_sgi, eoi_only, pong, acknowledge_only;

static void note(u64 cpu, u64 what) { if (entries[cpu] < 64) journal[cpu][entries[cpu]++] = what; }

static void sgi_to(u64 intid, u64 targets) { DSB(); SET(ICC_SGI1R, intid << 24 | targets); }

int fixup(struct frame *f) {
	u64 cpu = this_cpu(), intid;
	if (f->vector != 5 && f->vector != 6)
		return 0;
	LOG(cpu)[0]--;
	intid = f->vector == 5 ? GET(ICC_IAR1) : GET(ICC_IAR0);
	note(cpu, intid + (f->vector == 6 ? 0x1000 : 0));
	if (intid < 64)
		taken[cpu][intid]++;
	if (intid == 27)
		SYS_SET(cntv_ctl_el0, 0);
	if (intid == 30)
		SYS_SET(cntp_ctl_el0, 0);
	if (intid == 40)
		(void)R32(DEVICE);
	if (intid == nested_sgi && nested_sgi) {
		u64 elr = SYS_GET(elr_el1), spsr = SYS_GET(spsr_el1);
		report(GET(ICC_RPR));
		nested_sgi = 0;
		sgi_to(2, 1 << cpu);
		sgi_to(3, 1 << cpu);
		UNMASK();
		for (int i = 0; i < 100; i++)
			ISB();
		MASK();
		SYS_SET(elr_el1, elr);
		SYS_SET(spsr_el1, spsr);
	}
	if (intid == 9 && pong)
		sgi_to(10, 1);
	if (f->vector == 5)
		SET(ICC_EOIR1, intid);
	else
		SET(ICC_EOIR0, intid);
	if (intid < 16 && !acknowledge_only)
		note(cpu, intid + 0x100);
	return 1;
}

static void cpu_up(u64 cpu) {
	W32(GICR(cpu) + 0x14, 0);
	W32(SGI(cpu) + 0x80, 0xffffffff & ~(1 << 5)); /* SGI 5 is group 0 */
	W32(SGI(cpu) + 0x100, 0xffffffff);
	for (int i = 0; i < 32; i += 4)
		W32(SGI(cpu) + 0x400 + i, 0xa0a0a0a0);
	W8(SGI(cpu) + 0x402, 0x80); /* SGI 2 */
	report(R32(SGI(cpu) + 0x400));
	SET(ICC_SRE, 7);
	SET(ICC_PMR, 0xff);
	SET(ICC_CTLR, 0);
	SET(ICC_IGRPEN0, 1);
	SET(ICC_IGRPEN1, 1);
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

static void one_cpu(void) {
	/* To itself; masked interrupts wait. */
	sgi_to(1, 1);
	report(GET(ICC_HPPIR1));
	report(R32(SGI(0) + 0x200) & 0xffff); /* ISPENDR */
	spin();
	journal_out(0);
	/* The higher priority first, whatever came first. */
	sgi_to(1, 1);
	sgi_to(2, 1);
	spin();
	journal_out(0);
	/* In the midst of another: only the higher priority comes. */
	nested_sgi = 1;
	sgi_to(1, 1);
	spin();
	journal_out(0);
	/* Group 0 is a FIQ; ICC_SGI0R reaches group 0 only. */
	sgi_to(5, 1);
	SET(ICC_SGI0R, 6UL << 24 | 1);
	spin();
	journal_out(0);
	/* EOImode 1: active until DIR. */
	SET(ICC_CTLR, 2);
	sgi_to(1, 1);
	spin();
	sgi_to(1, 1);
	spin();
	report(R32(SGI(0) + 0x300) & 0xffff); /* ISACTIVER */
	journal_out(0);
	SET(ICC_DIR, 1);
	spin();
	SET(ICC_DIR, 1);
	SET(ICC_CTLR, 0);
	journal_out(0);
	/* The priority mask, a disabled interrupt, a cleared one. */
	SET(ICC_PMR, 0x90);
	sgi_to(1, 1);
	sgi_to(2, 1);
	spin();
	journal_out(0);
	W32(SGI(0) + 0x280, 1 << 1); /* ICPENDR */
	SET(ICC_PMR, 0xff);
	W32(SGI(0) + 0x180, 1 << 4); /* ICENABLER */
	sgi_to(4, 1);
	spin();
	W32(SGI(0) + 0x100, 1 << 4);
	spin();
	journal_out(0);
}

static void timers(void) {
	SYS_SET(cntv_cval_el0, SYS_GET(cntvct_el0) + 62500);
	SYS_SET(cntv_ctl_el0, 1);
	while (!taken[0][27]) {
		WFI();
		UNMASK();
		MASK();
	}
	SYS_SET(cntp_cval_el0, SYS_GET(cntpct_el0) + 62500);
	SYS_SET(cntp_ctl_el0, 1);
	UNMASK();
	while (!taken[0][30])
		;
	MASK();
	journal_out(0);
}

static void device(void) {
	W32(GICD + 0x84, 0xffffffff);
	W8(GICD + 0x400 + 40, 0xa0);
	W64(GICD + 0x6000 + 8 * 40, 0); /* IROUTER: Aff 0.0.0.0 */
	W32(GICD + 0x104, 1 << 8);
	for (int i = 0; i < 3; i++) {
		W32(DEVICE, i);
		while (taken[0][40] == i) {
			WFI();
			UNMASK();
			MASK();
		}
	}
	journal_out(0);
}

static volatile u64 up[4];

static void secondary(u64 cpu) {
	cpu_up(cpu);
	up[cpu] = 1;
	DSB();
	for (;;) {
		WFI();
		UNMASK();
		MASK();
	}
}

static void several(void) {
	acknowledge_only = 1;
	for (u64 cpu = 1; cpu < CPUS; cpu++) {
		report(psci(0xc4000003, cpu, (u64)_start, 0));
		while (!up[cpu])
			asm volatile("yield");
	}
	pong = 1;
	/* A message and its answer, again and again: none may be lost. */
	for (u64 round = 0; round < ROUNDS; round++) {
		u64 before = taken[0][10], cpu = 1 + round % (CPUS - 1);
		sgi_to(9, 1 << cpu);
		while (taken[0][10] == before) {
			if (round & 1)
				WFI();
			UNMASK();
			MASK();
		}
	}
	report(taken[0][10]);
	for (u64 cpu = 1; cpu < CPUS; cpu++)
		report(taken[cpu][9]);
	pong = 0;
	DSB();
	SET(ICC_SGI1R, 1UL << 40 | 11UL << 24); /* all but this one */
	for (u64 cpu = 1; cpu < CPUS; cpu++)
		while (!taken[cpu][11])
			asm volatile("wfe");
	report(taken[0][11]);
	/* An SPI that goes to another CPU. */
	W64(GICD + 0x6000 + 8 * 41, 1);
	W32(GICD + 0x104, 1 << 9);
	W8(GICD + 0x400 + 41, 0xa0);
	W32(GICD + 0x204, 1 << 9);
	while (!taken[1][41])
		asm volatile("wfe");
	report(taken[0][41]);
}

u64 main(u64 cpu, u64 x0) {
	if (cpu)
		secondary(cpu);
	W32(GICD, 0x12);
	cpu_up(0);
	report(R32(GICD + 8));
	report(GET(ICC_CTLR));
	report(GET(ICC_SRE));
	report(R64(GICR(CPUS - 1) + 8) >> 4 & 1); /* TYPER.Last */
	one_cpu();
	timers();
	device();
	if (CPUS > 1)
		several();
	return 0;
}

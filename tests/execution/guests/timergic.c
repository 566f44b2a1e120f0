/* Interrupts that nobody takes, timers behind masks, frames accessed by parts, CPU_ON from several CPUs at once. */
#include "gic.h"

#define PMR "S3_0_c4_c6_0"
#define SGI1R "S3_0_c12_c11_5"
#define IAR1 "S3_0_c12_c12_0"
#define EOIR1 "S3_0_c12_c12_1"
#define DIR "S3_0_c12_c11_1"
#define CTLR "S3_0_c12_c12_4"
#define SRE "S3_0_c12_c12_5"
#define IGRPEN1 "S3_0_c12_c12_7"
#define MS 62500UL
#define V 27
#define P 30

static volatile u64 taken[4][64], last[4];

int fixup(struct frame *f) {
	u64 cpu = this_cpu(), intid;
	if (f->vector != 5)
		return 0;
	LOG(cpu)[0]--;
	intid = GET(IAR1);
	last[cpu] = intid;
	if (intid < 64)
		taken[cpu][intid]++;
	if (intid == V)
		SYS_SET(cntv_ctl_el0, 3);
	if (intid == P)
		SYS_SET(cntp_ctl_el0, 3);
	if (intid < 1020)
		SET(EOIR1, intid);
	return 1;
}

static void cpu_up(u64 cpu) {
	W32(SGI(cpu) + 0x80, 0xffffffff);
	W32(SGI(cpu) + 0x180, 0xffff0000);
	for (int i = 0; i < 32; i += 4)
		W32(SGI(cpu) + 0x400 + i, 0xa0a0a0a0);
	SET(SRE, 7);
	SET(PMR, 0xff);
	SET(CTLR, 0);
	SET(IGRPEN1, 1);
}

static void spin(void) {
	UNMASK();
	for (int i = 0; i < 50; i++)
		ISB();
	MASK();
}

static void frames(void) {
	u64 typer = R32(GICD + 4), iidr = R32(GICD + 8), at = GICD + 0x400 + 40;
	W32(GICD + 4, ~0);
	W32(GICD + 8, ~0);
	report(R32(GICD + 4) == typer && R32(GICD + 8) == iidr);
	report(R32(GICD + 0xffe8));			/* PIDR2 */
	W32(at, ~0);
	report(R32(at));				/* which priority bits there are */
	W32(at, 0);
	for (int i = 0; i < 4; i++)
		W8(at + i, (0x11 * (i + 1)) & 0xf8);
	report(R32(at));
	report(R8(at + 2));
	report(R8(GICD + 8));				/* a byte of a register of words: nothing there */
	report(R32(GICD + 0x400 + (((typer & 31) + 1) * 32)));	/* beyond the last interrupt */
	report(R32(GICR(1) + 8) == (u32)R64(GICR(1) + 8) && R32(GICR(1) + 12) == R64(GICR(1) + 8) >> 32);
	report(R64(GICR(1) + 8));
	report(R32(GICR(0) + 0xffe8));
	report(R32(GICD + 0x800 + 40));			/* ITARGETSR */
	W32(GICD + 0x84, ~0);
	W64(GICD + 0x6000 + 8 * 40, 0xff12345678ffffffUL);
	report(R64(GICD + 0x6000 + 8 * 40));
	W64(GICD + 0x6000 + 8 * 40, 0);
}

/* An SPI that software makes pending and active, of both kinds. */
static void states(void) {
	u32 bit = 1 << 8;				/* 40 */
	W32(GICD + 0x104, bit);
	W8(GICD + 0x400 + 40, 0x80);
	for (int edge = 0; edge < 2; edge++) {
		u64 before = taken[0][40];
		W32(GICD + 0xc00 + 8, edge ? 2 << 16 : 0);
		W32(GICD + 0x204, bit);
		report(!!(R32(GICD + 0x204) & bit));
		W32(GICD + 0x284, bit);
		report(!!(R32(GICD + 0x204) & bit));
		spin();
		report(taken[0][40] - before);		/* was taken back: 0 */
		W32(GICD + 0x304, bit);			/* active: a pending one waits */
		W32(GICD + 0x204, bit);
		spin();
		report(taken[0][40] - before);
		W32(GICD + 0x384, bit);
		spin();
		report(taken[0][40] - before);		/* 1 */
		report((R32(GICD + 0x204) | R32(GICD + 0x304)) & bit);
	}
	SET(CTLR, 2);					/* EOImode 1: nothing until DIR */
	W32(GICD + 0x204, bit);
	spin();
	W32(GICD + 0x204, bit);
	u64 before = taken[0][40];
	spin();
	report(taken[0][40] - before);
	SET(DIR, 40);
	spin();
	report(taken[0][40] - before);
	SET(DIR, 40);
	SET(CTLR, 0);
	W32(GICD + 0, 0x10);				/* the distributor off: nothing comes, nothing is lost */
	W32(GICD + 0x204, bit);
	spin();
	report(taken[0][40] - before);
	W32(GICD + 0, 0x12);
	spin();
	report(taken[0][40] - before);
	report(GET(IAR1));				/* 1023 */
}

static u32 pending(u64 intid) { return R32(SGI(0) + 0x200) >> intid & 1; }

/* As kvm-unit-tests' timer: while the interrupt is off the output shows in the redistributor. */
#define TIMER(letter, intid) do { \
	W32(SGI(0) + 0x180, 1 << intid); \
	SYS_SET(cnt##letter##_cval_el0, SYS_GET(cnt##letter##ct_el0) + 10000 * MS); \
	SYS_SET(cnt##letter##_ctl_el0, 1); \
	report(pending(intid)); \
	SYS_SET(cnt##letter##_cval_el0, SYS_GET(cnt##letter##ct_el0) - 1); \
	report(pending(intid)); \
	report(SYS_GET(cnt##letter##_ctl_el0)); \
	SYS_SET(cnt##letter##_ctl_el0, 3); \
	report(pending(intid)); \
	SYS_SET(cnt##letter##_ctl_el0, 0); \
	report(pending(intid)); \
	SYS_SET(cnt##letter##_cval_el0, 0); \
	SYS_SET(cnt##letter##_ctl_el0, 1); \
	report(pending(intid)); \
	SYS_SET(cnt##letter##_cval_el0, ~0UL); \
	report(pending(intid)); \
	SYS_SET(cnt##letter##_ctl_el0, 0); \
	W32(SGI(0) + 0x100, 1 << intid); \
	u64 before = taken[0][intid], start = SYS_GET(cnt##letter##ct_el0); \
	SYS_SET(cnt##letter##_tval_el0, 10 * MS); \
	SYS_SET(cnt##letter##_ctl_el0, 1); \
	while (taken[0][intid] == before) { WFI(); UNMASK(); MASK(); } \
	report(SYS_GET(cnt##letter##ct_el0) - start >= 10 * MS); \
	report((int)SYS_GET(cnt##letter##_tval_el0) <= 0); \
	SYS_SET(cnt##letter##_tval_el0, 0); \
	SYS_SET(cnt##letter##_ctl_el0, 1); \
	spin(); \
	report(taken[0][intid] - before); \
	SYS_SET(cnt##letter##_ctl_el0, 0); \
} while (0)

/* The virtual timer has fired, and its interrupt is off: WFI waits for the physical one. How often it came back. */
static void asleep(void) {
	u64 count = 0;
	W32(SGI(0) + 0x180, 1 << V);
	SYS_SET(cntv_cval_el0, 0);
	SYS_SET(cntv_ctl_el0, 1);
	u64 before = taken[0][P];
	SYS_SET(cntp_tval_el0, 50 * MS);
	SYS_SET(cntp_ctl_el0, 1);
	while (taken[0][P] == before) {
		WFI();
		count++;
		UNMASK();
		MASK();
	}
	report(count < 5);
	SYS_SET(cntv_ctl_el0, 0);
	SYS_SET(cntp_ctl_el0, 0);
}

static volatile u64 round_, ready, success, already, other, life;

static void add(volatile u64 *at) {
	u64 old, failed;
	asm volatile("1: ldxr %0, %2\n add %0, %0, #1\n stxr %w1, %0, %2\n cbnz %w1, 1b"
		     : "=&r"(old), "=&r"(failed), "+Q"(*at)::"memory");
}

#define ROUNDS 20
static void race(void) {
	u64 answer = psci(0xc4000003, 1, (u64)_start, 0x1234);
	add(answer == 0 ? &success : answer == -4UL ? &already : &other);
	add(&ready);
}

u64 main(u64 cpu, u64 x0) {
	if (cpu == 1) {
		if (x0 != 0x1234)
			report(x0);
		add(&life);
		while (life != round_ || ready != 3 * round_)
			asm volatile("yield");
		psci(0x84000002, 0, 0, 0);
	}
	if (cpu) {
		for (u64 n = 1; n <= ROUNDS; n++) {
			while (round_ < n)
				asm volatile("wfe");
			race();
		}
		psci(0x84000002, 0, 0, 0);
	}
	W32(GICD, 0x12);
	cpu_up(0);
	frames();
	states();
	{ TIMER(v, V); }
	{ TIMER(p, P); }
	asleep();
	report(psci(0x84000000, 0, 0, 0));		/* PSCI_VERSION */
	report(psci(0xc4000004, 1, 4, 0));		/* AFFINITY_INFO of level 4 */
	report(psci(0xc4000004, 1UL << 24, 0, 0));	/* of bits that are no affinity */
	report(psci(0xc4000004, 0, 1, 0));		/* of everybody */
	report(psci(0xc4000012, 1, 0, 0));		/* SYSTEM_RESET2 of a kind that there is not */
	report(psci(0xc400000e, 0, 0, 0));		/* SYSTEM_SUSPEND, which userspace did not allow */
	report(psci(0x84000015, 0, 0, 0));
	SYS_SET(cntv_tval_el0, 0);			/* CPU_SUSPEND with an interrupt that waits comes back */
	W32(SGI(0) + 0x100, 1 << V);
	SYS_SET(cntv_ctl_el0, 1);
	report(psci(0xc4000001, 0, (u64)park, 0));
	SYS_SET(cntv_ctl_el0, 0);
	for (u64 n = 2; n < 4; n++)
		report(psci(0xc4000003, n, (u64)_start, 0));
	for (u64 n = 1; n <= ROUNDS; n++) {
		while (psci(0xc4000004, 1, 0, 0) != 1)
			;
		round_ = n;
		DSB();
		asm volatile("sev");
		race();
		while (ready != 3 * n)
			asm volatile("yield");
	}
	report(success);
	report(already);
	report(other);
	while (psci(0xc4000004, 1, 0, 0) != 1)
		;
	report(life);
	return 0;
}

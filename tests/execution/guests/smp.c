/* Several CPUs: a shared counter by every kind of atomic, PSCI, TLBI and code that another CPU wrote. */
#include "tables.h"

#define CPU_OFF 0x84000002UL
#define CPU_ON 0xc4000003UL
#define AFFINITY_INFO 0xc4000004UL
#define FEATURES 0x8400000aUL
#define ROUNDS 500000

static vu64 counter[8] __attribute__((aligned(64)));
static vu64 arrived, go, turn, done, finished;
static u64 low, high;

static void add_exclusive(vu64 *at) {
	u64 old, failed;
	asm volatile("1: ldxr %0, %2\n add %0, %0, #1\n stxr %w1, %0, %2\n cbnz %w1, 1b"
		     : "=&r"(old), "=&r"(failed), "+Q"(*at)::"memory");
}

#ifdef LSE
static void add_lse(vu64 *at) { asm volatile(".arch_extension lse\n ldadd %1, xzr, %0" : "+Q"(*at) : "r"(1UL) : "memory"); }
static void add_cas(vu64 *at) {
	for (;;) {
		u64 old = *at, seen = old;
		asm volatile(".arch_extension lse\n casal %0, %2, %1" : "+r"(seen), "+Q"(*at) : "r"(old + 1) : "memory");
		if (seen == old)
			return;
	}
}
#endif

static void locked(vu64 *lock, vu64 *plain) {		/* a spin lock of acquire and release */
	u64 seen, failed;
	asm volatile("1: ldaxr %w0, %2\n cbnz %w0, 1b\n stxr %w1, %w3, %2\n cbnz %w1, 1b"
		     : "=&r"(seen), "=&r"(failed), "+Q"(*(volatile u32 *)lock) : "r"(1) : "memory");
	*plain += 1;
	asm volatile("stlr wzr, %0" : "=Q"(*(volatile u32 *)lock)::"memory");
}

static void count(void) {
	for (u64 i = 0; i < ROUNDS; i++)
		add_exclusive(&counter[0]);
	for (u64 i = 0; i < ROUNDS / 10; i++)
		locked(&counter[1], &counter[2]);
#ifdef LSE
	for (u64 i = 0; i < ROUNDS; i++)
		add_lse(&counter[3]);
	for (u64 i = 0; i < ROUNDS / 10; i++)
		add_cas(&counter[4]);
#endif
}

static u64 ask(u64 va) {				/* runs code written by another CPU, reads a page it moves */
	return ((u64 (*)(void))va)();
}

static void second(u64 cpu, u64 context) {
	report(context);
	if (cpu == 1)
		mmu_on(low, high);
	add_exclusive(&arrived);
	while (!go)
		;
	count();
	if (cpu == 1) {
		for (u64 round = 1; round <= 8; round++) {
			while (turn != round)
				;
			ISB();
			report(ask(high ? UPPER : 0));
			report(*(vu64 *)(UPPER + PAGE));
			done = round;
			DSB();
		}
	}
	add_exclusive(&finished);
	psci(CPU_OFF, 0, 0, 0);
	report(0xbad);
}

u64 main(u64 cpu, u64 x0) {
	if (cpu)
		return second(cpu, x0), 0;
	low = identity();
	high = pages(1);
	u64 code = pages(1), data = pages(2);
	map(high, UPPER, code, NORMAL, 3);
	map(high, UPPER + PAGE, data, NORMAL | PXN | UXN, 3);
	report(psci(FEATURES, CPU_ON, 0, 0));
	report(psci(FEATURES, 0x84000099, 0, 0));
	report(psci(AFFINITY_INFO, 1, 0, 0));			/* off: 1 */
	report(psci(CPU_ON, 0, (u64)_start, 0));		/* itself: already on */
	report(psci(CPU_ON, 99, (u64)_start, 0));		/* nobody: invalid parameters */
	for (u64 n = 1; n < CPUS; n++)
		report(psci(CPU_ON, n, (u64)_start, 0x100 + n));
	report(psci(CPU_ON, 1, (u64)_start, 0));		/* already on */
	mmu_on(low, high);
	while (arrived != CPUS - 1)
		;
	report(psci(AFFINITY_INFO, 1, 0, 0));			/* on: 0 */
	go = 1;
	count();
	for (u64 round = 1; round <= 8; round++) {
		u32 *at = (u32 *)code;
		at[0] = 0xd2800000 | (u32)(round * 3) << 5;	/* mov x0, #(3 * round) */
		at[1] = 0xd65f03c0;
		asm volatile("dc cvau, %0\n dsb ish\n ic ivau, %0\n dsb ish\n isb" ::"r"(code) : "memory");
		u64 page = data + (round & 1) * PAGE;
		*(vu64 *)page = round * 7;
		*entry(high, UPPER + PAGE, 3) = page | NORMAL | PXN | UXN | 3;
		forget(UPPER + PAGE);
		turn = round;
		while (done != round)
			;
	}
	while (finished != CPUS - 1)
		;
	for (u64 n = 1; n < CPUS; n++)
		while (psci(AFFINITY_INFO, n, 0, 0) != 1)
			;
	for (int i = 0; i < 5; i++)
		report(counter[i]);
	/* the second time round: on again after CPU_OFF */
	report(psci(CPU_ON, 1, (u64)park, 0));
	report(psci(AFFINITY_INFO, 1, 0, 0));
	return 0;
}

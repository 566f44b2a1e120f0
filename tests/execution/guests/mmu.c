/* The guest's own translation, on both halves: blocks, pages, and every kind of fault, some of them put right. */
#include "tables.h"

#define OUTSIDE (RAM >> 50 ? 1UL << 51 : 1UL << 47)

static u64 high, demand_at, demand_page, protected_at;

int fixup(struct frame *f) {
	u64 status = f->esr & 0x3f;
	if (demand_at && f->far >> SHIFT == demand_at >> SHIFT && (status & 0x3c) == 4) {
		map(high, demand_at, demand_page, NORMAL | PXN | UXN, 3);
		demand_at = 0;
		return 1;
	}
	if (protected_at && f->far >> SHIFT == protected_at >> SHIFT && status == 0xf) {
		*entry(high, protected_at, 3) &= ~READ_ONLY;
		forget(protected_at);
		protected_at = 0;
		return 1;
	}
	return 0;
}

static u64 load(u64 va) { u64 value = 0xbad; asm volatile("ldr %0, [%1]" : "+r"(value) : "r"(va) : "memory"); return value; }
static void store(u64 va, u64 value) { asm volatile("str %0, [%1]" ::"r"(value), "r"(va) : "memory"); }
static void jump(u64 va) {
	asm volatile("adr x3, 1f\n str x3, [%0]\n br %1\n1:" ::"r"(&resume[0]), "r"(va) : "x3", "memory");
}

asm(".globl user_code, user_end\nuser_code: ldr x9, [x0]\n add x9, x9, #1\n str x9, [x0]\n"
    "ldr x10, [x0, x9]\n mov x0, x9\n svc #0x7f\nuser_end:\n");
extern u32 user_code[], user_end[];

u64 main(u64 cpu, u64 x0) {
	u64 low = identity(), one = pages(1), two = pages(1), user = pages(1), data = pages(1), page = UPPER;
	high = pages(1);
	map(high, page, one, NORMAL | PXN | UXN, 3);
	map(high, page + PAGE, two, NORMAL | READ_ONLY | PXN | UXN, 3);
	map(high, page + 3 * PAGE, two, SHARED | PXN | UXN, 3);		/* no access flag */
	map(high, page + 4 * PAGE, user, NORMAL | EL0_TOO | READ_ONLY | PXN, 3);
	map(high, page + 5 * PAGE, data, NORMAL | EL0_TOO | PXN | UXN, 3);
	map(high, page + 6 * PAGE, OUTSIDE, NORMAL | PXN | UXN, 3);	/* beyond the VM's IPA space */
	for (u32 *from = user_code, *to = (u32 *)user; from < user_end;)
		*to++ = *from++;
	*(vu64 *)one = 0x1111;
	*(vu64 *)two = 0x2222;
	*(vu64 *)data = PAGE - 1;
	mmu_on(low, high);

	report(load(page));				/* 0: through TTBR1 */
	store(page + 8, 0x3333);
	report(*(vu64 *)(one + 8));			/* 1: and seen through TTBR0 */
	store(page + PAGE + 16, 0x4444);		/* fault 0: read-only */
	report(*(vu64 *)(two + 16));			/* 2: nothing was written */
	load(page + 2 * PAGE + 8);			/* fault 1: no page */
	load(page + 3 * PAGE);				/* fault 2: access flag */
	jump(page);					/* fault 3: execute-never */
	load(UPPER - 8);				/* fault 4: between the halves */
	load(page + (1UL << (VA - 1)));			/* fault 5: no entry in the first table */
	load(page + 6 * PAGE + 32);			/* fault 6: an external abort, from stage 2 */
	*entry(high, page, 3) = OUTPUT(two) | NORMAL | PXN | UXN | 3;
	forget(page);
	report(load(page));				/* 3: after TLBI the other page */
	demand_at = page + 7 * PAGE;
	demand_page = one;
	report(load(demand_at));			/* 4, fault 7: mapped by the handler */
	protected_at = page + PAGE;
	store(protected_at + 24, 0x5555);		/* fault 8: made writable by the handler */
	report(*(vu64 *)(two + 24));			/* 5 */
	report(call_el0(page + 4 * PAGE, page + 5 * PAGE, 0));	/* 6, fault 9: EL0, beside its page */
	report(*(vu64 *)data);				/* 7 */

	return 0;
}

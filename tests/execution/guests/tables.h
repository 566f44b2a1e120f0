/* Stage-1 tables of 1 << SHIFT bytes for VA bits of address. */
#include "rt.h"

#define PAGE (1UL << SHIFT)
#define STRIDE (SHIFT - 3)
#define START (4 - (VA - SHIFT + STRIDE - 1) / STRIDE)
#define TG0 (SHIFT == 12 ? 0UL : SHIFT == 14 ? 2UL : 1UL)
#define TG1 (SHIFT == 12 ? 2UL : SHIFT == 14 ? 1UL : 3UL)
#define UPPER (-(1UL << VA))
/* Output addresses of 52 bits: bits 51:48 in 15:12 with 64K pages, else (DS) 51:50 in 9:8. */
#ifdef WIDE
#define IPS 6UL
#define DS (SHIFT == 16 ? 0UL : 1UL << 59)
#define SHARED (SHIFT == 16 ? 3UL << 8 : 0UL)
#define OUTPUT(pa) (SHIFT == 16 ? ((pa) & 0xffffffffffffUL) | (pa) >> 48 << 12 : ((pa) & 0x3ffffffffffffUL) | (pa) >> 50 << 8)
#define ADDRESS(d) (SHIFT == 16 ? ((d) & 0xffffffff0000UL) | ((d) >> 12 & 15) << 48 : ((d) & 0x3fffffffff000UL) | ((d) >> 8 & 3) << 50)
#define ROOT(pa) (((pa) & 0xffffffffffc0UL) | (pa) >> 48 << 2)
#else
#define IPS 5UL
#define DS 0UL
#define SHARED (3UL << 8)
#define OUTPUT(pa) (pa)
#define ADDRESS(d) ((d) & 0xfffffffff000UL)
#define ROOT(pa) (pa)
#endif

#define AF (1UL << 10)
#define EL0_TOO (1UL << 6)
#define READ_ONLY (1UL << 7)
#define PXN (1UL << 53)
#define UXN (1UL << 54)
#define NORMAL (AF | SHARED)

static u64 heap = HEAP;

static inline u64 pages(u64 count) {
	u64 at = (heap + PAGE - 1) & -PAGE;
	heap = at + count * PAGE;
	return at;
}

static inline vu64 *entry(u64 root, u64 va, int level) {
	vu64 *table = (vu64 *)root;
	for (int at = START;; at++) {
		int low = SHIFT + STRIDE * (3 - at), bits = at == START ? VA - low : STRIDE;
		vu64 *slot = table + (va >> low & ((1UL << bits) - 1));
		if (at == level)
			return slot;
		if (!(*slot & 1))
			*slot = OUTPUT(pages(1)) | 3;
		table = (vu64 *)(ADDRESS(*slot) & -PAGE);
	}
}

static inline void map(u64 root, u64 va, u64 pa, u64 attributes, int level) {
	*entry(root, va, level) = OUTPUT(pa) | attributes | (level == 3 ? 3 : 1);
	DSB();
}

static inline void forget(u64 va) {
	DSB();
	asm volatile("tlbi vaae1is, %0\n dsb sy\n isb" ::"r"(va >> 12 & 0xfffffffffffUL) : "memory");
}

/* RAM onto itself by one block, then the MMU on with both halves. */
static inline void mmu_on(u64 low, u64 high) {
	SYS_SET(mair_el1, 0xff);
	SYS_SET(tcr_el1, (64UL - VA) | (64UL - VA) << 16 | TG0 << 14 | TG1 << 30 | IPS << 32 | 0x3500UL | 0x35000000UL | DS);
	SYS_SET(ttbr0_el1, ROOT(low));
	SYS_SET(ttbr1_el1, ROOT(high));
	ISB();
	asm volatile("tlbi vmalle1\n dsb sy\n isb" ::: "memory");
	SYS_SET(sctlr_el1, SYS_GET(sctlr_el1) | 0x1005);
	ISB();
}

static inline u64 identity(void) {
	u64 root = pages(1), step = 1UL << (SHIFT + STRIDE);
	for (u64 at = RAM; at < RAM + 0x800000; at += step)
		map(root, at, at, NORMAL | UXN, 2);
	return root;
}

/* The guest debugs itself, at EL1: BRK, breakpoints, watchpoints, software steps, the OS lock, linked contexts.
   BP, WP and CTX are the numbers of a breakpoint, a watchpoint and a breakpoint that compares contexts. */
#include "rt.h"

#define STR2(x) #x
#define STR(x) STR2(x)
#define BVR(n) "dbgbvr" STR(n) "_el1"
#define BCR(n) "dbgbcr" STR(n) "_el1"
#define WVR(n) "dbgwvr" STR(n) "_el1"
#define WCR(n) "dbgwcr" STR(n) "_el1"
#define PUT(name, value) ({ asm volatile("msr " name ", %0\n isb" ::"r"((u64)(value)) : "memory"); })
#define GET(name) ({ u64 v_; asm volatile("mrs %0, " name : "=r"(v_)); v_; })

#define SS (1 << 0)
#define KDE (1 << 13)
#define MDE (1 << 15)
#define SPSR_D (1 << 9)
#define SPSR_SS (1 << 21)
#define AT_EL1 (1 << 1 | 1)		/* PMC, E */
#define ALL_BYTES (0xff << 5)
#define LOADS_STORES (3 << 3)
#define LINKED(n) (1 << 20 | (n) << 16)
#define CONTEXT (3 << 20)

int fixup(struct frame *f) {
	switch (f->esr >> 26) {
	case 0x31: case 0x35:		/* breakpoint, watchpoint: once, then the instruction */
		f->spsr |= SPSR_D;
		return 1;
	case 0x33:			/* step: on to the next one */
		f->spsr |= SPSR_SS;
		return 1;
	}
	return 0;
}

static void reset(void) {
	asm volatile("msr daifset, #8");
	PUT("osdlr_el1", 0);
	PUT("oslar_el1", 0);
	PUT("mdscr_el1", 0);
	PUT("contextidr_el1", 0);
	PUT(BCR(BP), 0), PUT(WCR(WP), 0), PUT(BCR(CTX), 0);
}

static void on(u64 bits) {
	asm volatile("msr daifclr, #8");
	PUT("mdscr_el1", GET("mdscr_el1") | bits);
}

asm(".globl in_context\nin_context: ret");
void here(void) __asm__("in_context");

extern u32 sw[], hw[], hw_svc[], hw_brk[], step[], sw_locked[], hw_locked[], in_context[];
static volatile u64 data[4];

static void breakpoint(u32 *at, u64 more) {
	PUT(BVR(BP), at);
	PUT(BCR(BP), 0xf << 5 | AT_EL1 | more);
	on(KDE | MDE);
}

static void watchpoint(volatile void *at, u64 how) {
	PUT(WVR(WP), at);
	PUT(WCR(WP), how);
	on(KDE | MDE);
}

static void mark(void) { report(LOG(0)[0]); }	/* how many exceptions there were so far */

u64 main(u64 cpu, u64 x0) {
	report((u64)sw), report((u64)hw), report((u64)hw_svc), report((u64)hw_brk), report((u64)step);
	report((u64)sw_locked), report((u64)in_context), report((u64)data);

	reset();
	asm volatile(".globl sw\nsw: brk #0x42");
	mark();
	reset(), breakpoint(hw, 0);
	asm volatile(".globl hw\nhw: nop");
	mark();
	reset(), breakpoint(hw_svc, 0);
	asm volatile(".globl hw_svc\nhw_svc: svc #7");
	mark();
	reset(), breakpoint(hw_brk, 0);
	asm volatile(".globl hw_brk\nhw_brk: brk #8");
	mark();

	/* A step of each kind: native, a trapped register, masked again by the last one. */
	reset(), on(KDE | SS);
	asm volatile(".globl step\nstep: mrs x9, esr_el1\n mrs x9, id_aa64pfr0_el1\n add x9, x9, #1\n msr daifset, #8" ::: "x9");
	mark();

	/* The OS lock: BRK is not blocked, the rest is. */
	reset(), PUT("oslar_el1", 1);
	report(GET("oslsr_el1"));
	asm volatile(".globl sw_locked\nsw_locked: brk #9");
	breakpoint(hw_locked, 0), watchpoint(&data[0], ALL_BYTES | LOADS_STORES | AT_EL1), on(SS);
	asm volatile(".globl hw_locked\nhw_locked: nop");
	data[0] = 1;
	mark();

	/* Linked to a context: not in another one. */
	reset();
	PUT(BVR(CTX), 0xabcdef), PUT(BCR(CTX), 0xf << 5 | AT_EL1 | CONTEXT);
	breakpoint(in_context, LINKED(CTX));
	for (int i = 0; i < 2; i++) {
		here();
		mark();
		PUT("contextidr_el1", 0xabcdef);
	}
	reset();
	PUT(BVR(BP), 0x1234560), PUT(WVR(WP), 0x765430);
	report(GET(BVR(BP))), report(GET(WVR(WP)));

#ifdef WATCH
	/* A store, a load, pairs that only end in the watched word, neighbours that do not touch it. */
	reset(), watchpoint(&data[1], ALL_BYTES | LOADS_STORES | AT_EL1);
	data[1] = 5;
	mark();
	report(data[1]);
	on(0);
	asm volatile("ldr x9, [%0]" ::"r"(&data[1]) : "x9");
	mark();
	on(0);
	asm volatile("stp x9, x9, [%0]" ::"r"(&data[0]) : "memory");
	mark();
	on(0);
	asm volatile("str x9, [%0]\n ldr x9, [%0, #16]\n ldrb w9, [%0, #7]\n stp x9, x9, [%0, #16]" ::"r"(&data[0]) : "x9", "memory");
	mark();
	/* Stores only, one byte of it. */
	reset(), watchpoint(&data[1], 0x20 << 5 | 2 << 3 | AT_EL1);
	asm volatile("ldr x9, [%0]\n strb w9, [%0, #4]" ::"r"(&data[1]) : "x9", "memory");
	mark();
	asm volatile("strb w9, [%0, #5]" ::"r"(&data[1]) : "memory");
	mark();
	/* A range of 32 bytes by its mask. */
	reset(), watchpoint(&data[0], 5 << 24 | ALL_BYTES | 2 << 3 | AT_EL1);
	asm volatile("str x9, [%0, #24]" ::"r"(&data[0]) : "memory");
	mark();
	/* Linked. */
	reset();
	PUT(BVR(CTX), 0xabcdef), PUT(BCR(CTX), 0xf << 5 | AT_EL1 | CONTEXT);
	watchpoint(&data[2], ALL_BYTES | LOADS_STORES | AT_EL1 | LINKED(CTX));
	for (int i = 0; i < 2; i++) {
		data[2] = i + 1;
		mark();
		PUT("contextidr_el1", 0xabcdef);
	}
	report(data[2]);
	reset();
#endif
	return 0;
}

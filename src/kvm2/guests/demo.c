/*
 * The guest that `kvm2 run` runs when it is given none: it shows what the VM looks like from inside, and what happens
 * at the edges of its address space. EL1, MMU off, no library; docs/guest.md has the contract and the parameter block.
 */
typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long u64;

struct range {
	u64 base, size;
};

struct params {			/* src/kvm2/board/params.py packs it */
	u64 magic;
	u32 version, size;
	u32 ipa_bits, host_ipa_bits;
	u32 page_shift, cpus;
	u64 sve_vls;
	u64 uart;
	u64 top_base, top_size;
	u32 nr_ranges, reserved;
	struct range ranges[];
};

#define PARAMS_MAGIC 0x4d524150324d564bUL	/* "KVM2PARM" */
#define PSCI_CPU_ON 0xc4000003u
#define MAX_CPUS 64
#define STACK_BYTES 1024

extern void psci_off(void) __attribute__((noreturn));
extern long hvc3(u64 fn, u64 a, u64 b, u64 c);
extern u64 sve_bytes(void);
extern int probe_read32(u64 address, u32 *value);
extern int probe_write32(u64 address, u32 value);
extern void secondary_start(void);

/* What start.S writes in its data-abort handler, in this order. */
struct {
	u64 esr, far;
} fault_esr __attribute__((aligned(16)));

static volatile u32 *uart = (volatile u32 *)0x09000000UL;
static volatile u32 cpu_done[MAX_CPUS];
static u8 stacks[MAX_CPUS][STACK_BYTES] __attribute__((aligned(16)));

static void put_char(char c)
{
	while (uart[0x18 / 4] & 0x20)	/* FR.TXFF */
		;
	uart[0] = (u8)c;
}

#include "print.h"

static u32 parange_bits(u32 code)
{
	switch (code) {
	case 0: return 32;
	case 1: return 36;
	case 2: return 40;
	case 3: return 42;
	case 4: return 44;
	case 5: return 48;
	case 6: return 52;
	case 7: return 56;
	}
	return 0;
}

/* Arm ARM, ISS encoding for an exception from a Data Abort, DFSC. */
static void put_dfsc(u32 dfsc)
{
	static const char levels[] = "0123";

	if (dfsc == 0x10) {
		put("synchronous external abort");
		return;
	}
	if (dfsc >= 0x14 && dfsc <= 0x17)
		put("external abort on a table walk, level ");
	else if (dfsc < 0x04)
		put("address size fault, level ");
	else if (dfsc < 0x08)
		put("translation fault, level ");
	else if (dfsc >= 0x09 && dfsc < 0x0c)
		put("access flag fault, level ");
	else if (dfsc >= 0x0d && dfsc < 0x10)
		put("permission fault, level ");
	else if (dfsc == 0x21) {
		put("alignment fault");
		return;
	} else {
		put("DFSC ");
		put_hex(dfsc);
		return;
	}
	put_char(levels[dfsc & 3]);
}

static void put_fault(void)
{
	put("fault: ESR ");
	put_hex(fault_esr.esr);
	put(" (");
	put_dfsc(fault_esr.esr & 0x3f);
	put("), FAR ");
	put_hex(fault_esr.far);
	put_char('\n');
}

static void show_read(const char *what, u64 address)
{
	u32 value;

	put("  read ");
	put_hex(address);
	put(what);
	if (probe_read32(address, &value)) {
		put_fault();
	} else {
		put("= ");
		put_hex(value);
		put_char('\n');
	}
}

static void show_identity(void)
{
	u64 mmfr0, midr, mpidr;
	u32 code, bits;

	asm volatile("mrs %0, id_aa64mmfr0_el1" : "=r"(mmfr0));
	asm volatile("mrs %0, midr_el1" : "=r"(midr));
	asm volatile("mrs %0, mpidr_el1" : "=r"(mpidr));
	put("cpu: MIDR_EL1 ");
	put_hex(midr);
	put(", MPIDR_EL1 ");
	put_hex(mpidr);
	put("\nID_AA64MMFR0_EL1 ");
	put_hex(mmfr0);
	code = mmfr0 & 15;
	bits = parange_bits(code);
	put(": PARange ");
	put_dec(code);
	if (bits) {
		put(", ");
		put_dec(bits);
		put(" bits\n");
	} else {
		put(", reserved\n");
	}
}

static void show_sve(const struct params *p)
{
	u64 pfr0;

	asm volatile("mrs %0, id_aa64pfr0_el1" : "=r"(pfr0));
	if ((pfr0 >> 32 & 15) == 0) {
		put("SVE: none\n");
		return;
	}
	put("SVE: rdvl says ");
	put_dec(sve_bytes() * 8);
	put(" bits");
	if (p) {
		put(", the VM's set is ");
		put_hex(p->sve_vls);
	}
	put_char('\n');
}

static void show_top(const struct params *p)
{
	u64 limit = 1UL << p->ipa_bits, last = limit - 0x1000;
	u32 value = 0;

	put("last page below the IPA limit, at ");
	put_hex(last);
	put(": ");
	if (probe_write32(last, 0x2018070a) || probe_read32(last, &value)) {
		put_fault();
		return;
	}
	put("wrote 0x2018070a, read ");
	put_hex(value);
	put(value == 0x2018070a ? "\n" : ": NOT WHAT WAS WRITTEN\n");
}

static void show_beyond(const struct params *p)
{
	put("beyond the VM's ");
	put_dec(p->ipa_bits);
	put(" bits:\n");
	if (p->ipa_bits < p->host_ipa_bits) {
		show_read(", the first address beyond: ", 1UL << p->ipa_bits);
		show_read(", the last that the host has: ", (1UL << p->host_ipa_bits) - 0x1000);
	}
	if (p->host_ipa_bits < 64)
		show_read(", the first that the host lacks: ", 1UL << p->host_ipa_bits);
}

/* A vCPU's affinity as KVM numbers them: 16 in Aff0, then Aff1 and Aff2 (kernel: reset_mpidr()). */
static u64 affinity(u32 id)
{
	return (id & 15) | (u64)(id >> 4 & 255) << 8 | (u64)(id >> 12 & 255) << 16;
}

static void start_others(const struct params *p)
{
	u32 id;

	for (id = 1; id < p->cpus && id < MAX_CPUS; id++) {
		long ret = hvc3(PSCI_CPU_ON, affinity(id), (u64)secondary_start, (u64)stacks[id] + STACK_BYTES);

		if (ret) {
			put("cpu ");
			put_dec(id);
			put(": PSCI CPU_ON says -");
			put_dec((u64)-ret);
			put_char('\n');
			continue;
		}
		while (!cpu_done[id])	/* one after the other: the console has no lock */
			asm volatile("yield");
	}
}

void secondary_main(u64 stack_top)
{
	u32 id = (u32)((stack_top - (u64)stacks) / STACK_BYTES - 1);
	u64 mpidr;

	asm volatile("mrs %0, mpidr_el1" : "=r"(mpidr));
	put("cpu ");
	put_dec(id);
	put(" is up: MPIDR_EL1 ");
	put_hex(mpidr);
	put_char('\n');
	cpu_done[id] = 1;
}

void guest_unexpected(u64 esr, u64 far, u64 elr)
{
	put("unexpected exception: ESR ");
	put_hex(esr);
	put(", FAR ");
	put_hex(far);
	put(", ELR ");
	put_hex(elr);
	put_char('\n');
}

void guest_main(const struct params *p)
{
	u32 i;

	if (p && (p->magic != PARAMS_MAGIC || p->version != 1))
		p = 0;
	if (p)
		uart = (volatile u32 *)p->uart;
	put("kvm2 demonstration guest\n");
	show_identity();
	if (!p) {
		put("no parameter block: nothing more to show\n");
		show_sve(p);
		return;
	}
	put("IPA size: ");
	put_dec(p->ipa_bits);
	put(" bits; the host could give ");
	put_dec(p->host_ipa_bits);
	put("; granule ");
	put_dec((1UL << p->page_shift) / 1024);
	put("K\n");
	for (i = 0; i < p->nr_ranges; i++) {
		put("RAM: ");
		put_hex(p->ranges[i].base);
		put(", ");
		put_dec(p->ranges[i].size / 1024);
		put(" KiB\n");
	}
	show_sve(p);
	show_top(p);
	show_beyond(p);
	start_others(p);
	put("powering off\n");
}

/*
 * The guest that `kvm2 run` runs on an x86-64 host when it is given none: it has come from real mode to long mode by
 * itself (start_x86.S), shows what the VM looks like from inside, and what happens at the edges of its address space.
 * No library; docs/guest.md has the contract and the parameter block.
 */
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;

struct range {
	u64 base, size;
};

struct params {			/* src/kvm2/board/params.py packs it */
	u64 magic;
	u32 version, size;
	u32 physical_bits, host_physical_bits;
	u32 page_shift, cpus;
	u64 reserved0;
	u64 uart;		/* a port */
	u64 top_base, top_size;
	u32 nr_ranges, reserved;
	struct range ranges[];
};

struct gate {
	u16 offset_low, selector;
	u8 ist, type;
	u16 offset_middle;
	u32 offset_high, zero;
};

#define PARAMS_MAGIC 0x4d524150324d564bUL	/* "KVM2PARM" */
#define PAGE 4096UL
#define WINDOW 0x100000000UL	/* the linear address behind the first 4 GiB: one page that can be put anywhere */
#define PRESENT_WRITABLE_USER 7
#define NOTHING_AT 0xd0000000UL	/* neither RAM nor a device */
#define NO_PORT 0x1234
#define PATTERN 0x2018070a

extern int probe_read32(u64 address, u32 *value);
extern int probe_write32(u64 address, u32 value);
extern const u8 exception_stubs[];

u64 pml4[512] __attribute__((aligned(4096)));
u64 pdpt[512] __attribute__((aligned(4096)));
u64 page_directories[4 * 512] __attribute__((aligned(4096)));
static u64 window_directory[512] __attribute__((aligned(4096)));
static u64 window_table[512] __attribute__((aligned(4096)));
static struct gate idt[32] __attribute__((aligned(16)));

u32 seen_real_cr0, seen_protected_cr0;	/* what start_x86.S saw on its way */
u64 fault_error, fault_address;		/* what its page-fault handler saw */

static u16 uart = 0x3f8;

static void out8(u16 port, u8 value)
{
	asm volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static u8 in8(u16 port)
{
	u8 value;

	asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
	return value;
}

static u32 in32(u16 port)
{
	u32 value;

	asm volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
	return value;
}

static void put_char(char c)
{
	while (!(in8(uart + 5) & 0x20))	/* LSR.THRE */
		;
	out8(uart, (u8)c);
}

#include "print.h"

/* The characters of CPUID's registers, or what other software put there. */
static void put_letters(u32 word)
{
	int i;

	for (i = 0; i < 4; i++, word >>= 8)
		if ((word & 0xff) >= ' ' && (word & 0xff) < 0x7f)
			put_char((char)(word & 0xff));
}

static void cpuid(u32 leaf, u32 *a, u32 *b, u32 *c, u32 *d)
{
	asm volatile("cpuid" : "=a"(*a), "=b"(*b), "=c"(*c), "=d"(*d) : "a"(leaf), "c"(0));
}

static u64 read_cr0(void)
{
	u64 value;

	asm volatile("movq %%cr0, %0" : "=r"(value));
	return value;
}

static u64 read_cr4(void)
{
	u64 value;

	asm volatile("movq %%cr4, %0" : "=r"(value));
	return value;
}

static u64 read_efer(void)
{
	u32 low, high;

	asm volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(0xc0000080));
	return (u64)high << 32 | low;
}

static void set_exceptions_up(void)
{
	struct {
		u16 limit;
		u64 base;
	} __attribute__((packed)) pointer = { sizeof(idt) - 1, (u64)idt };
	u32 i;

	for (i = 0; i < 32; i++) {
		u64 stub = (u64)exception_stubs + 16 * i;

		idt[i] = (struct gate){ (u16)stub, 0x18, 0, 0x8e, (u16)(stub >> 16), (u32)(stub >> 32), 0 };
	}
	asm volatile("lidt %0" : : "m"(pointer));
}

/* Shows physical address `address` at WINDOW, and says where in the window. */
static u64 look_at(u64 address)
{
	pdpt[4] = (u64)window_directory | PRESENT_WRITABLE_USER;
	window_directory[0] = (u64)window_table | PRESENT_WRITABLE_USER;
	window_table[0] = (address & ~(PAGE - 1)) | PRESENT_WRITABLE_USER;
	asm volatile("invlpg (%0)" : : "r"(WINDOW) : "memory");
	return WINDOW + (address & (PAGE - 1));
}

static void put_fault(void)
{
	put("page fault, error code ");
	put_hex(fault_error);
	if (fault_error & 8)
		put(" (a reserved bit is set in a page table)");
	put_char('\n');
}

static void show_modes(void)
{
	put("real mode with CR0 ");
	put_hex(seen_real_cr0);
	put(", protected mode with ");
	put_hex(seen_protected_cr0);
	put(", long mode with ");
	put_hex(read_cr0());
	put(", CR4 ");
	put_hex(read_cr4());
	put(", EFER ");
	put_hex(read_efer());
	put_char('\n');
}

/* The width of physical addresses. */
static u32 show_identity(void)
{
	u32 a, b, c, d, family, model, bits = 36, linear = 32;

	cpuid(0, &a, &b, &c, &d);
	put("cpu: ");
	put_letters(b);
	put_letters(d);
	put_letters(c);
	cpuid(1, &a, &b, &c, &d);
	family = a >> 8 & 15;
	model = a >> 4 & 15;
	if (family == 6 || family == 15)
		model |= a >> 12 & 0xf0;
	if (family == 15)
		family += a >> 20 & 0xff;
	put(", family ");
	put_dec(family);
	put(", model ");
	put_dec(model);
	if (c >> 31) {
		cpuid(0x40000000, &a, &b, &c, &d);
		put("; hypervisor ");
		put_letters(b);
		put_letters(c);
		put_letters(d);
	}
	put_char('\n');
	cpuid(0x80000000, &a, &b, &c, &d);
	if (a >= 0x80000008) {
		cpuid(0x80000008, &a, &b, &c, &d);
		bits = a & 0xff;
		linear = a >> 8 & 0xff;
	}
	put("MAXPHYADDR: ");
	put_dec(bits);
	put(" bits; linear addresses: ");
	put_dec(linear);
	put(" bits\n");
	return bits;
}

/* Writes a word, reads it back, and puts back what was there. */
static void test_word(u64 address)
{
	u64 at = look_at(address);
	u32 before, value = 0;

	put(" ");
	put_hex(address);
	if (probe_read32(at, &before) || probe_write32(at, PATTERN) || probe_read32(at, &value)) {
		put(": ");
		put_fault();
		return;
	}
	probe_write32(at, before);
	put(value == PATTERN ? " ok" : " NOT WHAT WAS WRITTEN");
}

static void show_memory(const struct params *p)
{
	u32 i;

	for (i = 0; i < p->nr_ranges; i++) {
		put("RAM: ");
		put_hex(p->ranges[i].base);
		put(", ");
		put_dec(p->ranges[i].size / 1024);
		put(" KiB; first and last word:");
		test_word(p->ranges[i].base);
		test_word(p->ranges[i].base + p->ranges[i].size - 4);
		put_char('\n');
	}
}

static void show_nothing(void)
{
	u32 value = 0;

	put("port I/O where nothing is, port ");
	put_hex(NO_PORT);
	put(": read ");
	put_hex(in32(NO_PORT));
	put("\nMMIO where nothing is, at ");
	put_hex(NOTHING_AT);
	put(": ");
	if (probe_write32(NOTHING_AT, PATTERN) || probe_read32(NOTHING_AT, &value)) {
		put_fault();
		return;
	}
	put("wrote ");
	put_hex(PATTERN);
	put(", read ");
	put_hex(value);
	put_char('\n');
}

static void show_beyond(u32 bits)
{
	u32 value;
	u64 at;

	if (bits >= 52)		/* a page table has no more bits */
		return;
	at = look_at(1UL << bits);
	put("read ");
	put_hex(1UL << bits);
	put(", the first address beyond MAXPHYADDR: ");
	if (probe_read32(at, &value)) {
		put_fault();
		return;
	}
	put_hex(value);
	put_char('\n');
}

void guest_unexpected(u64 vector, u64 error, u64 rip, u64 cr2)
{
	put("unexpected exception ");
	put_dec(vector);
	put(": error code ");
	put_hex(error);
	put(", RIP ");
	put_hex(rip);
	put(", CR2 ");
	put_hex(cr2);
	put_char('\n');
}

void guest_main(const struct params *p)
{
	u32 bits;

	if (p && (p->magic != PARAMS_MAGIC || p->version != 1))
		p = 0;
	if (p)
		uart = (u16)p->uart;
	set_exceptions_up();
	put("kvm2 demonstration guest for x86-64\n");
	show_modes();
	bits = show_identity();
	if (p)
		show_memory(p);
	else
		put("no parameter block: the RAM is not known\n");
	show_nothing();
	show_beyond(bits);
	put("powering off\n");
}

/* What the test guests share. RAM (the image's base) is given by the compiler's command line. */
typedef unsigned long u64;
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef volatile u64 vu64;

/* Results: OUT[0] values follow; LOG[0] exceptions follow, five words each. One area for each CPU. */
#define OUT(cpu) ((vu64 *)(RAM + 0x200000 + (cpu) * 0x10000))
#define LOG(cpu) ((vu64 *)(RAM + 0x208000 + (cpu) * 0x10000))
#define HEAP (RAM + 0x300000)

#define SYS_GET(name) ({ u64 v_; asm volatile("mrs %0, " #name : "=r"(v_)::"memory"); v_; })
#define SYS_SET(name, value) asm volatile("msr " #name ", %0" ::"r"((u64)(value)) : "memory")
#define ISB() asm volatile("isb" ::: "memory")
#define DSB() asm volatile("dsb sy" ::: "memory")

struct frame { u64 x[31], elr, spsr, esr, far, vector; };

u64 psci(u64 fn, u64 a, u64 b, u64 c);
void system_off(void) __attribute__((noreturn));
void park(void) __attribute__((noreturn));
u64 call_el0(u64 fn, u64 arg, u64 stack);
void leave_el0(void);
void end_el0(void);
void _start(void);
u64 main(u64 cpu, u64 x0);

static inline u64 this_cpu(void) { return SYS_GET(mpidr_el1) & 15; }
static inline void report(u64 value) { vu64 *out = OUT(this_cpu()); out[1 + out[0]] = value; out[0]++; }

/* Where the next exception goes on instead of the instruction behind it; one for each CPU. */
extern vu64 resume[4];
vu64 resume[4];

/* A guest that puts things right and tries again defines it: 1 where it did. */
int fixup(struct frame *f) __attribute__((weak));

/* Every synchronous exception: written down, then stepped over (SVC is already). SVC #0x7f leaves EL0. */
void handle(struct frame *f) {
	u64 cpu = this_cpu(), ec = f->esr >> 26;
	vu64 *log = LOG(cpu), *at = log + 1 + 5 * log[0];
	if (ec == 0x15 && (f->esr & 0xffff) == 0x7f) {
		f->elr = (u64)leave_el0;
		f->spsr = 0x3c5;
		return;
	}
	at[0] = f->vector; at[1] = f->esr; at[2] = f->elr; at[3] = f->far; at[4] = f->spsr;
	if (++log[0] > 1000)
		system_off();
	if (fixup && fixup(f))
		return;
	if (resume[cpu]) {
		f->elr = resume[cpu];
		resume[cpu] = 0;
	} else if (ec != 0x15) {
		f->elr += 4;
	}
}

/* SVE at every length that ZCR_EL1 can give: how long a vector is, and sums and copies that depend on it. */
#include "rt.h"

#define N 1000

asm(".arch_extension sve\n"
    ".globl rdvl, sum, fill_z31, read_z31\n"
    "rdvl: rdvl x0, #1\n ret\n"
    "sum:\n mov x8, #0\n mov z0.d, #0\n whilelt p0.d, x8, x1\n"	/* u64 sum(u64 *values, count) */
    "1: ld1d z1.d, p0/z, [x0, x8, lsl #3]\n add z0.d, p0/m, z0.d, z1.d\n incd x8\n whilelt p0.d, x8, x1\n b.first 1b\n"
    "ptrue p0.d\n uaddv d0, p0, z0.d\n fmov x0, d0\n ret\n"
    "fill_z31: dup z31.b, w0\n ptrue p7.b\n ret\n"
    "read_z31: str z31, [x0]\n ret\n");
u64 rdvl(void), sum(u64 *values, u64 count);
void fill_z31(u64 byte), read_z31(u64 at);

u64 main(u64 cpu, u64 x0) {
	u64 *values = (u64 *)HEAP;
	u8 *z = (u8 *)(HEAP + 0x10000);
	for (u64 i = 0; i < N; i++)
		values[i] = i * i;
	rdvl();					/* fault 0: CPACR_EL1.ZEN is 0 */
	SYS_SET(cpacr_el1, SYS_GET(cpacr_el1) | 3 << 16);
	ISB();
	u64 longest = 0;
	for (u64 len = 0; len < 16; len++) {
		asm volatile("msr s3_0_c1_c2_0, %0\n isb" ::"r"(len));	/* ZCR_EL1 */
		report(rdvl());
		report(sum(values, N));
	}
	/* shorter, and longer again: what lies beyond the shorter length does not come back as it was */
	fill_z31(0xa5);
	read_z31((u64)z);
	longest = rdvl();
	u64 good = 0;
	for (u64 i = 0; i < longest; i++)
		good += z[i] == 0xa5;
	report(good);
	asm volatile("msr s3_0_c1_c2_0, xzr\n isb");
	fill_z31(0x5a);
	asm volatile("msr s3_0_c1_c2_0, %0\n isb" ::"r"(15UL));
	read_z31((u64)z);
	good = 0;
	for (u64 i = 0; i < longest; i++)
		good += i < 16 ? z[i] == 0x5a : z[i] == 0;
	report(good);
	report(SYS_GET(id_aa64pfr0_el1) >> 32 & 15);
	return 0;
}

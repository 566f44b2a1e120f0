/* What the guests that use an interrupt controller share: where its frames are, accesses to them, masks. */
#include "rt.h"

#define GICD 0x08000000UL
#define GICR(cpu) (0x080a0000UL + (cpu) * 0x20000UL)
#define SGI(cpu) (GICR(cpu) + 0x10000UL)
/* Plain loads and stores: with write-back there would be no syndrome for the hypervisor. */
#define R8(address) ({ u32 v_; asm volatile("ldrb %w0, [%1]" : "=r"(v_) : "r"(address) : "memory"); v_; })
#define R32(address) ({ u32 v_; asm volatile("ldr %w0, [%1]" : "=r"(v_) : "r"(address) : "memory"); v_; })
#define R64(address) ({ u64 v_; asm volatile("ldr %0, [%1]" : "=r"(v_) : "r"(address) : "memory"); v_; })
#define W8(address, v) asm volatile("strb %w0, [%1]" ::"r"((u64)(v)), "r"(address) : "memory")
#define W32(address, v) asm volatile("str %w0, [%1]" ::"r"((u64)(v)), "r"(address) : "memory")
#define W64(address, v) asm volatile("str %0, [%1]" ::"r"((u64)(v)), "r"(address) : "memory")
#define GET(name) ({ u64 v_; asm volatile("mrs %0, " name : "=r"(v_)::"memory"); v_; })
#define SET(name, value) asm volatile("msr " name ", %0\n isb" ::"r"((u64)(value)) : "memory")
#define UNMASK() asm volatile("msr daifclr, #3\n isb" ::: "memory")
#define MASK() asm volatile("msr daifset, #3\n isb" ::: "memory")
#define WFI() asm volatile("wfi" ::: "memory")

// The guest programs of the recorded scenarios. One program at a time: assemble with --defsym GUEST_<name>=1.
//
//   aarch64-linux-gnu-as --defsym GUEST_touch=1 -o touch.o guests.s
//   aarch64-linux-gnu-objcopy -O binary -j .text touch.o touch.bin
//
// Position independent, entered at offset 0, with x0 to x7 as the host set them. What a program finds it stores from
// image + 0x2000 on (x29). Then it asks PSCI for SYSTEM_OFF. An exception is noted at image + 0x2800 (ESR, ELR, FAR, offset
// of the vector), and ends the same way. Without PSCI 0.2 a store to 0x0b000000, or 0x0b100000 after an exception, says so.

.arch armv8.3-a+sve

start:
  adr x28, vectors
  msr vbar_el1, x28
  isb
  adr x29, start
  add x29, x29, #2, lsl #12

// ---- devices: a store or load of x2 at [x1]

.ifdef GUEST_mmio_store8
  strb w2, [x1]
.endif
.ifdef GUEST_mmio_store32
  str w2, [x1]
.endif
.ifdef GUEST_mmio_store64
  str x2, [x1]
.endif
.ifdef GUEST_mmio_load32
  ldr w3, [x1]
  str x3, [x29]
.endif
.ifdef GUEST_mmio_load64
  ldr x3, [x1]
  str x3, [x29]
.endif
.ifdef GUEST_mmio_ldrsb
  ldrsb x3, [x1]
  str x3, [x29]
.endif
.ifdef GUEST_mmio_stp
  stp x2, x3, [x1]
.endif
.ifdef GUEST_mmio_str_post
  str w2, [x1], #4
  str x1, [x29]
.endif

// ---- memory

.ifdef GUEST_touch  // read, write, read back
  ldr x3, [x1]
  str x3, [x29]
  str x2, [x1]
  ldr x4, [x1]
  str x4, [x29, #8]
.endif
.ifdef GUEST_load
  ldr x3, [x1]
  str x3, [x29]
.endif
.ifdef GUEST_dirty  // x4 stores, x3 bytes apart
5:
  str x2, [x1]
  add x1, x1, x3
  subs x4, x4, #1
  b.ne 5b
.endif
.ifdef GUEST_touch_spin  // three stores and a load, say so, and stay: somebody looks at the tables
  str x0, [x1]
  str x0, [x2]
  str x0, [x3]
  ldr x5, [x4]
  str x0, [x29]
  movz x21, #0x0b20, lsl #16
  str w0, [x21]
3:
  ldr x6, [x29, #8]
  cbz x6, 3b
.endif
.ifdef GUEST_br
  br x1
.endif

// ---- calls, waiting, exceptions

.ifdef GUEST_hvc
  hvc #0
  str x0, [x29]
.endif
.ifdef GUEST_smc
  smc #0
  str x0, [x29]
.endif
.ifdef GUEST_hvc_imm
  hvc #1
  str x0, [x29]
.endif
.ifdef GUEST_wfi
  wfi
.endif
.ifdef GUEST_spin
3:
  b 3b
.endif
.ifdef GUEST_brk
  brk #7
.endif
.ifdef GUEST_udf
  .word 0
.endif

// ---- what it runs on

.ifdef GUEST_idregs
.set place, 0
.macro note registers:vararg
.irp register, \registers
  mrs x3, \register
  str x3, [x29, #place]
.set place, place + 8
.endr
.endm
  note midr_el1, mpidr_el1, ctr_el0, dczid_el0, currentel, id_aa64mmfr0_el1, id_aa64mmfr1_el1, id_aa64mmfr2_el1
  note id_aa64pfr0_el1, id_aa64pfr1_el1, id_aa64isar0_el1, id_aa64isar1_el1, id_aa64isar2_el1, id_aa64dfr0_el1
  note s3_0_c0_c4_4, sctlr_el1, cntfrq_el0, cpacr_el1, daif
.endif
.ifdef GUEST_sve_vls  // RDVL for each of ZCR_EL1.LEN 0 to 15, then ZCR_EL1
  mrs x3, cpacr_el1
  orr x3, x3, #(3 << 16)
  orr x3, x3, #(3 << 20)
  msr cpacr_el1, x3
  isb
  mov x5, #0
4:
  msr s3_0_c1_c2_0, x5
  isb
  rdvl x4, #1
  str x4, [x29, x5, lsl #3]
  add x5, x5, #1
  cmp x5, #16
  b.ne 4b
  mrs x6, s3_0_c1_c2_0
  str x6, [x29, #128]
.endif
.ifdef GUEST_msr_zcr
  mov x3, #0
  msr s3_0_c1_c2_0, x3
.endif
.ifdef GUEST_pauth  // sign a pointer, authenticate it
  mrs x3, sctlr_el1
  orr x3, x3, #(1 << 31)
  msr sctlr_el1, x3
  isb
  mov x4, #0x1000
  mov x5, #7
  pacia x4, x5
  str x4, [x29]
  autia x4, x5
  str x4, [x29, #8]
.endif
.ifdef GUEST_icc_sre
  mrs x3, s3_0_c12_c12_5
  str x3, [x29]
.endif
.ifdef GUEST_fp
  mrs x3, cpacr_el1
  orr x3, x3, #(3 << 20)
  msr cpacr_el1, x3
  isb
  fmov d0, #1.0
  fmov x4, d0
  str x4, [x29]
.endif

// ---- the end, and exceptions

off:
  movz x0, #0x0008
  movk x0, #0x8400, lsl #16
  hvc #0
  movz x21, #0x0b00, lsl #16
1:
  str w0, [x21]
  b 1b

.balign 0x800
vectors:
.irp offset, 0x000, 0x080, 0x100, 0x180, 0x200, 0x280, 0x300, 0x380, 0x400, 0x480, 0x500, 0x580, 0x600, 0x680, 0x700, 0x780
  .balign 0x80
  movz x27, #\offset
  b handler
.endr
.balign 0x80
handler:
  mrs x26, esr_el1
  mrs x25, elr_el1
  mrs x24, far_el1
  adr x23, start
  add x23, x23, #2, lsl #12
  add x23, x23, #0x800
  str x26, [x23]
  str x25, [x23, #8]
  str x24, [x23, #16]
  str x27, [x23, #24]
  movz x22, #0x0008
  movk x22, #0x8400, lsl #16
  mov x0, x22
  hvc #0
  movz x21, #0x0b10, lsl #16
2:
  str w27, [x21]
  b 2b

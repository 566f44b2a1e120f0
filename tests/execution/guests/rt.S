/* Entry, vectors and exits of the test guests. _start is for every CPU: main(cpu, x0). */
	.arch	armv8-a
	.section .text.start, "ax"
	.globl	_start
_start:	mrs	x9, mpidr_el1
	and	x9, x9, #15
	adrp	x10, stacks
	add	x10, x10, :lo12:stacks
	add	x11, x9, #1
	add	x10, x10, x11, lsl #14
	mov	sp, x10
	adrp	x10, vectors
	add	x10, x10, :lo12:vectors
	msr	vbar_el1, x10
	mov	x10, #(3 << 20)			/* FP and SIMD */
	msr	cpacr_el1, x10
	isb
	mov	x1, x0
	mov	x0, x9
	bl	main
	b	system_off

	.text
	.globl	system_off, psci, park
system_off:
	mov	w0, #0x0008
	movk	w0, #0x8400, lsl #16
	hvc	#0
park:	wfi
	b	park
psci:	hvc	#0				/* u64 psci(fn, a, b, c) */
	ret

/* u64 call_el0(fn, arg, stack): fn(arg) at EL0t until SVC #0x7f; returns its x0. */
	.globl	call_el0
call_el0:
	stp	x29, x30, [sp, #-96]!
	stp	x19, x20, [sp, #16]
	stp	x21, x22, [sp, #32]
	stp	x23, x24, [sp, #48]
	stp	x25, x26, [sp, #64]
	stp	x27, x28, [sp, #80]
	adrp	x9, el0_sp
	mov	x10, sp
	str	x10, [x9, :lo12:el0_sp]
	msr	elr_el1, x0
	msr	sp_el0, x2
	mov	x10, #0x3c0
	msr	spsr_el1, x10
	mov	x0, x1
	eret
	.globl	leave_el0			/* handle() puts this into ELR with EL1h in SPSR */
leave_el0:
	adrp	x9, el0_sp
	ldr	x10, [x9, :lo12:el0_sp]
	mov	sp, x10
	ldp	x19, x20, [sp, #16]
	ldp	x21, x22, [sp, #32]
	ldp	x23, x24, [sp, #48]
	ldp	x25, x26, [sp, #64]
	ldp	x27, x28, [sp, #80]
	ldp	x29, x30, [sp], #96
	ret
	.globl	end_el0
end_el0: svc	#0x7f

	.macro	vector number
	.balign	128
	sub	sp, sp, #288
	stp	x0, x1, [sp]
	mov	x0, #\number
	b	common
	.endm
	.balign	2048
vectors:
	.irp	n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
	vector	\n
	.endr

common:	stp	x2, x3, [sp, #16]
	stp	x4, x5, [sp, #32]
	stp	x6, x7, [sp, #48]
	stp	x8, x9, [sp, #64]
	stp	x10, x11, [sp, #80]
	stp	x12, x13, [sp, #96]
	stp	x14, x15, [sp, #112]
	stp	x16, x17, [sp, #128]
	stp	x18, x19, [sp, #144]
	stp	x20, x21, [sp, #160]
	stp	x22, x23, [sp, #176]
	stp	x24, x25, [sp, #192]
	stp	x26, x27, [sp, #208]
	stp	x28, x29, [sp, #224]
	str	x30, [sp, #240]
	mrs	x1, elr_el1
	mrs	x2, spsr_el1
	mrs	x3, esr_el1
	mrs	x4, far_el1
	stp	x1, x2, [sp, #248]
	stp	x3, x4, [sp, #264]
	str	x0, [sp, #280]
	mov	x0, sp
	bl	handle
	ldp	x1, x2, [sp, #248]
	msr	elr_el1, x1
	msr	spsr_el1, x2
	ldp	x0, x1, [sp]
	ldp	x2, x3, [sp, #16]
	ldp	x4, x5, [sp, #32]
	ldp	x6, x7, [sp, #48]
	ldp	x8, x9, [sp, #64]
	ldp	x10, x11, [sp, #80]
	ldp	x12, x13, [sp, #96]
	ldp	x14, x15, [sp, #112]
	ldp	x16, x17, [sp, #128]
	ldp	x18, x19, [sp, #144]
	ldp	x20, x21, [sp, #160]
	ldp	x22, x23, [sp, #176]
	ldp	x24, x25, [sp, #192]
	ldp	x26, x27, [sp, #208]
	ldp	x28, x29, [sp, #224]
	ldr	x30, [sp, #240]
	add	sp, sp, #288
	eret

	.bss
	.balign	64
el0_sp:	.quad	0
	.balign	4096
stacks:	.skip	0x4000 * 4

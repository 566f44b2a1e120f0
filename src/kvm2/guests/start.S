/* The demonstration guest's entry, vectors and secondary entry. docs/guest.md has the contract. */
	.arch	armv8-a+sve
	.section .text.start, "ax"
	.globl	_start
_start:				/* EL1h, MMU off, DAIF masked, x0 = parameter block or 0 */
	adrp	x9, boot_stack_end
	add	sp, x9, :lo12:boot_stack_end
	adrp	x9, vectors
	add	x9, x9, :lo12:vectors
	msr	vbar_el1, x9
	isb
	bl	guest_main
	b	psci_off

	.globl	secondary_start
secondary_start:		/* PSCI CPU_ON enters here: x0 = context id = top of this CPU's stack */
	mov	sp, x0
	adrp	x9, vectors
	add	x9, x9, :lo12:vectors
	msr	vbar_el1, x9
	isb
	bl	secondary_main
	mov	w0, #0x0002		/* CPU_OFF */
	movk	w0, #0x8400, lsl #16
	hvc	#0
1:	wfi
	b	1b

	.globl	psci_off
psci_off:
	mov	w0, #0x0008		/* SYSTEM_OFF */
	movk	w0, #0x8400, lsl #16
	hvc	#0
1:	wfi
	b	1b

	.globl	hvc3			/* long hvc3(fn, a, b, c): an SMCCC call */
hvc3:	hvc	#0
	ret

	.globl	sve_bytes		/* u64 sve_bytes(void): the longest vector that EL1 gets, in bytes */
sve_bytes:
	mrs	x1, cpacr_el1
	orr	x1, x1, #(3 << 16)	/* ZEN */
	msr	cpacr_el1, x1
	isb
	mov	x1, #0xf
	msr	zcr_el1, x1
	isb
	rdvl	x0, #1
	ret

/* int probe_read32(u64 address, u32 *value) and int probe_write32(u64 address, u32 value): 0, or 1 after a fault, which
 * fault_esr and fault_far describe. The handler steps over the access and says so in w9. */
	.globl	probe_read32
probe_read32:
	mov	w9, #0
	ldr	w10, [x0]
	cbnz	w9, 1f
	str	w10, [x1]
1:	mov	w0, w9
	ret
	.globl	probe_write32
probe_write32:
	mov	w9, #0
	str	w1, [x0]
	mov	w0, w9
	ret

	.balign	2048
vectors:
	.rept	4			/* current EL with SP_EL0: not used */
	b	unexpected
	.balign	128
	.endr
	b	sync			/* current EL with SP_ELx: synchronous */
	.balign	128
	.rept	11
	b	unexpected
	.balign	128
	.endr

sync:	stp	x10, x11, [sp, #-16]!
	mrs	x10, esr_el1
	lsr	x11, x10, #26
	cmp	x11, #0x25		/* data abort taken without a change of EL */
	b.ne	unexpected
	adrp	x9, fault_esr
	add	x9, x9, :lo12:fault_esr
	mrs	x11, far_el1
	stp	x10, x11, [x9]		/* fault_esr, fault_far */
	mrs	x10, elr_el1
	add	x10, x10, #4
	msr	elr_el1, x10
	ldp	x10, x11, [sp], #16
	mov	w9, #1
	eret

unexpected:
	mrs	x0, esr_el1
	mrs	x1, far_el1
	mrs	x2, elr_el1
	bl	guest_unexpected
	b	psci_off

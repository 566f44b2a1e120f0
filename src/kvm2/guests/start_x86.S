/* The x86-64 demonstration guest's way from real mode to long mode, and its exception stubs. docs/guest.md has the
 * contract: real mode, CS:IP at _start (below 64 KiB), EDI = parameter block or 0. */
	.section .text.start, "ax"
	.code16
	.globl	_start
_start:
	cli
	cld
	xorw	%ax, %ax
	movw	%ax, %ds
	movw	%ax, %es
	movw	%ax, %ss
	movl	$boot_stack_end, %esp
	movl	%cr0, %eax
	movl	%eax, seen_real_cr0
	lgdtl	gdt_pointer
	orl	$1, %eax		/* CR0.PE */
	movl	%eax, %cr0
	ljmpl	$0x08, $start32

	.code32
start32:
	movw	$0x10, %ax
	movw	%ax, %ds
	movw	%ax, %es
	movw	%ax, %ss
	movl	%cr0, %eax
	movl	%eax, seen_protected_cr0

	/* Page tables: the first 4 GiB one to one, in 2 MiB pages. The memory is zero. */
	movl	$pdpt + 7, pml4
	movl	$page_directories + 7, %eax
	movl	$pdpt, %ebx
1:	movl	%eax, (%ebx)
	addl	$8, %ebx
	addl	$4096, %eax
	cmpl	$pdpt + 32, %ebx
	jne	1b
	movl	$page_directories, %ebx
	movl	$0x87, %eax		/* present, writable, user, a 2 MiB page */
2:	movl	%eax, (%ebx)
	addl	$8, %ebx
	addl	$0x200000, %eax
	cmpl	$page_directories + 4 * 4096, %ebx
	jne	2b

	movl	%cr4, %eax
	orl	$0x20, %eax		/* PAE */
	movl	%eax, %cr4
	movl	$pml4, %eax
	movl	%eax, %cr3
	movl	$0xc0000080, %ecx	/* EFER */
	rdmsr
	orl	$0x100, %eax		/* LME */
	wrmsr
	movl	%cr0, %eax
	andl	$0x9fffffff, %eax	/* caches on: reset leaves CD and NW */
	orl	$0x80000000, %eax	/* PG */
	movl	%eax, %cr0
	ljmpl	$0x18, $start64

	.code64
start64:
	movl	$boot_stack_end, %esp
	movl	%edi, %edi
	call	guest_main
	jmp	power_off

/* int probe_read32(u64 address, u32 *value) and int probe_write32(u64 address, u32 value): 0, or 1 after a page fault,
 * which fault_error and fault_address describe. */
	.globl	probe_read32
probe_read32:
	movl	(%rdi), %eax
probe_read_end:
	movl	%eax, (%rsi)
	xorl	%eax, %eax
	ret
	.globl	probe_write32
probe_write32:
	movl	%esi, (%rdi)
probe_write_end:
	xorl	%eax, %eax
	ret
probe_faulted:
	movl	$1, %eax
	ret

/* One stub for each exception, 16 bytes apart: `exception_stubs`. Those without an error code push 0. */
	.balign	16
	.globl	exception_stubs
exception_stubs:
	.set	vector, 0
	.rept	32
	.balign	16
	.if	!((vector == 8) || (vector >= 10 && vector <= 14) || (vector == 17) || (vector == 21))
	pushq	$0
	.endif
	pushq	$vector
	jmp	exception
	.set	vector, vector + 1
	.endr

exception:				/* vector, error code, RIP, CS, RFLAGS, RSP, SS */
	pushq	%rax
	cmpq	$14, 8(%rsp)
	jne	1f
	movq	24(%rsp), %rax
	cmpq	$probe_read32, %rax
	je	2f
	cmpq	$probe_write32, %rax
	je	2f
1:	movq	8(%rsp), %rdi
	movq	16(%rsp), %rsi
	movq	24(%rsp), %rdx
	movq	%cr2, %rcx
	andq	$-16, %rsp
	call	guest_unexpected
	jmp	power_off
2:	movq	16(%rsp), %rax
	movq	%rax, fault_error
	movq	%cr2, %rax
	movq	%rax, fault_address
	movq	$probe_faulted, 24(%rsp)
	popq	%rax
	addq	$16, %rsp
	iretq

	.globl	power_off
power_off:				/* docs/guest.md: sleep state 5, as on a PC with an ACPI PM1a block at 0x600 */
	movw	$0x604, %dx
	movw	$0x2000, %ax
	outw	%ax, %dx
1:	hlt
	jmp	1b

	.section .rodata
	.balign	8
gdt:	.quad	0
	.quad	0x00cf9b000000ffff	/* 0x08: 32-bit code */
	.quad	0x00cf93000000ffff	/* 0x10: data */
	.quad	0x00af9b000000ffff	/* 0x18: 64-bit code */
gdt_pointer:
	.word	. - gdt - 1
	.long	gdt
	.section .note.GNU-stack, "", @progbits

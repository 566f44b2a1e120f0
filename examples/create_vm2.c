/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Create a KVM virtual machine: by KVM_CREATE_VM2 where the kernel has it, by KVM_CREATE_VM where it has not.
 *
 *	cc -Wall -Igenerated -o create_vm2 examples/create_vm2.c
 *	./create_vm2 [IPA_BITS]
 *
 * IPA_BITS is the size of the guest's physical address space in bits (arm64); without it the kernel's default is asked
 * for. Exit codes: 0 a VM was made, 1 it was refused, 2 usage, 3 there is no KVM.
 *
 * Nothing here depends on the architecture that it is compiled for: which choices there are is what KVM answers.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "kvm2.h"

/* Younger than the headers of some distributions. */
#ifndef KVM_CAP_VM_TYPES
#define KVM_CAP_VM_TYPES 235
#endif

#define DEFAULT_IPA_BITS 40
#define MIN_IPA_BITS 32
#define MAX_FINDINGS 16

enum { OK, REFUSED, USAGE, ENVIRONMENT };

/* KVM may answer EINTR when a signal arrives while a VM is being made; nothing has happened then. */
static int kvm_ioctl(int fd, unsigned long request, unsigned long arg)
{
	int result;

	do
		result = ioctl(fd, request, arg);
	while (result < 0 && errno == EINTR);
	return result;
}

/* 0 where KVM does not know the capability. */
static int capability(int fd, unsigned long number)
{
	int answer = kvm_ioctl(fd, KVM_CHECK_EXTENSION, number);

	return answer < 0 ? 0 : answer;
}

/*
 * One finding: a program decides by the numbers, a person reads the message. min, max and mask are what this host
 * allows; all are 0 where they say nothing.
 */
static void print_finding(const struct kvm_vm2_finding *finding)
{
	fprintf(stderr, "  %s: attribute %u, byte %u: %llu", finding->error ? strerror(finding->error) : "note",
		(unsigned int)finding->attr_type, (unsigned int)finding->offset, (unsigned long long)finding->value);
	if (finding->min < finding->max)
		fprintf(stderr, ", allowed %llu..%llu", (unsigned long long)finding->min,
			(unsigned long long)finding->max);
	fprintf(stderr, ": %.*s\n", (int)sizeof(finding->message), finding->message);
}

/* The new call: a list of attributes, and room for every reason why it is refused. A VM fd, or -1 and errno. */
static int create_by_list(int kvm, unsigned int ipa_bits)
{
	struct kvm_vm2_finding findings[MAX_FINDINGS];
	struct kvm_create_vm_attr_arm64_physaddr_size size;
	struct kvm_create_vm_attr_report report;
	struct kvm_create_vm2 create;
	__u64 attrs[2];
	unsigned int i, error;
	int vm;

	/* What is reserved must be zero. */
	memset(&size, 0, sizeof(size));
	memset(&report, 0, sizeof(report));
	memset(&create, 0, sizeof(create));

	report.type = KVM_CREATE_VM_ATTR_REPORT;
	report.size = sizeof(report);
	report.records = (uintptr_t)findings;
	report.capacity = MAX_FINDINGS;
	attrs[create.nr_attrs++] = (uintptr_t)&report;

	if (ipa_bits) {
		size.type = KVM_CREATE_VM_ATTR_ARM64_PHYSADDR_SIZE;
		size.physaddr_bits = ipa_bits;
		attrs[create.nr_attrs++] = (uintptr_t)&size;
	}
	create.attrs = (uintptr_t)attrs;

	vm = kvm_ioctl(kvm, KVM_CREATE_VM2, (uintptr_t)&create);
	error = errno;
	if (vm < 0)
		fprintf(stderr, "KVM_CREATE_VM2: %s\n", strerror(error));
	/* count is how many findings there are, which may be more than there was room for. */
	for (i = 0; i < report.count && i < MAX_FINDINGS; i++)
		print_finding(&findings[i]);
	if (report.count > MAX_FINDINGS)
		fprintf(stderr, "  and %u more\n", (unsigned int)report.count - MAX_FINDINGS);
	errno = error;
	return vm;
}

/*
 * The word of the old call on arm64: bits 7:0 are the size, and 0 stands for 40 bits, whatever the host has. An Apple
 * M1 has 36, and so refuses the word 0, too. The answer would be EINVAL without a reason: hence the check.
 */
static int ipa_word(unsigned int ipa_bits, unsigned int limit, unsigned long *type)
{
	unsigned int wanted = ipa_bits ? ipa_bits : DEFAULT_IPA_BITS;

	if (wanted < MIN_IPA_BITS || wanted > limit) {
		fprintf(stderr, "%u bits of guest physical addresses%s: this host allows %u..%u\n", wanted,
			ipa_bits ? "" : " (the default)", MIN_IPA_BITS, limit);
		return -1;
	}
	*type = KVM_VM_TYPE_ARM_IPA_SIZE(ipa_bits);
	return 0;
}

/* The old call. What its one word means differs by architecture; 0 is an ordinary VM on all of them. */
static int create_by_word(int kvm, unsigned int ipa_bits)
{
	int limit = capability(kvm, KVM_CAP_ARM_VM_IPA_SIZE);
	int vm_types = capability(kvm, KVM_CAP_VM_TYPES);
	unsigned long type = 0;
	int vm;

	if (limit > 0) {
		if (ipa_word(ipa_bits, limit, &type))
			return -1;
	} else if (ipa_bits) {
		fprintf(stderr, "%u bits: this host has no choice of the guest physical address size\n", ipa_bits);
		return -1;
	} else if (vm_types && !(vm_types & 1)) {
		fprintf(stderr, "VM type 0: this host has only those of the mask %#x\n", vm_types);
		return -1;
	}
	printf("KVM_CREATE_VM with type %#lx", type);
	if (limit > 0)
		printf(" (the host's limit is %d bits)", limit);
	if (vm_types)
		printf(" (the host's VM types are the mask %#x)", vm_types);
	printf("\n");

	vm = kvm_ioctl(kvm, KVM_CREATE_VM, type);
	if (vm < 0)
		fprintf(stderr, "KVM_CREATE_VM: %s\n", strerror(errno));
	return vm;
}

/* What the VM really got, defaults included; a host that is not arm64 has no such attribute. */
static void print_ipa_size(int vm)
{
	struct kvm_create_vm_attr_arm64_physaddr_size size;
	struct kvm_vm2_attr get;

	memset(&size, 0, sizeof(size));
	memset(&get, 0, sizeof(get));
	get.type = KVM_CREATE_VM_ATTR_ARM64_PHYSADDR_SIZE;
	get.size = sizeof(size);
	get.attr = (uintptr_t)&size;
	if (kvm_ioctl(vm, KVM_VM2_GET_ATTR, (uintptr_t)&get) == 0)
		printf("guest physical addresses: %u bits\n", (unsigned int)size.physaddr_bits);
}

/* A number of bits; -1 where the text is none. */
static int parse_bits(const char *text)
{
	char *end;
	unsigned long value;

	errno = 0;
	value = strtoul(text, &end, 0);
	if (errno || end == text || *end || text[0] == '-' || value > 255)
		return -1;
	return (int)value;
}

int main(int argc, char **argv)
{
	int ipa_bits = argc == 2 ? parse_bits(argv[1]) : 0;
	int kvm, vm, calls, version;

	if (argc > 2 || ipa_bits < 0) {
		fprintf(stderr, "usage: %s [IPA_BITS]\n", argv[0]);
		return USAGE;
	}
	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (kvm < 0) {
		perror("/dev/kvm");
		return ENVIRONMENT;
	}
	version = kvm_ioctl(kvm, KVM_GET_API_VERSION, 0);
	if (version != KVM_API_VERSION) {
		fprintf(stderr, "/dev/kvm: API version %d, expected %d\n", version, KVM_API_VERSION);
		close(kvm);
		return ENVIRONMENT;
	}

	/* A kernel that does not know the call answers EINVAL, which could mean anything: ask first. */
	calls = capability(kvm, KVM_CAP_CREATE_VM2);
	if (calls & KVM_CREATE_VM2_LIST) {
		printf("KVM_CREATE_VM2 (capability %#x)\n", (unsigned int)calls);
		vm = create_by_list(kvm, (unsigned int)ipa_bits);
	} else {
		printf("no KVM_CREATE_VM2 here\n");
		vm = create_by_word(kvm, (unsigned int)ipa_bits);
	}
	if (vm < 0) {
		close(kvm);
		return REFUSED;
	}
	if (calls & KVM_CREATE_VM2_LIST)
		print_ipa_size(vm);
	printf("a VM for up to %d vCPUs\n", capability(vm, KVM_CAP_MAX_VCPUS));
	close(vm);
	close(kvm);
	return OK;
}

"""The virtual interrupt controller, vGICv3 and vGICv2, behind KVM's device API (arch/arm64/kvm/vgic).

`irq` is one interrupt; `state` is the distributor's state and where each interrupt is to go; `cpuif` is a vCPU's CPU
interface, `icc` its system registers. What a guest reads and writes in the frames is in `mmio*`, what userspace sets in
`device*`, and `its*` turns messages into LPIs.
"""

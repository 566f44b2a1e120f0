"""The live judge: Debian's arm64 kernel at EL2 of an emulated machine, with Python and kvm2 inside."""

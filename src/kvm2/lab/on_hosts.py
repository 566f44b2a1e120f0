"""One VM on several hosts: `kvm2 create --on A,B,C`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvm2.errors import EnvironmentFault, KvmError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvm2.abi.findings import Finding
    from kvm2.kvm import Kvm


@dataclass(frozen=True)
class Answer:
    """What one host says: `ok`, or the errno's name and the reason, with every finding; `findings` are notes where the
    host takes the VM."""

    host: str
    ok: bool
    error: str = ""
    reason: str = ""
    findings: tuple[Finding, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = [finding.to_dict() for finding in self.findings]
        return {"host": self.host, "ok": self.ok, "error": self.error, "reason": self.reason, "findings": found}


def on_hosts(
    hosts: Sequence[str], make: Callable[[Kvm], Sequence[Finding]], *, working_caps: bool = False
) -> list[Answer]:
    """Calls `make` with each host's Kvm; it makes the VM, closes it, and returns the notes."""
    return [_ask(host, make, working_caps) for host in hosts]


def _ask(host: str, make: Callable[[Kvm], Sequence[Finding]], working_caps: bool) -> Answer:
    from kvm2.kvm import open as open_host

    try:
        with open_host(host, working_caps=working_caps) as kvm:
            return Answer(host, True, findings=tuple(make(kvm)))
    except KvmError as error:
        return Answer(host, False, error.name, error.reason or str(error.strerror), error.findings)
    except EnvironmentFault as error:
        return Answer(host, False, "environment", str(error))
    except UsageError as error:
        from kvm2.errors import HostError

        if isinstance(error, HostError):
            raise
        return Answer(host, False, "usage", str(error))

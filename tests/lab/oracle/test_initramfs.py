"""What goes into the machine: from packages that are made here."""

from __future__ import annotations

import io
import marshal
import tarfile

import pytest

from kvm2.errors import EnvironmentFault
from kvm2.lab.cpio import Tree
from kvm2.lab.oracle import initramfs
from kvm2.lab.oracle.machine import PACKAGES, application_sources, warm_modules


def test_modules_of_python_without_their_libraries_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = {b"a": ["libz.so.1"], b"b": ["libssl.so.3"]}
    monkeypatch.setattr(initramfs, "needed", lambda data: needs.get(data, []))
    tree = Tree()
    tree.file("usr/lib/aarch64-linux-gnu/libz.so.1", b"z")
    tree.file("usr/lib/python3.11/lib-dynload/zlib.so", b"a")
    tree.file("usr/lib/python3.11/lib-dynload/_ssl.so", b"b")
    initramfs.check_libraries(tree)
    assert "usr/lib/python3.11/lib-dynload/zlib.so" in tree.entries
    assert "usr/lib/python3.11/lib-dynload/_ssl.so" not in tree.entries
    tree.file("usr/bin/python3.11", b"b")
    with pytest.raises(EnvironmentFault, match=r"usr/bin/python3\.11 needs libssl\.so\.3"):
        initramfs.check_libraries(tree)


def test_the_application_is_kvm2_with_what_it_needs_and_nothing_built_here() -> None:
    sources = dict(application_sources())
    assert {path.split("/")[0] for path in sources} == set(PACKAGES)
    assert b"KVM_CREATE_VM2" in sources["kvm2/abi/ioctls.py"] and "kvm2/guests/demo.elf" in sources
    assert not [path for path in sources if "__pycache__" in path or path.endswith(".so")]
    modules = warm_modules()
    assert {"kvm2.lab.worker", "kvm2.cli.run", "kvm2.hosts.kernel"} <= set(modules)
    assert not [name for name in modules if name.startswith("kvm2.softkvm.cpu")]


def test_byte_code_where_this_python_writes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initramfs, "can_compile", lambda: True)
    with tarfile.open(fileobj=io.BytesIO(initramfs.application([("p/m.py", b"x = 1"), ("p/t", b"")]))) as tar:
        assert tar.getnames() == ["p/m.py", "p/__pycache__/m.cpython-311.pyc", "p/t"]
        file = tar.extractfile("p/__pycache__/m.cpython-311.pyc")
        assert file is not None
        data = file.read()
    assert data[4:8] == b"\1\0\0\0", "never compared with its source"
    names: dict[str, int] = {}
    exec(marshal.loads(data[16:]), names)
    assert names["x"] == 1
    monkeypatch.setattr(initramfs, "can_compile", lambda: False)
    with tarfile.open(fileobj=io.BytesIO(initramfs.application([("p/m.py", b"x = 1")]))) as tar:
        assert tar.getnames() == ["p/m.py"]

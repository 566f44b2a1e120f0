"""`kvm2 explain`."""

import json

from click.testing import CliRunner

from kvm2.cli.explain import command


def run(*words):
    return CliRunner().invoke(command, words)


def test_text():
    said = run("0x2c", "--host", "max-4k-6.12")
    assert said.exit_code == 0
    assert said.output.startswith("type 0x2c on max-4k-6.12 (its kernel speaks log2): 44 bits of IPA space")
    assert "delta    0x2\n" in said.output


def test_json():
    said = json.loads(run("0b1100", "--bits", "44", "--json").output)
    assert (said["schema"], said["ok"], said["word"]) == ("kvm2.explain/1", True, 12)
    assert said["words"]["44"]["ps"] == 12


def test_not_a_number():
    assert run("forty").exit_code == 2


def test_every_kind_of_answer_has_words():
    assert "EINVAL (type 0x28 (log2): 40 bits: this host allows 32..36)" in run("40", "--host", "apple-m1").output
    assert "this host gives 52 bits" in run("40", "--host", "max-4k-protected").output
    pointed = run("0x10000", "--host", "type-pointer").output
    assert "the list that it points to decides" in pointed
    assert "the address of a struct kvm_create_vm2" in pointed
    assert "machine type 0x1" in run("1", "--host", "s390x").output.splitlines()[0]

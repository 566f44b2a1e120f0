"""What counts as equal, what leaves both counts, and what a name makes of a difference."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvm2.errors import UsageError
from kvm2.lab.compare import Rule, compare, load_differences, load_untrusted
from kvm2.lab.scenarios import Answer, Scenario, Step

COUNT = 0x603000000013DF1A
STEPS: tuple[Step, ...] = (
    {"op": "create_vm", "id": "vm", "type": 0},
    {"op": "guest", "mem": "m", "off": 0, "name": "g"},
    {"op": "get_reg", "vcpu": "v0", "id": COUNT},
    {"op": "reg_dump", "vcpu": "v0"},
)
GOOD: list[Answer] = [[0, 0], [0, 0], [0, 0, "00"], [0, 0, {"10": "aa", f"{COUNT:x}": "bb"}]]
SCENARIO = Scenario("run/x", STEPS)


def changed(index: int, answer: Answer) -> list[Answer]:
    return [*GOOD[:index], answer, *GOOD[index + 1 :]]


def test_equal_answers() -> None:
    verdict = compare(SCENARIO, GOOD, GOOD, "h")
    assert (verdict.steps, verdict.equal, verdict.named, verdict.untrusted) == (4, 4, 0, 0)


@pytest.mark.parametrize(
    ("index", "answer"),
    [(0, [-1, "EINVAL"]), (0, "skipped"), (0, None), (0, [1, 0]), (2, [0, 0]), (2, [0, 0, "01"]), (3, [0, 0, {}])],
)
def test_any_part_that_differs_is_a_difference(index: int, answer: Answer) -> None:
    (difference,) = compare(SCENARIO, GOOD, changed(index, answer), "h").differences
    assert (difference.step, difference.got, difference.expected, difference.name) == (index, answer, GOOD[index], "")


def test_untrusted_ids_leave_both_counts_and_dumps() -> None:
    rule = Rule(ids=frozenset({COUNT}))
    got = changed(2, [0, 0, "77"])
    got[3] = [0, 0, {"10": "aa", f"{COUNT:x}": "cc"}]
    verdict = compare(SCENARIO, GOOD, got, "h", [rule])
    assert (verdict.steps, verdict.untrusted, verdict.differences) == (3, 1, ())
    got[3] = [0, 0, {"10": "ab", f"{COUNT:x}": "cc"}]
    assert len(compare(SCENARIO, GOOD, got, "h", [rule]).differences) == 1


def test_after_means_the_steps_behind_the_first_such_step() -> None:
    verdict = compare(SCENARIO, GOOD, ["skipped"] * 4, "a64fx-4k", [Rule(host="a64fx-*", after="guest")])
    assert (verdict.steps, verdict.untrusted, [d.step for d in verdict.differences]) == (2, 2, [0, 1])
    assert compare(SCENARIO, GOOD, GOOD, "max", [Rule(host="a64fx-*", after="guest")]).untrusted == 0


def test_globs_and_ops_must_all_hold() -> None:
    assert compare(SCENARIO, GOOD, GOOD, "h", [Rule(sc="run/*", op="guest")]).untrusted == 1
    assert compare(SCENARIO, GOOD, GOOD, "h", [Rule(sc="ipa/*", op="guest")]).untrusted == 0
    assert compare(SCENARIO, GOOD, GOOD, "h", [Rule(sc="run/x")]).untrusted == 4


def test_a_named_difference_still_counts_as_different() -> None:
    rule = Rule(name="no-guest", why="it is so", op="guest")
    verdict = compare(SCENARIO, GOOD, changed(1, [-1, "EIO"]), "h", (), [rule])
    assert (verdict.steps, verdict.equal, verdict.named) == (4, 3, 1)
    assert verdict.differences[0].name == "no-guest"


def test_of_a_dump_every_register_that_differs_needs_a_name() -> None:
    rule = Rule(name="reg-10", why="it is so", ids=frozenset({0x10}))
    one = changed(3, [0, 0, {"10": "zz", f"{COUNT:x}": "bb"}])
    two = changed(3, [0, 0, {"10": "zz", f"{COUNT:x}": "yy"}])
    refused = changed(3, [-1, "EPERM", {"10": "zz", f"{COUNT:x}": "bb"}])
    assert compare(SCENARIO, GOOD, one, "h", (), [rule]).named == 1
    assert compare(SCENARIO, GOOD, two, "h", (), [rule]).named == 0
    assert compare(SCENARIO, GOOD, refused, "h", (), [rule]).named == 0


def test_files_that_do_not_belong_together() -> None:
    with pytest.raises(UsageError, match="do not belong together"):
        compare(SCENARIO, GOOD[:2], GOOD, "h")


def test_untrusted_file(tmp_path: Path) -> None:
    file = tmp_path / "untrusted.json"
    file.write_text('[{"host": "a*", "ids": ["0x10"], "why": "so"}]')
    assert load_untrusted(file) == (Rule(host="a*", ids=frozenset({16}), why="so"),)
    file.write_text('[{"hosts": "a*"}]')
    with pytest.raises(UsageError, match="a rule has the keys"):
        load_untrusted(file)


def test_every_named_difference_has_a_reason(tmp_path: Path) -> None:
    load_differences()
    file = tmp_path / "differences.toml"
    file.write_text('[[difference]]\nname = "x"\n')
    with pytest.raises(UsageError, match="a name and a why"):
        load_differences(file)

"""The HTML report: well-formed, self-contained, complete, and deaf to hostile text."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

from kvm2.lab.compare import Difference, Verdict
from kvm2.lab.conform import Conform, Conformance, Judge, Wanted
from kvm2.lab.conform_html import page
from kvm2.lab.engine import Played
from kvm2.lab.places import place_of
from kvm2.lab.replay import Outcome, Report

SVG = "{http://www.w3.org/2000/svg}"
EVIL = "<script>alert('\"&')</script>"


def parsed(text: str) -> ElementTree.Element:
    """The document as XML, which is stricter than HTML asks for."""
    assert text.startswith("<!DOCTYPE html>\n")
    return ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))


def words(element: ElementTree.Element) -> str:
    return " ".join(" ".join(element.itertext()).split())


def made(verdicts: list[Verdict], **more: object) -> Conformance:
    outcomes = [Outcome(Played(verdict.scenario, (), faults=more.get("faults", ())), verdict) for verdict in verdicts]
    report = Report(EVIL if more.get("evil") else "h", outcomes)
    judge = Judge(EVIL if more.get("evil") else "other", "m")
    return Conformance(report, place_of("apple-m1"), judge, (), (EVIL,) if more.get("evil") else ())


def test_everything_that_differs_is_there() -> None:
    done = Conform(
        Wanted("cortex-a72", "recorded:cortex-a53-4k", only=("sys/*", "run/aarch32*", "regs/dump/none"))
    ).run()
    root = parsed(page(done))
    text = words(root)
    totals = done.report.totals()
    assert f"Differences ({totals['different']})" in text and f"equal ({totals['equal']})" in text
    for verdict in done.report.verdicts:
        assert not verdict.differences or f"{verdict.scenario}: {verdict.equal} of {verdict.steps} steps equal" in text
    assert "aarch32-not-executed" in text and "603000000013c000: " in text  # MIDR_EL1, of a register dump
    assert "QEMU emulator version" in text and "recorded:cortex-a53-4k" in text
    squares = [
        g for g in root.iter("{http://www.w3.org/2000/svg}g") if g.find("{http://www.w3.org/2000/svg}rect") is not None
    ]
    assert len(squares) == len(done.report.verdicts)
    states = [g.find("{http://www.w3.org/2000/svg}rect").get("class") for g in squares]  # type: ignore[union-attr]
    assert sorted(set(states)) == ["different", "equal", "named"]


def test_nothing_comes_from_outside() -> None:
    text = page(Conform(Wanted("cortex-a53-4k", only=("sys/api",))).run())
    assert not re.search(r"<script|<link|<img|@import|url\(|src=", text)
    assert set(re.findall(r'https?://[^"\s]+', text)) == {"http://www.w3.org/2000/svg"}
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    assert "None." in text and '<span class="badge equal">equal</span>' in text


def test_hostile_text_is_text() -> None:
    difference = Difference(EVIL, 0, "raw", EVIL, [0, 0, EVIL], [0, EVIL], EVIL)
    document = page(made([Verdict(EVIL, 3, 0, (difference,))], evil=True, faults=(EVIL,)))
    root = parsed(document)
    assert "<script" not in document
    assert words(root).count("alert(") >= 8
    assert "Went wrong inside" in words(root)


def test_the_badge_says_how_it_went() -> None:
    named = Difference("a/b", 0, "run", "run v0", [0, 0], [1, 0], "known")
    other = Difference("a/b", 1, "run", "run v0", [0, 0], [1, 0])
    for differences, badge in (
        ((), '<span class="badge equal">equal</span>'),
        ((named,), '<span class="badge named">every difference has a name</span>'),
        ((named, other), '<span class="badge different">1 without a name</span>'),
    ):
        document = page(made([Verdict("a/b", 5, 0, differences)]))
        parsed(document)
        assert badge in document
    assert "something went wrong inside" in page(made([Verdict("a/b", 5, 0, ())], faults=("x",)))


def test_a_long_answer_is_cut_and_says_so() -> None:
    long = Difference("a/b", 0, "peek", "peek m", [0, 0, "00" * 5000], [0, 0, "01" * 5000])
    document = page(made([Verdict("a/b", 1, 0, (long,))]))
    assert len(document) < 12000 and "(10010 characters)" in document

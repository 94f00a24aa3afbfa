"""What a test suite of somebody else's that ran in a process of its own says in its JUnit report."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path


def outcomes(report: Path) -> dict[str, str]:
    """What pytest takes to run a test again -> ``passed``, ``skipped`` with the reason, or the end of its failure."""
    found: dict[str, str] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        test = _argument(case.get("classname", ""), case.get("name", ""))
        found[test] = "passed"
        for child in case:
            if child.tag == "skipped":
                found[test] = f"skipped: {child.get('message')}"
            elif child.tag in ("failure", "error"):
                found[test] = (child.text or child.get("message") or "failed")[-1500:]
    return found


def short(test: str) -> str:
    """A test's name as our lists have it: its module or class, and the function."""
    place, _, function = test.partition("[")
    *_, where, name = place.split("::")
    return f"{Path(where).stem}::{name}{'[' * bool(function)}{function}"


def _argument(place: str, name: str) -> str:
    module, _, last = place.rpartition(".")
    if not last.startswith("Test"):
        module, last = place, ""
    return "::".join(part for part in (f"{module.replace('.', '/')}.py", last, name) if part)

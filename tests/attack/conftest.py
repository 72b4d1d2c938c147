"""Attacks with fixed seeds and counts: `make attack` prints what was tried and what held; see docs/reliability.md.

A test takes the fixture `tally` and counts each attempt with `tally.attempt(held, what)`; it fails at its end, with the
first attempts that did not hold, so that all are counted. All tests of this folder are slow and marked `attack`.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "training" / "trainer"))

_SHOWN = 5
_tallies: list["Tally"] = []


class Tally:
    """Attempts of one attack, and how many held."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tried = 0
        self.failures: list[str] = []

    def attempt(self, held: bool, what: object) -> None:
        """Count an attempt; `what` says which it was, in case that it did not hold."""
        self.tried += 1
        if not held:
            self.failures.append(str(what))


@pytest.fixture
def tally(request):
    """Counts attempts, prints the sum at the end of the session, and fails the test if one did not hold."""
    _tallies.append(counted := Tally(request.node.name.removeprefix("test_").replace("_", " ")))
    yield counted
    assert counted.tried, "nothing was tried"
    shown = "; ".join(counted.failures[:_SHOWN])
    assert not counted.failures, f"{len(counted.failures)} of {counted.tried} did not hold: {shown}"


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.attack)
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.timeout(1800))


def pytest_terminal_summary(terminalreporter):
    if _tallies:
        terminalreporter.write_sep("=", "attacks: tried / held")
        for tally in _tallies:
            terminalreporter.write_line(f"{tally.name:<60} {tally.tried:>5} / {tally.tried - len(tally.failures)}")
        tried, failed = sum(t.tried for t in _tallies), sum(len(t.failures) for t in _tallies)
        terminalreporter.write_line(f"{'all':<60} {tried:>5} / {tried - failed}")

"""Runs a repository's tests, inside the sandbox, and reports each by name.

Copied into the sandbox as ``driver.py``, beside the folder ``repository``. The code of a change
runs in the process of its tests, so a change could patch the test framework. Between the tests
therefore stand checks with random names whose outcomes only the host knows: where one that must
fail passes, or is missing, the report is worth nothing. The standard library's unittest alone.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import sys
import types
import unittest
from typing import Any

FAILING = {
    "equal": "self.assertEqual({0}, {0} + 1)",
    "true": "self.assertTrue({0} < 0)",
    "raises": "self.assertRaises(ValueError, lambda: {0})",
    "raise": "raise AssertionError({0})",
    "error": "raise KeyError({0})",
    "in": "self.assertIn({0}, [])",
}
PASSING = {"equal": "self.assertEqual({0}, {0})", "true": "self.assertTrue({0} >= 0)"}


class Report(unittest.TestResult):
    """Outcome by test id."""

    def __init__(self) -> None:
        super().__init__()
        self.outcomes: dict[str, str] = {}
        self.words: dict[str, str] = {}

    def startTest(self, test: unittest.TestCase) -> None:
        """Begin as failed, should it end the process."""
        super().startTest(test)
        self.outcomes[test.id()] = "failed"

    def addSuccess(self, test: unittest.TestCase) -> None:
        """Note a test that passed."""
        if self.outcomes.get(test.id()) != "subtest failed":
            self.outcomes[test.id()] = "passed"

    def addFailure(self, test: unittest.TestCase, err: Any) -> None:
        """Note a test that failed."""
        self.outcomes[test.id()] = "failed"
        self.words[test.id()] = self._exc_info_to_string(err, test)[-2000:]  # type: ignore[attr-defined]

    addError = addFailure

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        """Note a part that failed."""
        if err is not None:
            self.addFailure(test, err)
            self.outcomes[test.id()] = "subtest failed"

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        """Note a test that was left out."""
        self.outcomes[test.id()] = "skipped"

    def addExpectedFailure(self, test: unittest.TestCase, err: Any) -> None:
        """Note a test that failed as it should."""
        self.outcomes[test.id()] = "passed"

    def addUnexpectedSuccess(self, test: unittest.TestCase) -> None:
        """Note a test that passed and should not."""
        self.outcomes[test.id()] = "failed"


def checks(orders: list[tuple[str, str, bool]]) -> list[unittest.TestCase]:
    """Return tests of known outcome.

    Args:
        orders: (name, kind, whether it passes).
    """
    found = []
    for name, kind, passes in orders:
        body = (PASSING if passes else FAILING)[kind].format(random.randrange(1 << 30))
        names: dict[str, Any] = {}
        exec(f"def runTest(self):\n    {body}", names)
        case = types.new_class(name, (unittest.TestCase,), exec_body=lambda ns: None)
        case.runTest = names["runTest"]  # type: ignore[attr-defined]
        case.__module__ = "repository"
        found.append(case())
    return found


def main() -> None:
    """Take an order from the input, run, report on the output."""
    order = json.load(sys.stdin)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path.insert(0, os.path.abspath("repository"))
    for extra in reversed(order["paths"]):
        sys.path.insert(0, os.path.abspath(os.path.join("repository", extra)))
    os.chdir("repository")
    report, loader = Report(), unittest.TestLoader()
    known = checks([tuple(one) for one in order["checks"]])
    half = len(known) // 2
    suite = unittest.TestSuite(known[:half])
    for module in order["modules"]:
        importlib.invalidate_caches()
        suite.addTests(loader.loadTestsFromName(module))
    suite.addTests(known[half:])
    suite.run(report)
    answers.write(json.dumps({"outcomes": report.outcomes, "words": report.words}))
    answers.close()
    os._exit(0)  # threads that tests left behind


if __name__ == "__main__":
    main()

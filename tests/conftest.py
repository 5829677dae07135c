"""The table of faults, at the end of a run that had some."""

from collections import Counter

import pytest

_outcomes: dict[str, Counter] = {}  # row of the table -> outcome -> tests


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
  report = (yield).get_result()
  marker = item.get_closest_marker("fault")
  if marker and (report.when == "call" or report.outcome != "passed"):
    report.user_properties.append(("fault", marker.args[0]))


def pytest_runtest_logreport(report):
  # Of tests that ran in workers the reports are all that comes here.
  for name, row in report.user_properties:
    if name == "fault":
      _outcomes.setdefault(row, Counter())[report.outcome] += 1


def pytest_terminal_summary(terminalreporter):
  if not _outcomes:
    return
  terminalreporter.section("faults")
  width = max(map(len, _outcomes))
  for row, counts in sorted(_outcomes.items()):
    words = ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items()))
    terminalreporter.write_line(f"{row:{width}}  {words}")

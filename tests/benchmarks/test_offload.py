"""The newest plan for 24 GB in benchmarks/results is what the program says now, and the pages have its numbers."""

import json
from pathlib import Path

from benchmarks.offload import report, table

ROOT = Path(__file__).parents[2]


def test_the_newest_results_are_reproduced():
  newest = sorted((ROOT / "benchmarks/results").glob("*-offload-*.json"))[-1]
  found = report(lambda _: None)
  assert found == json.loads(newest.read_text())["results"]
  assert table(found) in newest.with_suffix(".md").read_text()
  for page in ("docs/scale.md", "benchmarks/README.md"):
    text = (ROOT / page).read_text()
    assert newest.with_suffix(".md").name in text
    for one in found[:2]:
      assert str(one["experts_resident"]) in text and f"{one['moved_bytes_per_token'] / 1e9:.3f}" in text

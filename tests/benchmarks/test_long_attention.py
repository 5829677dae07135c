"""Attention over long contexts: what is counted by hand, and that a process measures and the report is written."""

import dataclasses
import json
import subprocess
import sys

from benchmarks import long_attention
from benchmarks.long_attention import LENGTHS, Row, blocks, rows

MACHINE = {"processor": "x", "cores": 2, "memory_gib": 1.0, "accelerator": None, "versions": {"python": "3"}}


def test_blocks_by_hand():
  # 256 keys are four blocks of 64: 1 + 2 + 3 + 4 = 10 causal ones. The steepest of seven slopes, 2^-(4/7) = 0.673, sees
  # (16 + 16.12 + 0.713) / 0.673 = 48.8 keys: its first block, and of each later one the block before it: 1 + 2 + 2 + 2.
  found = blocks(Row(256, 1, True))
  assert found[0]["window"] == 49 and (found[0]["visited"], found[0]["skipped"]) == (7, 3)
  assert found[-1] == {"slope": 0.0, "window": None, "visited": 10, "skipped": 0}


def test_the_windows_leave_what_the_goals_need():
  # Work by blocks at 131,072 tokens, where time is to be a fifth (one global group of eight) and a fifteenth (none).
  for groups, factor in ((1, 5), (0, 15)):
    found = blocks(Row(131_072, groups, True))
    visited = sum(entry["visited"] for entry in found)
    assert visited + sum(entry["skipped"] for entry in found) > factor * visited
    assert all(entry["skipped"] > 0 for entry in found if entry["window"])


def test_rows_are_measured_and_kept(tmp_path):
  measured = []
  for row in (Row(128, 1, True), Row(256, 1, True), Row(256, 1, False)):
    command = [sys.executable, "-m", "benchmarks.long_attention", json.dumps(dataclasses.asdict(row))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    measured.append({"name": row.name, **dataclasses.asdict(row), **json.loads(done.stdout)})
    assert measured[-1]["both_seconds"] > 0 and measured[-1]["both_bytes"] >= measured[-1]["forward_bytes"]
  ratios = long_attention._ratios(measured)
  assert ratios[1]["both_times_faster"] == measured[2]["both_seconds"] / measured[1]["both_seconds"]
  assert "memory_over_half_the_length" in ratios[1] and set(ratios[2]) == {"length", "num_global_groups", "skip"}
  cache = [long_attention._cache(LENGTHS[-1], 0)]
  found = {"rows": measured, "ratios": ratios, "blocks": {"1": blocks(Row(256, 1, True))}, "cache": cache}
  path = long_attention.save(tmp_path, found, MACHINE, "a command")
  assert "nothing skipped" in path.read_text() and json.loads(path.with_suffix(".json").read_text())["rows"] == measured
  assert path.with_suffix(".html").read_text().count("<svg") >= 2


def test_every_length_is_measured_with_skipping():
  assert {row.length for row in rows() if row.skip} == set(LENGTHS)
  assert {row.length for row in rows() if not row.skip} == {one for one in LENGTHS if one <= 131_072}

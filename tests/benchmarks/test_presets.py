"""The table of presets in docs/scale.md is a result file's, and a new one takes its place."""

import re
from pathlib import Path

from benchmarks.presets import BEGIN, END, with_table

ROOT = Path(__file__).parents[2]


def test_a_new_table_takes_the_old_ones_place():
  text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
  assert with_table(text, "| new |") == f"before\n{BEGIN}\n| new |\n{END}\nafter\n"
  assert with_table("no marks\n", "| new |") == "no marks\n"


def test_the_guide_has_the_newest_results():
  newest = sorted((ROOT / "benchmarks/results").glob("*-presets-*.md"), key=lambda path: path.stem)[-1].read_text()
  within = re.search(f"{re.escape(BEGIN)}\n(.*){re.escape(END)}", (ROOT / "docs/scale.md").read_text(), re.S)[1]
  assert within.strip() and within.strip() in newest

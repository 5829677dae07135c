"""Links of the pages lead somewhere, and what they repeat from the code is what the code says."""

import re
from xml.etree import ElementTree

import pytest

from moe_lab import types
from tests.docs.commands import PAGES, ROOT
from tests.test_imports import _LEVELS, _OUTSIDE

ALL = (*PAGES, "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md") + tuple(
  sorted(str(path.relative_to(ROOT)) for path in (ROOT / "experiments").glob("*/*.md"))
)


def anchors(path):
  """Returns the anchors of a page's headings, as GitHub makes them."""
  text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
  titles = re.findall(r"^#{1,6} (.+)$", text, re.M)
  plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title) for title in titles)
  return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in plain}


@pytest.mark.parametrize("page", ALL)
def test_links_lead_somewhere(page):
  path = ROOT / page
  for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
    if link.startswith(("http://", "https://")):
      continue
    name, _, anchor = link.partition("#")
    target = (path.parent / name).resolve() if name else path
    assert target.exists(), f"{page}: {link}"
    if anchor:
      assert anchor in anchors(target), f"{page}: {link}; it has {', '.join(sorted(anchors(target)))}"


def test_every_guide_is_linked_and_in_the_list():
  guides = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
  assert guides == {page for page in PAGES if page.startswith("docs/")}
  assert guides <= set(re.findall(r"\]\((docs/\w+\.md)\)", (ROOT / "README.md").read_text()))


def test_the_glossary_has_the_letters_of_the_code():
  legend = types.__doc__[types.__doc__.index("  B  batch") :]
  letters = set(re.findall(r"(?:^|\s{2,})([A-Z])  \S", legend, re.M))
  glossary = (ROOT / "docs" / "glossary.md").read_text()
  told = dict(re.findall(r"^\| `([A-Z])` \| (.+) \|$", glossary, re.M))
  assert len(letters) > 15 and told.keys() == letters
  for letter, meaning in told.items():
    words = re.sub(r"\[([\w.]+)\]\([^)]*\)", r"`routing/\1`", meaning)
    assert f"{letter}  {words}" in legend, letter


def test_the_table_of_imports_is_that_of_the_test():
  text = (ROOT / "docs" / "architecture.md").read_text()
  rows = re.findall(r"^\| (\d+|from \d+ up) \| (.+?) \|", text, re.M)
  told = {level: re.findall(r"`(\w+)`", names) for level, names in rows}
  assert told == {str(number): level for number, level in enumerate(_LEVELS, 1)} | {"from 5 up": _OUTSIDE}


def test_the_picture_is_a_small_text_with_both_schemes_and_a_title():
  path = ROOT / "docs" / "data_flow.svg"
  text = path.read_text()
  assert len(text) < 10_000 and "prefers-color-scheme: dark" in text and "href" not in text and "script" not in text
  root = ElementTree.fromstring(text)
  names = {element.tag.rpartition("}")[2] for element in root}
  assert {"title", "desc"} <= names

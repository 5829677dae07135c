"""Sources: what they read, in which order, and the one line for each kind of bad input."""

import json
import sys

import pytest
from array_record.python import array_record_module

from moe_lab.data import formats
from moe_lab.data.sources import open_source
from moe_lab.errors import ConfigError


def write_records(path, records):
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  for record in records:
    writer.write(record)
  writer.close()


def error_of(spec) -> str:
  with pytest.raises(ConfigError) as caught:
    open_source(spec)
  line = str(caught.value)
  assert "\n" not in line and line.startswith(f"config.data.sources = {spec!r}: wanted ")
  return line


def test_stdlib_is_the_library_without_tests_or_packages():
  source = open_source("stdlib")
  names = [entry["file"] for entry in source.manifest()]
  assert "json/decoder.py" in names and "pydoc_data/topics.py" in names
  assert names == sorted(names)
  assert not [n for n in names if {"test", "tests", "site-packages", "idle_test"} & set(n.split("/"))]
  assert {entry["license"] for entry in source.manifest()} == {"PSF-2.0"}
  assert all(len(entry["sha256"]) == 64 for entry in source.manifest())
  hashes = [entry["sha256"] for entry in source.manifest()]
  assert len(set(hashes)) == len(hashes)
  assert sum(len(document.text.encode()) for document in source) == sum(e["bytes"] for e in source.manifest())


def test_text_folder_is_read_recursively_in_order(tmp_path):
  (tmp_path / "b").mkdir()
  (tmp_path / "b" / "x.txt").write_text("second")
  (tmp_path / "a.md").write_text("fïrst")
  (tmp_path / "empty.txt").write_text("")
  (tmp_path / ".git").mkdir()
  (tmp_path / ".git" / "index").write_bytes(b"\xff")
  source = open_source(f"text:{tmp_path}")
  assert [tuple(source[i]) for i in range(len(source))] == [("a.md@0", "fïrst"), ("b/x.txt@0", "second")]
  assert source.manifest()[0]["license"] is None and source.manifest()[0]["bytes"] == 6
  assert [d.text for d in open_source(f"text:{tmp_path}/*.md")] == ["fïrst"]
  assert [d.text for d in open_source(f"text:{tmp_path}/a.md")] == ["fïrst"]


@pytest.mark.parametrize("line", ["ein Satz mit Ümlaut\r\n", "é"])
def test_large_text_is_cut_at_line_ends_and_nothing_is_lost(tmp_path, line):
  text = line * (300_000 // len(line.encode()))
  (tmp_path / "big.txt").write_bytes(text.encode())
  source = open_source(f"text:{tmp_path}/big.txt")
  parts = [document.text for document in source]
  assert "".join(parts) == text
  assert 4 <= len(parts) <= 5  # 300,000 / 65,536 = 4.6
  assert max(len(part.encode()) for part in parts) <= formats.MAX_TEXT_BYTES + len(line.encode())
  if line.endswith("\n"):
    assert all(part.endswith("\r\n") for part in parts)


@pytest.fixture
def package(tmp_path, monkeypatch):
  """An installed distribution, `old-plays`, whose package `plays` ships texts."""
  files = {
    "plays/__init__.py": "x = 1",
    "plays/b/lear.md": "Blow, winds",
    "plays/a.txt": "Who's thére?",
    "plays/data.json": "{}",
    "README.md": "not of the package",
    "old_plays-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: old-plays\nVersion: 1.0\n",
    "old_plays-1.0.dist-info/LICENSE.txt": "all rights given",
  }
  for name, text in files.items():
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text, encoding="utf-8")
  record = "".join(f"{name},,\n" for name in [*files, "../../bin/notes.txt"])
  (tmp_path / "old_plays-1.0.dist-info" / "RECORD").write_text(record)
  monkeypatch.syspath_prepend(str(tmp_path))
  return tmp_path


@pytest.mark.parametrize("name", ["old-plays", "old_plays"])
def test_a_package_is_the_texts_that_it_ships(package, name):
  source = open_source(f"package:{name}")
  texts = [("plays/a.txt@0", "Who's thére?"), ("plays/b/lear.md@0", "Blow, winds")]
  assert [tuple(document) for document in source] == texts
  assert "plays" not in sys.modules


def test_packages_that_give_nothing(package):
  assert "python -m pip install --no-deps new-plays" in error_of("package:new-plays")
  assert "a package that is installed" in error_of("package:../plays")
  (package / "plays" / "a.txt").unlink()
  assert "files that can be read" in error_of("package:old-plays")
  (package / "old_plays-1.0.dist-info" / "RECORD").write_text("plays/__init__.py,,\n")
  assert "a package that ships text files (.md, .rst, .txt)" in error_of("package:old-plays")


def test_jsonl_is_a_document_a_line(tmp_path):
  lines = [{"text": "one\u2028two"}, {"id": 3, "text": "thrée\n"}, {"text": ""}]
  path = tmp_path / "a.jsonl"
  path.write_text("\n\n".join(json.dumps(x, ensure_ascii=False) for x in lines), encoding="utf-8")
  source = open_source(f"jsonl:{tmp_path}")
  assert [tuple(document) for document in source] == [("a.jsonl:1", "one\u2028two"), ("a.jsonl:3", "thrée\n")]


def test_array_record_holds_text_or_json(tmp_path):
  write_records(tmp_path / "a.array_record-00000-of-00001", [b"plain", b'{"text": "from json"}', b"{not json", b"last"])
  source = open_source(f"array_record:{tmp_path}")
  assert [document.text for document in source] == ["plain", "from json", "{not json", "last"]
  assert source[3].name == "a.array_record-00000-of-00001[3]"


def test_paths_that_lead_nowhere(tmp_path):
  assert "a file, folder or glob that exists" in error_of(f"text:{tmp_path}/none")
  assert "a glob that matches" in error_of(f"text:{tmp_path}/*.txt")
  assert "*.jsonl file" in error_of(f"jsonl:{tmp_path}")
  (tmp_path / "empty.txt").touch()
  assert "not empty (1 file(s) read)" in error_of(f"text:{tmp_path}")


def test_text_that_is_not_utf8(tmp_path):
  (tmp_path / "a.txt").write_bytes(b"abc\xff")
  assert "'a.txt' has an invalid byte at offset 3" in error_of(f"text:{tmp_path}")


@pytest.mark.parametrize(("line", "fault"), [
  (b'{"text": "a"', "is not JSON"),
  (b'{"txt": "a"}', 'has no string "text"'),
  (b'{"text": 3}', 'has no string "text"'),
  (b'["text"]', "is not an object"),
  (b'{"text": "\\ud800"}', "surrogate"),
  (b"1" * 5000, "is not JSON"),
])  # fmt: skip
def test_broken_jsonl_lines(tmp_path, line, fault):
  (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
  message = error_of(f"jsonl:{tmp_path}/a.jsonl")
  assert "line 2 " in message and fault in message


def test_jsonl_that_is_not_utf8_gives_the_offset_in_the_file(tmp_path):
  (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
  assert "invalid byte at offset 24" in error_of(f"jsonl:{tmp_path}")  # 14 for the first line, then {"text": "


def test_corrupt_array_records(tmp_path):
  path = tmp_path / "a.array_record"
  write_records(path, [b"some text %d" % i for i in range(20)])
  whole = bytearray(path.read_bytes())
  path.write_bytes(whole[: len(whole) // 2])
  assert "'a.array_record': " in error_of(f"array_record:{tmp_path}")
  path.write_bytes(b"not one")
  assert "ArrayRecord files that are whole" in error_of(f"array_record:{tmp_path}")
  path.write_bytes(whole[:40] + bytes(b ^ 85 for b in whole[40:400]) + whole[400:])
  assert "ArrayRecord files that are whole" in error_of(f"array_record:{tmp_path}")
  write_records(path, [b"fine", b"\xff"])
  assert "'a.array_record[1]' has an invalid byte at offset 0" in error_of(f"array_record:{tmp_path}")

import html.parser
import json

import pytest

from moe_lab.errors import UserError
from moe_lab.report.charts import Series, heat_map, line_chart, shares_chart
from moe_lab.report.passage import passage
from moe_lab.report.run_page import write_report
from tests.report.synthetic import TEXT, write_run

HEADINGS = [
  "Loss",
  "Experts against the budget",
  "How many experts, by layer",
  "Which experts: load",
  "By class of token",
  "Where the experts went in a text",
  "How it was made",
]
VOID = {"meta", "br", "img", "input", "link", "hr"}


class Reader(html.parser.HTMLParser):
  """Checks that tags close, and collects what the tests look at."""

  def __init__(self, text):
    super().__init__()
    self.open, self.headings, self.links, self.pictures, self.passage, self.tips = [], [], [], [], "", []
    self.feed(text)
    assert self.open == []

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    self.links += [
      value for name, value in attrs.items() if name in ("src", "href", "srcset", "action", "data", "xlink:href")
    ]
    if tag == "svg" and attrs.get("aria-hidden") != "true":
      self.pictures.append(attrs.get("aria-label"))
      assert attrs["role"] == "img"
    if tag == "span" and "title" in attrs:
      self.tips.append(attrs["title"])
    if tag not in VOID:
      self.open.append((tag, attrs.get("class")))

  def handle_startendtag(self, tag, attrs):
    pass

  def handle_endtag(self, tag):
    assert self.open.pop()[0] == tag

  def handle_data(self, data):
    if self.open and self.open[-1][0] == "h2":
      self.headings.append(data)
    if any(cls == "passage" for _, cls in self.open):
      self.passage += data


def read(path):
  text = path.read_text(encoding="utf-8")
  page = Reader(text)
  assert page.headings == HEADINGS
  assert page.links == [] and "url(" not in text and "@import" not in text
  assert "http" not in text.replace("http-equiv", "")
  assert all(page.pictures)
  return page, text


@pytest.fixture(scope="module")
def full(tmp_path_factory):
  workdir = write_run(tmp_path_factory.mktemp("runs") / "<full>")
  path = write_report(workdir)
  assert path == workdir / "report.html" and path.stat().st_size < 1_500_000
  return read(path)


def test_every_section_has_its_content(full):
  page, text = full
  assert "has been recorded" not in text and "No passage" not in text and "No breakdown" not in text
  assert len(page.pictures) == 8  # loss twice, experts, price, entropy, counts twice, load
  for words in (
    "3.110",
    "1.620 bits/byte",
    "bigram baseline",
    "4.260",
    "2.230 bits/byte",
    "budget 2.00",
    "12.3k tokens/s",
    "4.1M",
    "9.83T",
    "price λ",
    "policy entropy",
    "max/mean load",
    "1 (3)",
    "identifier",
    "routing.k_max",
    "lib/file_3.py",
    "prefers-color-scheme",
  ):
    assert words in text, words


def test_text_is_escaped_and_whole(full):
  page, text = full
  assert page.passage == TEXT
  assert "<b>at</b>" not in text and "&lt;" in text
  assert "<x>" not in text and "<full>" not in text
  assert any("by layer" in tip and "loss" in tip and "nats" in tip for tip in page.tips)


def test_a_run_that_was_only_started(tmp_path):
  page, text = read(write_report(write_run(tmp_path / "r", steps=0)))
  assert page.pictures == []
  assert text.count("recorded") >= 4 and "No passage" in text


def test_a_run_in_its_middle_and_a_fixed_count(tmp_path):
  page, text = read(write_report(write_run(tmp_path / "mid", steps=300, evaluated=False)))
  assert "validation, while training" in text and "No passage" in text and len(page.pictures) == 7
  _, text = read(write_report(write_run(tmp_path / "topk", method="topk")))
  assert "2 experts for every token" in text and "not learned" in text


def test_partial_and_odd_records(tmp_path):
  workdir = write_run(tmp_path / "r", steps=50, evaluated=False)
  with (workdir / "metrics.jsonl").open("a") as file:
    file.write('{"kind": "train", "step": 60, "tokens": 245760, "loss": null}\n{"kind": "train", "st')
  (workdir / "evaluation.json").write_text(
    json.dumps(
      {
        "val_loss": None,
        "by_class": {"</script>": {"tokens": 3}},
        "load": [[], [0.5, 0.5], [0, 0]],
        "passage": [{"text": "\x00\x1b[0m\ud800</div>", "experts": 1.0, "loss": None}, {"text": " no count"}],
      }
    )
  )
  page, text = read(write_report(workdir))
  assert page.passage == "\u2400\u241b[0m\ufffd</div> no count"
  assert "&lt;/script&gt;" in text


def test_a_large_run_stays_small(tmp_path):
  path = write_report(write_run(tmp_path / "r", layers=48, experts=256, steps=100))
  read(path)
  assert path.stat().st_size < 1_500_000


def test_no_run_and_damage(tmp_path):
  with pytest.raises(UserError, match="no run"):
    write_report(tmp_path)
  workdir = write_run(tmp_path / "r", steps=0)
  (workdir / "evaluation.json").write_text("{")
  with pytest.raises(UserError, match="evaluation.json cannot be read"):
    write_report(workdir)
  assert not (workdir / "report.html").exists()


def test_line_chart_puts_values_where_they_belong():
  drawing = line_chart(
    [Series("a", [(0, 0.0), (10, 1.0), (20, None), (30, 1.0), (40, 0.0)], 1)],
    title="t",
    x_label="x",
    y_label="y",
    include_zero=True,
  )
  # 480 x 260 with margins 58, 12, 10, 38; y from 0 to 1.05: 1 lies at 222 - 212 / 1.05 = 20.1.
  # The gap splits the line.
  assert 'd="M58.0 222.0L160.5 20.1M365.5 20.1L468.0 222.0"' in drawing
  assert line_chart([Series("a", [(0, None), (1, 2.0)], 1)], title="t", x_label="x", y_label="y") == ""


def test_long_series_are_thinned_to_their_ends():
  drawing = line_chart([Series("a", [(x, float(x)) for x in range(100_001)], 1)], title="t", x_label="x", y_label="y")
  assert len(drawing) < 20_000
  assert "L468.0" in drawing


def test_shares_and_load():
  drawing = shares_chart([[0, 0.25, 0.75], [0, 1, 1]], title="t")
  assert "layer 0: 1 experts for 25.0%" in drawing and ">1.75<" in drawing and ">1.50<" in drawing
  assert shares_chart([[0, 0]], title="t") == ""
  assert "layer 1, expert 0: 1.50 times" in heat_map([[1, 1], [1.5, 0.5]], title="t", top=2)


def test_a_passage_of_equal_counts():
  text = passage([{"text": "a", "experts": 2.0}, {"text": "b", "experts": 2.0}])
  assert "2.00 experts" in text
  assert passage([]) == ""


def test_what_adapting_changed_comes_first(tmp_path):
  write_run(tmp_path)
  report = {
    "tensors": {"experts": 6},
    "bits_per_weight": 4.25,
    "drift_source": {
      "loss_before": 3.5,
      "loss_after": 3.25,
      "flips": 0.125,
      "flips_by_layer": [0.1, 0.15],
      "tokens": 256785,
    },
    "drift_target": {"loss_before": 4.5, "flips": 0.0625},
    "fewer_experts": {
      "full": {"experts": 4.0, "loss": 3.0},
      "policy": [{"budget": 2.75, "experts": 3.0, "loss": 3.03, "saved": 0.25, "rise": 0.01}],
    },
  }
  (tmp_path / "adaptation.json").write_text(json.dumps(report))
  text = write_report(tmp_path).read_text()
  assert Reader(text).headings[0] == "Against the base"
  section = text[text.index("Against the base</h2>") : text.index("Loss</h2>")]
  for cell in (
    "tensors: experts",
    "4.25",
    "source",
    "target",
    "256,785",
    "0.0625",
    "the policy&#x27;s",
    "+25.00%",
    "+1.00%",
  ):
    assert f">{cell}<" in section, cell
  (tmp_path / "adaptation.json").unlink()
  assert "Against the base" not in write_report(tmp_path).read_text()

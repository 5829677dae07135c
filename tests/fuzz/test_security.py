"""Files that were planted: nothing in them runs, leads outside, or reaches a terminal or a page as more than text."""

import io
import json
import pickle
import shutil
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest

from moe_lab.config import Config
from moe_lab.config.load import of_run
from moe_lab.config.resolve import from_json, to_json
from moe_lab.data.sources import open_source
from moe_lab.errors import UserError, visible
from moe_lab.io.arrays import read_npz
from moe_lab.io.files import dump_json
from moe_lab.io.run import load_run, open_run
from moe_lab.report.run_page import write_report
from moe_lab.report.study_page import study_page
from moe_lab.report.suite_page import suite_page, write_suite
from moe_lab.report.sweep_page import write_sweep_report
from moe_lab.report.sweep_runs import read_sweep, sweep_text
from moe_lab.train.adapter import read_adapter
from tests.experiments.study_records import analysed, study_runs
from tests.fuzz.fuzzing import answered
from tests.report.made_up_suite import made_up_suite
from tests.report.synthetic import write_run
from tests.report.test_sweep_page import write_sweep

SCRIPT = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
ESCAPES = "\x1b[2J\x1b]0;title\x07\x9b31m\rover\x08\x7f"


class Runs:
  """What a pickle calls when it is loaded."""

  def __reduce__(self):
    return sys.exit, (3,)


@pytest.fixture
def workdir(tmp_path):
  workdir = tmp_path / "run"
  open_run(workdir, Config(), fingerprint="ab" * 32, manifest=[], argv=["x"]).close()
  return workdir


@pytest.mark.fault("security: a saved run runs no code")
def test_a_planted_config_file_is_never_run(workdir):
  for name in ("config.py", "sitecustomize.py", "conftest.py", "run.py"):
    (workdir / name).write_text("raise SystemExit(3)")
  for name in ("config.pkl", "state.pickle"):
    (workdir / name).write_bytes(pickle.dumps(Runs()))
  assert load_run(workdir)[0] == of_run(str(workdir)) == Config()
  open_run(workdir, Config(), fingerprint="ab" * 32, manifest=[], argv=["x"]).close()
  write_report(workdir)
  assert not {"config", "sitecustomize"} & {
    name for name, module in sys.modules.items() if str(getattr(module, "__file__", "")).startswith(str(workdir))
  }


@pytest.mark.fault("security: a saved run runs no code")
@pytest.mark.parametrize(
  "text",
  [
    '{"py/object/apply": ["os.system", "false"]}',
    "!!python/object/apply:sys.exit [3]",
    "__import__('sys').exit(3)",
    "[" * 1_000_000,
    '{"model":' * 1_000_000,
    to_json(Config()).replace('"model": {', '"model": {"__class__": "os.system", ', 1),
    to_json(Config()).replace('"dim": 128', '"dim": {"py/reduce": 1}'),
    to_json(Config()).replace('"dim": 128', '"dim": 128, "dim": 64'),
    to_json(Config()).replace('"dim": 128', '"dim": 1e5000'),
  ],
)
def test_a_planted_configuration_is_read_as_json_only(workdir, text):
  with answered("config.json"):
    from_json(text)
    raise AssertionError("it was taken")
  (workdir / "config.json").write_text(text)
  for read in (lambda: load_run(workdir), lambda: of_run(str(workdir))):
    with pytest.raises(UserError):
      read()


@pytest.mark.fault("security: no pickle is loaded")
def test_planted_pickles(tmp_path):
  path = tmp_path / "adapter.npz"
  about = np.array(json.dumps({"format": "moe_lab adapter"}))
  objects = np.array([Runs()], dtype=object)
  np.savez(path, about=about, **{"x/y_a": objects})
  with pytest.raises(UserError, match="it holds a pickle, which may run code"):
    read_adapter(path)
  np.savez(path, about=np.array([Runs()], dtype=object))
  with pytest.raises(UserError, match="pickle"):
    read_adapter(path)
  for data in (pickle.dumps(Runs()), pickle.dumps({"about": Runs()}, protocol=0)):
    path.write_bytes(data)
    with pytest.raises(UserError, match="--adapter=.*wanted an adapter.npz"):
      read_adapter(path)
  kept = io.BytesIO()
  np.save(kept, objects)
  path.write_bytes(kept.getvalue())
  with pytest.raises(UserError, match="--adapter="):
    read_adapter(path)
  np.savez(path, tokens=objects)  # as a skipped batch
  with pytest.raises(ValueError, match="pickle"):
    read_npz(path)


@pytest.mark.fault("security: no pickle is loaded")
def test_no_code_loads_pickles():
  """The package's own sources: arrays are loaded in one place, and nothing that runs code is called on a file."""
  from tests.test_imports import _FILES, _ROOT

  found = []
  for name in _FILES:
    source = (_ROOT / name).read_text()
    words = (
      "np.load(",
      "numpy.load(",
      "allow_pickle",
      "torch.load(",
      "yaml.load(",
      "yaml.unsafe_load",
      "joblib",
      "dill",
    )
    found += [(name, word) for word in words if word in source]
    found += [(name, "import pickle")] if "import pickle" in source or "cloudpickle" in source else []
  assert found == []


@pytest.mark.fault("security: paths stay under their root")
def test_a_package_whose_record_leads_outside(tmp_path, monkeypatch):
  (tmp_path / "secret.txt").write_text("a secret")
  info = tmp_path / "site" / "plays-1.0.dist-info"
  info.mkdir(parents=True)
  (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plays\nVersion: 1.0\n")
  (info / "RECORD").write_text(f"../secret.txt,,\nplays/../../secret.txt,,\n{tmp_path}/secret.txt,,\n")
  monkeypatch.syspath_prepend(str(tmp_path / "site"))
  with pytest.raises(UserError, match="a package that ships text files"):
    open_source("package:plays")


@pytest.mark.fault("security: paths stay under their root")
def test_a_folder_of_data_is_not_left_by_a_link_to_a_folder(tmp_path):
  (tmp_path / "outside").mkdir()
  (tmp_path / "outside" / "secret.txt").write_text("a secret")
  data = tmp_path / "data"
  data.mkdir()
  (data / "a.txt").write_text("mine")
  (data / "link").symlink_to(tmp_path / "outside")
  (data / "round").symlink_to(data)
  (data / "gone.txt").symlink_to(tmp_path / "nothing")
  assert [document.text for document in open_source(f"text:{data}")] == ["mine"]


@pytest.mark.fault("security: paths stay under their root")
@pytest.mark.parametrize("name", ["../outside", "/etc", "..", "", "a/b", 3, None, "a\n"])
def test_a_sweep_whose_runs_lie_elsewhere(tmp_path, name):
  write_sweep(tmp_path / "w", {})
  path = tmp_path / "w" / "sweep.json"
  sweep = json.loads(path.read_text())
  sweep["runs"][0]["name"] = name
  path.write_text(json.dumps(sweep))
  with pytest.raises(UserError, match="a run is called .* wanted the name of a folder"):
    write_sweep_report(tmp_path / "w")


@pytest.mark.fault("security: paths stay under their root")
def test_an_earlier_suite_whose_step_is_a_path(tmp_path):
  workdir = tmp_path / "run"
  workdir.mkdir()
  (workdir / "suite-small.json").write_text(json.dumps({"suite": "small", "step": "/../../../x"}))
  write_suite(workdir, made_up_suite())
  names = {path.name for path in tmp_path.rglob("*")}
  assert names == {"run", "suite-small.json", "suite-small.html", "suite-small.stepunknown.1.json"}


class Active(HTMLParser):
  """What of a page would run or load."""

  def __init__(self, text):
    super().__init__()
    self.found, self.scripts = [], 0
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    self.scripts += tag == "script"
    self.found += [tag] if tag in ("img", "iframe", "object", "embed", "base", "form") else []
    self.found += [name for name, value in attributes if name.startswith("on") or "javascript:" in (value or "")]


def harmless(text: str) -> None:
  page = Active(text)
  assert page.found == [] and page.scripts == 1, (page.found, page.scripts)
  assert "alert(1)" in text and "<script>alert" not in text  # it was there, as text


def poisoned(value: object, keys=True) -> object:
  """Returns the value with a script in every text, and in every key of a dictionary whose keys are data."""
  if isinstance(value, dict):
    return {key: poisoned(item, keys) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [poisoned(item, keys) for item in value]
  return value + SCRIPT if isinstance(value, str) else value


@pytest.mark.fault("security: pages escape what they show")
def test_the_page_of_a_run(tmp_path):
  workdir = write_run(tmp_path / "run")
  info = json.loads((workdir / "run.json").read_text())
  started = info["started"]
  (workdir / "run.json").write_text(json.dumps(poisoned(info) | {"started": started}))
  final = json.loads((workdir / "evaluation.json").read_text())
  final["by_class"] = {name + SCRIPT: entry for name, entry in final["by_class"].items()}
  (workdir / "evaluation.json").write_text(json.dumps(poisoned(final)))
  (workdir / f"suite-{'x'}.json").write_text(json.dumps(poisoned_suite() | {"suite": "x"}))
  harmless(write_report(workdir).read_text())


def poisoned_suite() -> dict:
  suite = json.loads(dump_json(made_up_suite()))
  for one in suite["tasks"].values():
    one["about"] = {SCRIPT: SCRIPT}
  suite["tasks"] = {name + SCRIPT: poisoned(task) for name, task in suite["tasks"].items()}
  return suite | {key: poisoned(suite[key]) for key in ("suite", "method", "command", "code", "retrieve")}


@pytest.mark.fault("security: pages escape what they show")
def test_the_page_of_a_suite():
  harmless(suite_page(poisoned_suite(), SCRIPT))


@pytest.mark.fault("security: pages escape what they show")
def test_the_page_of_a_sweep(tmp_path):
  workdir = write_sweep(tmp_path / "w")
  path = workdir / "sweep.json"
  sweep = json.loads(path.read_text())
  for run in sweep["runs"]:
    run["labels"] = {axis + SCRIPT if axis != "seed" else axis: label + SCRIPT for axis, label in run["labels"].items()}
    run["overrides"] = {SCRIPT: SCRIPT}
    run |= {key: run[key] and run[key] + SCRIPT for key in ("failed", "log")}
  path.write_text(json.dumps(sweep | {key: sweep[key] + SCRIPT for key in ("sweep", "launcher", "command")}))
  harmless(write_sweep_report(workdir).read_text())


@pytest.mark.fault("security: pages escape what they show")
def test_the_page_of_a_study():
  runs = study_runs()
  for run in runs:
    for axis in ("corpus", "arm"):
      run["labels"][axis] += SCRIPT
    for rule in run.get("rules", {}).values():
      if "by_class" in rule:
        rule["by_class"] = {name + SCRIPT: entry for name, entry in rule["by_class"].items()}
    run["notes"] = run["notes"] | {"family": run["notes"]["family"] + SCRIPT}
    run |= {"name": run["name"] + SCRIPT, "failed": run["failed"] and SCRIPT}
    run |= {"alarms": [alarm + SCRIPT for alarm in run.get("alarms", [])]}
  harmless(study_page(analysed(runs) | {"sweep": SCRIPT, "split": SCRIPT, "command": SCRIPT}))


@pytest.mark.fault("security: no escape sequence reaches a terminal")
def test_what_a_model_writes(monkeypatch):
  from experiments import generate

  class Terminal(io.StringIO):
    def isatty(self):
      return self.terminal

  tokens = [SimpleNamespace(text=text, token=1, log_prob=0.0, experts=1.0, finish=None) for text in ("a\tb\n", ESCAPES)]

  class Engine:
    def generate(self, requests):
      yield from ((0, token) for token in tokens)

  model = SimpleNamespace(routing=Config().routing)
  for terminal in (False, True):
    screen = Terminal()
    screen.terminal = terminal
    monkeypatch.setattr(sys, "stderr", screen)
    response = SimpleNamespace(add=lambda token: None)
    generate._stream(model, Engine(), None, response)
    said = screen.getvalue()
    for part in ("\x1b[2J", "\x1b]0", "\x07", "\x9b", "\r", "\x08", "\x7f"):
      assert part not in said
    assert "a\tb\n" in said and "over" in said and ("\x1b[38;5;" in said) == terminal


@pytest.mark.fault("security: no escape sequence reaches a terminal")
def test_what_an_error_repeats(tmp_path, capsys):
  from moe_lab.config import program

  for error in (
    UserError(f"{tmp_path}/{ESCAPES}: no such file\nand more"),
    pickle.loads(pickle.dumps(UserError(ESCAPES))),
  ):
    assert program.explain(error) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and visible(line) == line
  assert visible("tab\tline\né\U0001f600") == "tab\tline\né\U0001f600"


@pytest.mark.fault("security: no escape sequence reaches a terminal")
def test_the_table_of_a_sweep(tmp_path):
  workdir = write_sweep(tmp_path / "w", {})
  sweep = json.loads((workdir / "sweep.json").read_text())
  sweep["runs"][0]["labels"]["arm"] = ESCAPES
  (workdir / "sweep.json").write_text(json.dumps(sweep))
  text = sweep_text(read_sweep(workdir))
  assert "over" in text and visible(text) == text


@pytest.mark.fault("security: JSON that every reader takes")
def test_numbers_that_json_has_not(tmp_path):
  odd = {"a": float("nan"), "b": [float("inf"), -float("inf")], "c": np.array([1, np.nan], np.float32)}
  assert json.loads(dump_json(odd), parse_constant=lambda word: pytest.fail(word)) == {
    "a": None, "b": [None, None], "c": [1.0, None],
  }  # fmt: skip
  workdir = write_run(tmp_path / "run")
  final = json.loads((workdir / "evaluation.json").read_text())
  (workdir / "evaluation.json").write_text(
    json.dumps(final | {"test_loss": float("nan"), "mean_experts": float("inf")})
  )
  text = write_report(workdir).read_text()
  assert ">nan<" not in text and ">inf<" not in text
  shutil.rmtree(workdir)

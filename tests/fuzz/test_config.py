"""Any configuration, as JSON, as overrides on the command line or in a sweep, is resolved or is one line."""

import dataclasses
import json
import typing

from absl import flags
from hypothesis import strategies as st

from moe_lab.config import base_config, command_line
from moe_lab.config.resolve import FIELDS, SECTIONS, from_dict, from_json, to_json
from moe_lab.config.routing import METHODS
from moe_lab.config.schema import Config
from moe_lab.config.sweep import Run, Sweep, axis, product
from tests.fuzz.fuzzing import VALUES, answered, each, examples

WORDS = (
  *METHODS, "auto", "alibi", "rotary", "dense", "ragged", "head", "all", "leave_one_out", "greedy", "ppo", "curvature",
  "softmax_all", "sigmoid", "exactly", "at_most", "stdlib", "text:/x", "synthetic:difficulty", "frozen", "skip",
  "int4", "cosine", "constant", "float32", "bfloat16", "sequence", "global", "none", "zero", "identity", "experts",
)  # fmt: skip
_OF_KIND = {
  bool: st.booleans(),
  int: st.integers(-1, 40) | st.integers(),
  float: st.floats(0, 8) | st.floats() | st.integers(-1, 8),
  str: st.sampled_from(WORDS),
}


def value_of(field: str) -> st.SearchStrategy:
  """Mostly values of the field's kind, and any other."""
  kind = FIELDS[field]
  if typing.get_origin(kind) is tuple:
    sound = st.lists(_OF_KIND[typing.get_args(kind)[0]], max_size=5)
  else:
    sound = _OF_KIND[kind]
  return st.one_of(sound, sound, sound, VALUES)


OVERRIDES = st.lists(st.sampled_from(sorted(FIELDS)).flatmap(lambda f: st.tuples(st.just(f), value_of(f))), max_size=4)


def nested(overrides) -> dict:
  raw = {section: {} for section in SECTIONS}
  for field, value in overrides:
    section, _, name = field.partition(".")
    raw[section][name] = value
  return raw


def same_again(config: Config) -> None:
  assert isinstance(config, Config) and from_json(to_json(config)) == config


@examples(300, 20_000)
def test_fields_as_json(count):
  def check(overrides):
    with answered("config."):
      same_again(from_json(json.dumps(nested(overrides))))

  each(OVERRIDES, count, check)


@examples(200, 10_000)
def test_any_json(count):
  names = st.sampled_from([*SECTIONS, *(field.partition(".")[2] for field in FIELDS)]) | st.text(max_size=5)
  raw = st.dictionaries(names, st.dictionaries(names, VALUES, max_size=3) | VALUES, max_size=6)

  def check(raw):
    with answered("config.json"):
      same_again(from_json(json.dumps(raw)))
    with answered("config."):
      same_again(from_dict(raw))

  each(st.builds(lambda raw, whole: nested([]) | raw if whole else raw, raw, st.booleans()), count, check)


@examples(100, 5000)
def test_any_text(count):
  def check(text):
    with answered("config.json"):
      from_json(text)

  each(st.text(max_size=200), count, check)
  check("[" * 100_000)
  check('{"a":' * 100_000)
  check(to_json(Config())[:-2] + ', "train": {}}')  # the section twice
  check(to_json(Config()).replace('"dim": 128', '"dim": 1' + "0" * 5000))


def parsed(path, arguments: list[str]) -> dict:
  own = flags.FlagValues()
  flags.DEFINE_integer("slots", 1, "", lower_bound=1, flag_values=own)
  flags.DEFINE_enum("mode", "a", ["a", "b"], "", flag_values=own)
  command_line.define(own, {"config", "workdir"})
  argv = ["program", f"--config={path}", "--workdir=w", *arguments]
  return command_line.parse(argv, own, {"config", "workdir"})


@examples(100, 5000)
def test_the_command_line(tmp_path, count):
  path = tmp_path / "config.py"
  path.write_text("from moe_lab.config import base_config\n\ndef get_config():\n  return base_config()\n")
  value = VALUES.map(str) | VALUES.map(repr) | st.sampled_from(WORDS) | st.text(max_size=8)
  override = st.sampled_from(sorted(FIELDS)).flatmap(
    lambda field: st.builds("--config.{}={}".format, st.just(field), value_of(field).map(str) | value)
  )
  other = st.builds(
    "{}{}{}{}".format,
    st.sampled_from(["--", "-", "", "--no", "--config.", "--noconfig.", "--config.train."]),
    st.sampled_from(["slots", "mode", "config", "workdir", "train", "steps", "x", "flagfile", "undefok", "train.stepz"])
    | st.text(max_size=5),
    st.sampled_from(["=", ""]),
    value,
  )

  def check(arguments):
    if any(argument.lstrip("-").startswith(("flagfile=/", "config=")) for argument in arguments):
      return  # files of the machine that this runs on
    with answered():
      same_again(parsed(path, arguments)["config"])

  each(st.lists(override | other, max_size=3), count, check)
  for text in ("(" * 5000, "[" * 100_000, "(1,)" * 5000, "-" * 5000 + "1", "'\0'", "9" * 5000, "1e999,nan", "('a'"):
    check([f"--config.data.sources={text}"])
    check([f"--config.data.weights={text}"])
    check([f"--config.train.steps={text}"])


@examples(100, 5000)
def test_sweeps(count):
  options = st.dictionaries(
    st.text(max_size=4) | st.sampled_from("abc"), OVERRIDES.map(dict), min_size=1, max_size=2
  )  # fmt: skip

  def check(parts):
    with answered("config.", "sweep"):
      runs = product(*(axis(str(number), options) for number, options in enumerate(parts)))
      for config in Sweep(base_config(), runs).configs().values():
        same_again(config)

  each(st.lists(options, min_size=1, max_size=2), count, check)
  for name in ("..", "../x", "a/b", "/etc", "", "a\n", "-rf", ".hidden", "a\0", "\x1b[2J"):
    with answered("sweep: a run is called"):
      Sweep(base_config(), [Run({"x": name}, {})])
      raise AssertionError(name)


def test_a_config_made_in_code_is_as_strict():
  assert dataclasses.is_dataclass(Config)
  shares = {"method": "random_k", "k_max": 2, "budget": 1.5, "count_shares": (1e308, 1e308)}
  with answered("config.routing.budget"):
    from_dict({"routing": shares})
    raise AssertionError("an infinite sum")

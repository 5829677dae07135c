"""The gate between what a user writes and the schema."""

import dataclasses
import json

import pytest

from moe_lab.config import Config, base_config, diff, from_dict, from_json, resolve, to_json
from moe_lab.errors import ConfigError, UserError


def test_the_base_resolves_to_the_schemas_defaults():
  assert resolve(base_config()) == Config()


def test_the_base_is_locked_and_type_safe():
  config = base_config()
  with pytest.raises(AttributeError):
    config.train.stepz = 3
  with pytest.raises(TypeError):
    config.train.steps = "three"


def test_integers_serve_as_floats_and_lists_as_tuples():
  config = from_dict({"train": {"learning_rate": 1}, "data": {"sources": ["text:/x"], "weights": [2]}})
  assert type(config.train.learning_rate) is float
  assert config.data.sources == ("text:/x",)
  assert config.data.weights == (2.0,) and type(config.data.weights[0]) is float


@pytest.mark.parametrize(
  "raw, field, part",
  [
    ({"train": {"stepz": 3}}, "train.stepz", "'train.steps'"),
    ({"trian": {"steps": 3}}, "trian", "'train'"),
    ({"trian": 3}, "trian", "wanted"),
    ({"train": 3}, "train", "train.steps"),
    ({"train": {"steps": True}}, "train.steps", "an integer"),
    ({"train": {"steps": 3.0}}, "train.steps", "an integer"),
    ({"train": {"steps": "3"}}, "train.steps", "'3'"),
    ({"train": {"learning_rate": True}}, "train.learning_rate", "a finite number"),
    ({"train": {"learning_rate": float("inf")}}, "train.learning_rate", "a finite number"),
    ({"train": {"learning_rate": float("nan")}}, "train.learning_rate", "a finite number"),
    ({"train": {"decay": None}}, "train.decay", "a string"),
    ({"model": {"qk_norm": 1}}, "model.qk_norm", "true or false"),
    ({"data": {"sources": "stdlib"}}, "data.sources", "a list, each item a string"),
    ({"data": {"sources": [1]}}, "data.sources", "a list, each item a string"),
    ({"train": {"steps": 0}}, "train.steps", "at least 1"),
    ({"model": {"position": "albi"}}, "model.position", "'alibi'"),
    ({"routing": {"k_max": 99}}, "routing.k_max", "model.num_experts"),
  ],
)
def test_a_mistake_names_the_field_and_what_was_wanted(raw, field, part):
  with pytest.raises(ConfigError) as caught:
    from_dict(raw)
  assert caught.value.field == field
  assert part in str(caught.value) and "\n" not in str(caught.value)


def test_a_config_dict_with_a_foreign_field_does_not_resolve():
  config = base_config().unlock()
  config.train.extra = 1
  with pytest.raises(ConfigError, match="train.extra"):
    resolve(config)


def test_json_round_trip():
  config = from_dict({"data": {"sources": ["text:/é"], "weights": [0.1]}, "train": {"learning_rate": 1e-7}})
  assert from_json(to_json(config)) == config
  assert to_json(config).endswith("}\n")


def test_a_field_younger_than_the_saved_run_takes_its_default():
  raw = dataclasses.asdict(from_dict({"train": {"steps": 7}}))
  del raw["train"]["clip_norm"]
  assert from_json(json.dumps(raw)) == from_dict({"train": {"steps": 7}})


@pytest.mark.parametrize(
  "text",
  [
    "",
    "{",
    "[]",
    "null",
    "{}",
    '{"hidden_size": 768}',
    to_json(Config())[:-20],
    to_json(Config()).replace('"steps"', '"stepz"'),
  ],
)
def test_a_broken_or_foreign_json_is_one_line(text):
  with pytest.raises(UserError) as caught:
    from_json(text, source="runs/a/config.json")
  assert str(caught.value).startswith("runs/a/config.json") and "\n" not in str(caught.value)


def test_diff_lists_the_fields_that_differ():
  other = from_dict({"train": {"steps": 7}, "model": {"qk_norm": False}})
  assert diff(Config(), other) == [("model.qk_norm", True, False), ("train.steps", Config().train.steps, 7)]
  assert diff(other, other) == []

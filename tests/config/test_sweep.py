"""The algebra of sweeps, and the one line for each mistake in a sweep file."""

import pytest

from moe_lab.config import base_config
from moe_lab.config.sweep import Run, Sweep, axis, load_sweep, product, zipped
from moe_lab.errors import ConfigError, UserError

ARMS = axis("arm", {f"topk-{k}": {"routing.method": "topk", "routing.k": k} for k in (1, 2)}, role="fixed")
ARMS += axis("arm", {"dynamic-3": {"routing.budget": 3}}, role="ours")
SEEDS = axis("seed", {str(seed): {"train.seed": seed, "data.seed": seed} for seed in (0, 1)})
SWEEP = Sweep(base_config(), product(ARMS, SEEDS))


def test_product_takes_every_combination():
  assert [run.name for run in SWEEP.runs] == [
    "topk-1-0", "topk-1-1", "topk-2-0", "topk-2-1", "dynamic-3-0", "dynamic-3-1",
  ]  # fmt: skip
  run = SWEEP.runs[3]
  assert run.labels == {"arm": "topk-2", "seed": "1"} and run.notes == {"role": "fixed"}
  assert run.overrides == {"routing.method": "topk", "routing.k": 2, "train.seed": 1, "data.seed": 1}


def test_a_run_resolves_over_the_base_and_leaves_it_alone():
  config = SWEEP.config(SWEEP.runs[5])
  # An integer serves as a float, as in a config file.
  assert config.routing.budget == 3.0 and type(config.routing.budget) is float
  assert (config.train.seed, config.data.seed) == (1, 1)
  assert SWEEP.base.train.seed == 0
  assert SWEEP.config(SWEEP.runs[0]).routing.method == "topk"


def select(sweep, arms=(), seeds=()):
  return [run.name for run in sweep.select({"arms": ("arm", arms), "seeds": ("seed", seeds)}).runs]


def test_select():
  assert select(SWEEP) == [run.name for run in SWEEP.runs]
  assert select(SWEEP, arms=["topk-2"]) == ["topk-2-0", "topk-2-1"]
  assert select(SWEEP, arms=["topk-1", "dynamic-3"], seeds=["1"]) == ["topk-1-1", "dynamic-3-1"]
  with pytest.raises(UserError, match=r"--arms=topk2: wanted some of topk-1, .*did you mean 'topk-2'"):
    select(SWEEP, arms=["topk2"])
  lopsided = Sweep(base_config(), SWEEP.runs[:2] + SWEEP.runs[5:])
  with pytest.raises(UserError, match="--arms=dynamic-3 --seeds=0: wanted at least one run"):
    select(lopsided, arms=["dynamic-3"], seeds=["0"])


def test_mistakes_are_told_where_they_are_made():
  with pytest.raises(UserError, match=r"entry 2 of 2, b: config.routing.methd = 'topk': .*mean 'routing.method'"):
    axis("arm", {"a": {}, "b": {"routing.methd": "topk"}})
  with pytest.raises(ConfigError, match=r"config.train.seed = 7: wanted one value a run, and 0 has 0"):
    product(SEEDS, axis("other", {"x": {"train.seed": 7}}))
  with pytest.raises(UserError, match="2 runs are called 'topk-1'"):
    Sweep(base_config(), ARMS + ARMS[:1])
  # A value is checked when the run is taken, not before.
  wrong = Sweep(base_config(), axis("arm", {"a": {"routing.method": "topq"}}))
  with pytest.raises(ConfigError, match=r"config.routing.method = 'topq': .*'topk'"):
    wrong.config(wrong.runs[0])
  with pytest.raises(UserError, match="a run is called 'text:/x': wanted labels of letters"):
    Sweep(base_config(), axis("corpus", {"text:/x": {}}))


@pytest.mark.parametrize(
  ("overrides", "words"),
  [
    ({"train.stepz": 3}, "config.train.stepz = 3: wanted the name of a field (did you mean 'train.steps'?)"),
    ({"stepz": 3}, "config.stepz = 3: wanted the name of a field (did you mean 'train.steps'?)"),
    ({"train.steps": 0}, "config.train.steps = 0: wanted"),
  ],
)
def test_a_mistake_in_the_seventh_entry_names_it(overrides, words):
  runs = [Run({"arm": f"a{number}"}, overrides if number == 7 else {}) for number in range(1, 9)]
  with pytest.raises(UserError) as caught:
    Sweep(base_config(), runs).configs()
  assert str(caught.value).startswith(f"sweep entry 7 of 8, a7: {words}")


def test_zipped_takes_axes_together():
  rates = axis("rate", {"slow": {"train.learning_rate": 1e-3}, "fast": {"train.learning_rate": 2e-3}})
  runs = zipped(SEEDS, rates)
  assert [run.name for run in runs] == ["0-slow", "1-fast"]
  assert runs[1].overrides == {"train.seed": 1, "data.seed": 1, "train.learning_rate": 2e-3}
  with pytest.raises(UserError, match="zipped parts have 2, 3 runs"):
    zipped(SEEDS, ARMS)


HEAD = "from moe_lab.config import base_config\nfrom moe_lab.config.sweep import Sweep, axis\ndef get_sweep(arg='x'):\n"


def test_a_sweep_file(tmp_path):
  path = tmp_path / "a.py"
  path.write_text(HEAD + "  return Sweep(base_config(), axis('arm', {arg: {'train.steps': 3}}))\n")
  assert load_sweep(str(path)).runs[0].name == "x"
  assert load_sweep(f"{path}:y").runs[0].name == "y"


@pytest.mark.parametrize(
  ("body", "parts"),
  [
    ("return 3", ["get_sweep() returned int", "Sweep(base, runs)"]),
    ("return axis('arm', {'a': {'train.stepz': 3}})", ["config.train.stepz = 3", "'train.steps'"]),
    ("return axis('arm', {'a': {'model.dim': 1 / 0}})", ["a.py:4", "ZeroDivisionError"]),
  ],
)
def test_a_mistake_in_a_sweep_file_is_one_line(tmp_path, body, parts):
  (tmp_path / "a.py").write_text(HEAD + f"  {body}\n")
  with pytest.raises(UserError) as caught:
    load_sweep(f"{tmp_path}/a.py")
  assert "\n" not in str(caught.value) and all(part in str(caught.value) for part in parts), str(caught.value)


def test_a_sweep_file_that_is_not_there(tmp_path):
  (tmp_path / "routing.py").write_text("x = 1\n")
  with pytest.raises(UserError, match="wanted a sweep file FILE.py.*did you mean '.*routing.py'"):
    load_sweep(f"{tmp_path}/ruting.py")
  with pytest.raises(UserError, match="wanted a file that defines get_sweep"):
    load_sweep(f"{tmp_path}/routing.py")

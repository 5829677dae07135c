"""The synthetic task with tagged difficulty: easy, hard but computable, and noise.

    python -m experiments.train --config=configs/difficulty.py:hidden --workdir=runs/difficulty/hidden

The argument names the arm:

  hidden  the count policy reads the hidden state (the default)
  token   it reads the token's embedding only, which says nothing about the class
  noise   a corpus of noise alone, under the budget mode at_most
"""

from moe_lab.config import base_config

ARMS = ("hidden", "token", "noise")


def get_config(arg=None):
  arm = arg or "hidden"
  if arm not in ARMS:
    raise ValueError(f"configs/difficulty.py:{arm}: wanted one of {', '.join(ARMS)}")
  config = base_config()
  config.model.dim = 64
  config.model.num_layers = 2
  config.model.num_kv_heads = 4
  config.model.head_dim = 16
  # Easy tokens are copied from two places back: rotary heads find that place, a slope only prefers what is near.
  config.model.position = "rotary"
  # One layer of experts, so that a count is one decision: with two, the table was learned in one of them and the
  # other one's counts, which had nothing to gain, diluted the answer. The dense layer below is too small to hold it.
  config.model.num_dense_layers = 1
  config.model.dense_dim = 16
  # Experts too small to compute a hard token alone: eight hidden units, where the table has 576 entries.
  config.model.num_experts = 8
  config.model.expert_dim = 8
  config.routing.budget = 1.2
  config.routing.learner = "leave_one_out"  # as measured in experiments/difficulty/LOG.md
  config.routing.second_rollouts = 0.5
  config.routing.warmup_steps = 400
  config.routing.credit_discount = 0.0
  config.data.sources = ("synthetic:difficulty",)
  config.data.vocab_size = 27
  config.data.seq_len = 128
  config.train.steps = 1500
  config.train.batch_size = 32
  config.train.learning_rate = 3e-3
  config.train.eval_every = 500
  config.train.checkpoint_every = 500
  if arm == "token":
    config.routing.policy_input = "token"
  if arm == "noise":
    config.data.sources = ("synthetic:noise",)
    config.data.vocab_size = 24
    config.routing.budget_mode = "at_most"
    config.routing.budget = 2.0  # room to waste: nothing is to be gained, so a good policy leaves it
    config.train.steps = 800
    config.routing.warmup_steps = 200
  return config

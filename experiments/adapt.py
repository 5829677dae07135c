"""Makes a new run of a trained one: in 4 bits, adapted, a mixture of experts of a dense one, or one that spends less.

    python -m experiments.adapt --mode=quantise --base=runs/a --config.adapt.weights=nf4 --workdir=runs/a_nf4
    python -m experiments.adapt --mode=lora --base=runs/a --config.data.sources=text:/french --workdir=runs/a_french
    python -m experiments.adapt --mode=merge --base=runs/a_french --workdir=runs/french
    python -m experiments.adapt --mode=finetune --base=runs/a --config.adapt.router=held --workdir=runs/b
    python -m experiments.adapt --mode=upcycle --base=runs/dense --config.model.num_experts=8 --workdir=runs/moe
    python -m experiments.adapt --mode=retrofit --base=runs/moe --config.routing.budget=2.4 --workdir=runs/lazy

upcycle copies each dense MLP into experts: the same function until it is trained (finetune). retrofit freezes a model
of fixed k and teaches a policy which tokens can do with fewer experts. The configuration is the base's, with overrides
as everywhere. The new run loads in experiments.evaluate and experiments.generate; WORKDIR/adaptation.json says what was
done, how far the choice of experts drifted from the base's, and what fewer experts cost. lora, finetune and retrofit
train as experiments.train does, and go on when started again with the same line.
"""

import sys
from pathlib import Path

from absl import flags

from moe_lab.config import modes, program
from moe_lab.config.load import of_run
from moe_lab.config.schema import Config
from moe_lab.errors import UserError

FLAGS = flags.FlagValues()
flags.DEFINE_enum("mode", None, modes.MODES, "What is made of the base.", flag_values=FLAGS)
flags.DEFINE_string("base", None, "The folder of the run to adapt.", flag_values=FLAGS)
flags.DEFINE_integer("step", None, "Which of its checkpoints; by default the newest.", flag_values=FLAGS)
flags.DEFINE_string(
  "adapter", None, "With --mode=merge: an adapter.npz to merge into the base, in place of its own.", flag_values=FLAGS
)


def main(workdir: Path, config: Config | None = None) -> dict:
  """Returns what was done, and the drift from the base."""
  if FLAGS.mode is None:
    raise UserError(f"--mode: wanted one of {', '.join(modes.MODES)}")
  if config is None or FLAGS.base is None:
    raise UserError("--base: wanted the folder of the run to adapt, as in --base=runs/quickstart")
  if FLAGS.adapter and FLAGS.mode != "merge":
    raise UserError(f"--adapter={FLAGS.adapter}: wanted with --mode=merge only")
  folder = Path(FLAGS.base).expanduser()
  config = modes.adapted(FLAGS.mode, of_run(FLAGS.base), config, folder, FLAGS.adapter)
  from moe_lab.report.run_page import write_report
  from moe_lab.train.base import load_base

  base = load_base(folder, FLAGS.step)
  make = {"quantise": _quantised, "merge": _merged, "upcycle": _upcycled}.get(FLAGS.mode, _trained)
  made = make(base, config, workdir)
  return {"mode": FLAGS.mode} | made | {"report": write_report(workdir), "workdir": workdir}


def _quantised(base, config: Config, workdir: Path) -> dict:
  from moe_lab.adapt.quantise import calibrated
  from moe_lab.data.loader import open_data
  from moe_lab.train.adapted import calibration_batches, drift
  from moe_lab.train.base import check_new, check_readable, check_tokens, with_params, write_run

  check_new(workdir)
  check_readable(base)
  data = open_data(config.data, program.cache_dir())
  check_tokens(base, config, data.fingerprint)
  state, batches = base.state, calibration_batches(data, config)
  params, report = calibrated(base.config, state.params, state.router_state, batches, config.adapt.weights)
  report["drift"] = drift(base, config, params, state.router_state, data)
  write_run(workdir, config, base, with_params(state, params, config), data.manifest, sys.argv, report)
  return report


def _upcycled(base, config: Config, workdir: Path) -> dict:
  from moe_lab.train.adapted import upcycle

  return upcycle(base, config, workdir, program.cache_dir(), sys.argv)


def _merged(base, config: Config, workdir: Path) -> dict:
  from moe_lab.adapt.tensors import tensors
  from moe_lab.train.adapter import read_adapter, with_adapter
  from moe_lab.train.base import check_new, with_params, write_run
  from moe_lab.train.state import plain_params

  check_new(workdir)
  params = base.state.params
  if FLAGS.adapter:
    params = with_adapter(params, read_adapter(Path(FLAGS.adapter).expanduser()))
  params = plain_params(params, config)
  report = {"parameters": sum(leaf.size for leaf in tensors(params).values())}
  write_run(workdir, config, base, with_params(base.state, params, config), base.manifest, sys.argv, report)
  return report


def _trained(base, config: Config, workdir: Path) -> dict:
  from moe_lab.train.adapted import train_adapted

  return train_adapted(base, config, workdir, program.cache_dir(), sys.argv)


if __name__ == "__main__":
  program.run(main, FLAGS)

"""Brings a checkpoint in as a run, or takes a run's model out.

    python -m experiments.convert --from=FOLDER --to=runs/imported        # config.json and safetensors
    python -m experiments.convert --from=MODEL.gguf --to=runs/imported
    python -m experiments.convert --from=runs/imported --to=FOLDER        # for transformers

A run is known by its run.json. Nothing is overwritten. Needs the extra hf: pip install -e '.[hf]'.
"""

import sys
from pathlib import Path

from absl import flags

from moe_lab.config import program
from moe_lab.errors import UserError

FLAGS = flags.FlagValues()
flags.DEFINE_string("from", None, "A run, a folder of Hugging Face files, or a .gguf file.", flag_values=FLAGS)
flags.DEFINE_string("to", None, "The run or the folder to make; new.", flag_values=FLAGS)
flags.DEFINE_string(
  "family",
  None,
  "Of a run: write it as a model of this family (llama, mixtral, ...), or as moe_lab, with a PyTorch file of its own; "
  "by default what it was imported from, or what fits.",
  flag_values=FLAGS,
)
flags.DEFINE_string(
  "dtype", None, "Of a run: float32, bfloat16 or float16; by default as imported, or float32.", flag_values=FLAGS
)
flags.DEFINE_integer("step", None, "Of a run: which checkpoint; by default the newest.", flag_values=FLAGS)


def main() -> dict:
  """Converts; the direction follows from what --from is."""
  paths = {}
  for name in ("from", "to"):
    if not FLAGS[name].value:
      raise UserError(f"--{name}: wanted a path")
    paths[name] = Path(FLAGS[name].value).expanduser()
  source, target = paths["from"], paths["to"]
  if not source.exists():
    raise UserError(f"--from={source}: no such file or folder")
  export = (source / "run.json").is_file()
  for name in ("family", "dtype", "step"):
    if FLAGS[name].value is not None and not export:
      raise UserError(f"--{name}={FLAGS[name].value}: wanted only with --from=RUN")

  from moe_lab.train import convert

  if export:
    options = {name: FLAGS[name].value for name in ("family", "dtype", "step")}
    result = convert.export_run(source, target, **options)
  else:
    result = convert.import_checkpoint(source, target, sys.argv)
  return result | {"from": source, "to": target}


if __name__ == "__main__":
  program.run(main, FLAGS)

"""A checkpoint of another format to a run and back. `interop` knows the formats, and no model; here is the model."""

import contextlib
import dataclasses
import json
import shutil
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from moe_lab.data.tokenizer import RUN_FILES, load_tokenizer
from moe_lab.errors import UserError, did_you_mean
from moe_lab.interop.checkpoint import open_checkpoint
from moe_lab.interop.hf.config import to_raw
from moe_lab.interop.hf.families import FAMILIES
from moe_lab.interop.hf.files import DTYPES, Safetensors, read_json, write
from moe_lab.interop.own import export as own
from moe_lab.interop.own import tokenizer as own_tokenizer
from moe_lab.interop.tensors import places, read_params, tensors
from moe_lab.io.checkpoint import Checkpointer
from moe_lab.io.files import open_up
from moe_lab.io.run import CARRIED, load_run, open_run
from moe_lab.train.load import LoadedModel, load_model
from moe_lab.train.optimizer import make_optimizer
from moe_lab.train.state import abstract_state, plain_params, state_of


def import_checkpoint(source: Path, workdir: Path, argv: list[str]) -> dict:
  """Makes a run of a checkpoint, at step 0.

  Args:
    source: a folder of Hugging Face files, or a .gguf file.
    workdir: the run's; new or empty.
    argv: the command, for the record.

  Returns:
    What was converted: family, tensors, parameters.

  Raises:
    UserError: it cannot be imported, or `workdir` is taken; nothing was written then.
  """
  check_free(workdir)
  found = open_checkpoint(source)
  config = found.config
  if found.tokenizer is not None:
    data = dataclasses.replace(config.data, tokenizer=str(workdir.absolute() / found.tokenizer.file_name))
    config = dataclasses.replace(config, data=data)
  shapes = {path: leaf.shape for path, leaf in flatten_dict(abstract_state(config).params, sep="/").items()}
  params = read_params(found.rows, shapes, found.reader, found.needless)
  record = {
    "family": found.family,
    "tensors": len(places(found.rows, shapes)),
    "parameters": sum(param.size for param in params.values()),
    "dtype": found.dtype,
  }
  for path in params:  # one by one, so that there is never a second copy of all
    params[path] = jnp.asarray(params[path])
  state = state_of(config, unflatten_dict(params, sep="/"), make_optimizer(config.train))
  fingerprint = found.tokenizer.fingerprint if found.tokenizer is not None else ""
  files = [{"name": path.name, "bytes": path.stat().st_size} for path in found.reader.files]
  with open_run(workdir, config, fingerprint=fingerprint, manifest=[], argv=argv) as run:
    run.note(imported=record | {"files": files})
    if found.tokenizer is not None:
      (workdir / found.tokenizer.file_name).write_bytes(found.tokenizer.model)
    folder = workdir / CARRIED
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(found.raw, indent=2) + "\n", encoding="utf-8")
    for name, content in found.carried.items():
      (folder / name).write_bytes(content)
    with Checkpointer(workdir, keep=1) as checkpointer:
      checkpointer.save(0, state, {"fingerprint": fingerprint})
  return record


def export_run(workdir: Path, folder: Path, *, family: str | None, dtype: str | None, step: int | None) -> dict:
  """Writes a run's model as a folder that transformers loads: what is in 4 bits unpacked, adapters merged.

  Args:
    workdir: of the run.
    folder: to write; new or empty.
    family: of `hf/families.py`, or moe_lab: our own PyTorch file; None: the one it was imported from, another that
      fits, or moe_lab.
    dtype: float32 | bfloat16 | float16; None: that of the import, or float32.
    step: which checkpoint; None: the newest.

  Returns:
    What was converted: family, tensors, parameters, files.

  Raises:
    UserError: it cannot be exported so, or `folder` is taken; nothing was written then.
  """
  check_free(folder)
  _, info = load_run(workdir)
  imported = info.get("imported", {})
  original = read_json(workdir / CARRIED / "config.json") if imported else {}
  loaded = load_model(workdir, step)
  plain = plain_params(loaded.params, loaded.config)
  params = {path: np.asarray(leaf) for path, leaf in flatten_dict(plain, sep="/").items()}
  known = (*FAMILIES, own.MODEL_TYPE)
  if family is not None and family not in known:
    raise UserError(f"--family={family}: wanted one of {', '.join(known)}{did_you_mean(family, known)}")
  family, raw = _fitting(loaded, params, family, imported.get("family"), original)
  if family == own.MODEL_TYPE:
    state = loaded.router_state
    threshold = state.method.get("threshold", state.count_shift)
    params = own.with_routing(params, state.bias_E, threshold.reshape(threshold.shape[0], -1), loaded.config)
    rows = own.rows({path: param.shape for path, param in params.items()})
  else:
    rows = FAMILIES[family].rows
  dtype = dtype or imported.get("dtype", "float32")
  if dtype not in DTYPES.values():
    raise UserError(
      f"--dtype={dtype}: wanted one of {', '.join(DTYPES.values())}{did_you_mean(dtype, DTYPES.values())}"
    )
  raw |= {"dtype": dtype, "torch_dtype": dtype}  # the key's name before and since transformers 5
  raw.pop("transformers_version", None)

  sizes = {place.name: place.shape for place in places(rows, {path: param.shape for path, param in params.items()})}
  with _whole_or_absent(folder) as unfinished:
    files = write(unfinished, sizes, ((place.name, tensor) for place, tensor in tensors(rows, params)), dtype)
    written = Safetensors(unfinished)
    assert {name: written.shape(name) for name in written.names} == sizes, "tensors that were not written"
    (unfinished / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    _carry(workdir, unfinished, loaded.config.data.vocab_size)
    if family == own.MODEL_TYPE:
      shutil.copyfile(own.MODELING, unfinished / own.MODELING.name)
  return {
    "family": family,
    "tensors": len(sizes),
    "parameters": sum(param.size for param in params.values()),
    "dtype": dtype,
    "files": files,
  }


def check_free(folder: Path) -> None:
  """Raises UserError unless there is nothing, or an empty folder, at a path."""
  if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
    raise UserError(f"--to={folder}: it is there already; wanted the name of a new folder")


@contextlib.contextmanager
def _whole_or_absent(folder: Path):
  """Yields a folder that becomes `folder` if all goes well, and is removed otherwise."""
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
  except OSError as error:
    raise UserError(f"--to={folder} cannot be written: {error.strerror}") from None
  try:
    yield unfinished
    for path in (unfinished, *unfinished.rglob("*")):  # mkdtemp makes private ones, and so does safetensors
      open_up(path)
    if folder.is_dir():
      folder.rmdir()  # it is empty
    unfinished.rename(folder)
  except BaseException:
    shutil.rmtree(unfinished, ignore_errors=True)
    raise


def _fitting(loaded: LoadedModel, params, asked: str | None, first: str | None, original) -> tuple[str, dict]:
  """Returns the family to write, and its config.json."""
  if asked != own.MODEL_TYPE and np.any(loaded.router_state.bias_E):  # which only our own file has a place for
    if asked is not None:
      raise UserError(f"--family={asked}: wanted {own.MODEL_TYPE}, since the choice of experts has a balance bias")
    asked = own.MODEL_TYPE
  if asked in FAMILIES:
    return asked, to_raw(loaded.config, FAMILIES[asked], original if asked == first else {})
  if asked is None:
    for name in sorted(FAMILIES, key=lambda name: name != first):
      try:
        return name, to_raw(loaded.config, FAMILIES[name], original if name == first else {})
      except UserError:
        continue
  return own.MODEL_TYPE, own.to_raw(loaded.config, params, loaded.budget)


def _carry(workdir: Path, folder: Path, vocab_size: int) -> None:
  """Copies what came with an imported model, or writes a run's own tokenizer in the formats that are read there."""
  carried = [path for path in sorted((workdir / CARRIED).glob("*")) if path.name != "config.json"]
  for path in carried:
    shutil.copyfile(path, folder / path.name)
  model = workdir / RUN_FILES[0]
  if not carried and model.is_file():
    for name, content in own_tokenizer.files(load_tokenizer(str(model), vocab_size)).items():
      (folder / name).write_bytes(content)

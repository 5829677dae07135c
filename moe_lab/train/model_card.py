"""The model card of an export: README.md, as the hub reads it, of what the run has on record and nothing else."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moe_lab.config.schema import Config
from moe_lab.errors import UserError
from moe_lab.evaluate.flops import forward_flops_per_token
from moe_lab.interop.own.export import MODEL_TYPE
from moe_lab.io.record import code
from moe_lab.io.run import load_run
from moe_lab.io.writers import read_metrics
from moe_lab.strict_json import parse
from moe_lab.train.state import parameter_counts

NAME = "README.md"
_MOST_FILES = 20  # of a source, told one by one; of more a hash of their hashes


class Export(NamedTuple):
  """What is written.

  Attributes:
    name: of the folder.
    family: whose format it has.
    dtype: of its tensors.
    step: of the checkpoint.
    params: the model's, without adaptation.
    has_tokenizer: whether one goes with it.
    budget: mean experts that the model is asked for.
  """

  name: str
  family: str
  dtype: str
  step: int
  params: Any
  has_tokenizer: bool
  budget: float


def model_card(workdir: Path, export: Export) -> str:
  """Returns the card of a run's model; what the run does not know is said to be unknown.

  Raises:
    UserError: the run's records cannot be read.
  """
  config, info = load_run(workdir)
  sources = info.get("data") or []
  licences = _licences(sources)
  known = next(iter(licences)) if len(licences) == 1 and None not in licences else None
  sections = {
    "Architecture": _architecture(config, export),
    "Routing": _routing(config, export),
    "Training data": _data(sources, known),
    "Compute": _compute(workdir, export.step),
    "Evaluation": _evaluation(workdir, export.step),
    "Limits": _limits(config, info, export),
    "How to load it": _loading(config, export),
    "Where it comes from": _origin(workdir, info, export),
  }
  body = "".join(f"\n## {title}\n\n{text.rstrip()}\n" for title, text in sections.items())
  return f"{_front(config, known)}\n# {export.name}\n\n{_what(config, info, export)}\n{body}"


def _front(config: Config, licence: str | None) -> str:
  mixture = config.model.num_dense_layers < config.model.num_layers
  tags = ["moe_lab", *(["mixture-of-experts"] if mixture else [])]
  tags += ["dynamic-routing"] if config.routing.learns_counts else []
  fields = {"library_name": "transformers", "pipeline_tag": "text-generation"}
  if licence:  # by name: of the hub's own list an SPDX name may be missing
    fields |= {"license": "other", "license_name": licence.lower()}
  lines = [f"{key}: {json.dumps(value)}" for key, value in (fields | {"tags": tags}).items()]  # JSON is YAML too
  return "\n".join(["---", *lines, "---", ""])


def _what(config: Config, info: Mapping, export: Export) -> str:
  dense = config.model.num_dense_layers == config.model.num_layers
  kind = "dense" if dense else "mixture-of-experts"
  text = f"A decoder-only {kind} language model, written by moe_lab from step {export.step} of a run."
  if imported := info.get("imported"):
    text += f" Its first weights are those of an imported {imported.get('family', 'unknown')} checkpoint."
  if base := info.get("base"):
    text += f" The run was made of step {base.get('step')} of the run `{Path(str(base.get('workdir'))).name}`."
  return text


def _architecture(config: Config, export: Export) -> str:
  model = config.model
  total, active = parameter_counts(export.params, config, export.budget)
  mixtures = model.num_layers - model.num_dense_layers
  rows = [
    ("parameters", f"{total:,}"),
    ("of them active for a token, at its mean number of experts", f"{active:,}"),
    ("width", model.dim),
    ("layers", f"{model.num_layers}, {mixtures} with experts"),
    ("heads, key/value heads, head width", f"{model.num_heads}, {model.num_kv_heads}, {model.head_dim}"),
  ]
  if mixtures:
    rows.append(("experts a layer, their hidden width", f"{model.num_experts}, {model.expert_dim}"))
  if model.num_dense_layers:
    rows.append(("hidden width of the dense layers", model.dense_dim))
  if model.shared_width:
    rows.append(("hidden width of what every token takes beside its experts", model.shared_width))
  rows += [
    ("positions", model.position),
    ("vocabulary", f"{config.data.vocab_size:,}"),
    ("tokens of a training sequence, or the context of an imported model", f"{config.data.seq_len:,}"),
    ("tensors here", export.dtype),
  ]
  return _table(("", ""), rows)


def _routing(config: Config, export: Export) -> str:
  model, routing = config.model, config.routing
  if model.num_dense_layers == model.num_layers:
    return "None: all layers are dense."
  if routing.fixed:
    text = f"`{routing.method}`: every token takes {routing.k} of {model.num_experts} experts in each layer."
  else:
    text = (
      f"`{routing.method}`: a token takes {routing.k_min} to {routing.k_max} of {model.num_experts} experts in each "
      f"layer. The budget is {export.budget:g} on average ({routing.budget_mode.replace('_', ' ')})"
    )
    low, high = routing.budgets
    text += "." if low == high else f"; any from {low:g} to {high:g} can be asked for."
  flops = forward_flops_per_token(config, export.budget, config.data.seq_len / 2)["total"]
  return (
    f"{text}\n\nFLOPs of a forward pass, per token, counted from the shapes at half of the context above: {flops:.4g}."
  )


def _data(sources: Sequence[Mapping], licence: str | None) -> str:
  if not sources:
    return "Unknown: the run has no data manifest. It did no training of its own, or its data was not recorded."
  rows, files = [], []
  for source in sources:
    found = source.get("files") or []
    names = ", ".join(sorted(str(each or "unknown") for each in _licences([source]))) or "unknown"
    hashes = "\n".join(file["sha256"] for file in found)
    digest = hashlib.sha256(hashes.encode()).hexdigest() if found else "none"
    size = f"{sum(file['bytes'] for file in found):,}" if found else "unknown"
    spec = _without_folders(source["source"])
    rows.append((f"`{spec}`", source.get("documents") or "unknown", len(found), size, names, f"`{digest}`"))
    if 0 < len(found) <= _MOST_FILES:
      files += [
        (f"`{Path(file['file']).name}`", f"{file['bytes']:,}", file["license"] or "unknown", f"`{file['sha256']}`")
        for file in found
      ]
  head = ("source", "documents", "files", "bytes", "licences", "SHA-256 of the files' own, one a line")
  text = _table(head, rows) + "\n"
  if left_out := sum(source.get("skipped", 0) for source in sources):
    text += f"\nLeft out, since they could not be read: {left_out:,} files, lines or records.\n"
  if files:
    text += "\n" + _table(("file", "bytes", "licence", "SHA-256"), files) + "\n"
  if licence:
    return text + "\nThe licence above is that of all of this data. Nobody has stated one for the weights.\n"
  return text + "\nThe licences are not all known, so none is stated for the model.\n"


def _licences(sources: Sequence[Mapping]) -> set[str | None]:
  """Returns the licences of all files; None among them: some are unknown."""
  return {file.get("license") for source in sources for file in source.get("files") or [{}]}


def _without_folders(spec: str) -> str:
  """Returns a source's line of the configuration with a path's last part only: folders may tell about a person."""
  kind, colon, path = spec.partition(":")
  return f"{kind}{colon}{Path(path).name}" if colon else kind


def _compute(workdir: Path, step: int) -> str:
  records = [r for r in read_metrics(workdir) if r.get("kind") == "train" and r["step"] <= step]
  if not records:
    return "Unknown: the run has no record of training (metrics.jsonl)."
  last = max(records, key=lambda record: record["step"])
  text = f"By step {last['step']}: {last['tokens']:,.0f} tokens and {last['flops']:.4g} FLOPs"
  return f"{text}, counted from the shapes (not measured); what came before this run is not in it."


def _evaluation(workdir: Path, step: int) -> str:
  parts = []
  final = _read(workdir / "evaluation.json")
  done = final.get("result", {}).get("steps")
  rows = [
    (split, _figure(final[f"{short}_loss"]), _figure(final.get(f"{short}_bits_per_byte")),
     _figure(final.get(f"{short}_mean_experts")), _figure(final.get(bigram)))
    for split, short, bigram in (("validation", "val", "bigram_loss"), ("test", "test", "bigram_test_loss"))
    if f"{short}_loss" in final
  ]  # fmt: skip
  if rows:
    head = ("split", "loss, nats per token", "bits per byte", "mean experts", "loss of a Kneser-Ney bigram")
    where = "" if done == step else f", which is not the step of this export ({step})"
    parts.append(
      f"Held-out documents of the training data's sources, at budget {final['budget']:g}, by step {done}{where}:\n\n"
      + _table(head, rows)
    )
  for path in sorted(workdir.glob("suite-*.json")):
    suite = _read(path)
    if suite.get("step") == step:
      parts.append(f"Suite `{suite['suite']}`, of this step:\n\n{_suite(suite)}")
  return "\n\n".join(parts) or "None: the run has no evaluation on record."


def _suite(suite: Mapping) -> str:
  rows = []
  for name, task in suite["tasks"].items():
    if "skipped" in task:
      rows.append((name, "not asked: " + task["skipped"], "", "", "", "", ""))
    for entry in task.get("by_budget", []):
      for given, row in (("none", entry), ("found ones", entry.get("retrieved"))):
        if row is not None:
          low, high = row["interval"]
          rows.append(
            (name, task["metric"], f"{entry['budget']:g}", given, f"{row['value']:.4f} ({low:.4f} to {high:.4f})",
             row["items"], _figure(row["mean_experts"]))
          )  # fmt: skip
  head = ("task", "metric", "budget", "passages", "value (95% interval)", "items", "mean experts")
  return _table(head, rows)


def _limits(config: Config, info: Mapping, export: Export) -> str:
  lines = [
    "moe_lab has no test of toxicity, bias, private data or memorised text: this model was not tested for any of them.",
    "The figures above are all that the run has on record. They are of the run itself, in JAX: this export was not "
    "evaluated again.",
    "A held-out loss is of documents from the training data's own sources, in this tokenizer's tokens: it says nothing "
    "of other text, and is not to be compared with that of another tokenizer.",
  ]
  sources = [str(source.get("source")) for source in info.get("data") or []]
  if sources and not any(source.startswith("chat:") for source in sources):
    lines.append("This run's data have no conversations: it did not teach the model to follow instructions.")
  if not info.get("imported"):
    lines.append(f"It was trained on sequences of {config.data.seq_len:,} tokens, and on no longer ones.")
  if config.routing.learns_counts:
    lines.append("What a token costs varies with the number of its experts; the budget is an average, not a bound.")
  return "\n".join(f"- {line}" for line in lines)


def _loading(config: Config, export: Export) -> str:
  own = export.family == MODEL_TYPE
  trust = ", trust_remote_code=True" if own else ""
  imports = "AutoModelForCausalLM, AutoTokenizer" if export.has_tokenizer else "AutoModelForCausalLM"
  lines = [f"from transformers import {imports}", ""]
  lines.append(f'model = AutoModelForCausalLM.from_pretrained("FOLDER"{trust})')
  if export.has_tokenizer:
    lines += [
      'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
      'tokens = tokenizer("Once", return_tensors="pt")["input_ids"]',
      "print(tokenizer.decode(model.generate(tokens, max_new_tokens=20)[0]))",
    ]
  text = "```python\n" + "\n".join(lines) + "\n```\n"
  if own:
    text += "\n`modeling_moe_lab.py` in this folder is the model, and is run by transformers: read it first.\n"
    if config.routing.learns_counts:
      text += "`model(tokens, budget=...)` asks for another mean of experts, where the routing above allows one.\n"
  if not export.has_tokenizer:
    text += "\nThe run has no tokenizer of text.\n"
  return text


def _origin(workdir: Path, info: Mapping, export: Export) -> str:
  trained = "imported" if info.get("imported") and not info.get("base") else "made"
  versions = ", ".join(f"{name} {version}" for name, version in (info.get("versions") or {}).items() if version)
  rows = [
    ("run", f"`{workdir.absolute().name}`, step {export.step}"),
    (f"code that {trained} it", _commit((info.get("launches") or [info])[-1])),
    ("code that wrote this export", _commit(code())),
    ("versions", versions or "unknown"),
    ("tokenizer, by its fingerprint", f"`{info.get('tokenizer_fingerprint') or 'none'}`"),
  ]
  return _table(("", ""), rows)


def _commit(record: Mapping) -> str:
  if not record.get("git_hash"):
    return "unknown: not run from a checkout"
  return f"`{record['git_hash']}`" + (" with uncommitted changes" if record.get("git_dirty") else "")


def _figure(value: object) -> str:
  return "unknown" if value is None else f"{value:.4f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
  lines = [head, ["---"] * len(head), *rows]
  return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(value: object) -> str:
  return " ".join(str(value).replace("|", "\\|").split())


def _read(path: Path) -> dict:
  try:
    found = parse(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    return {}
  except (OSError, ValueError) as error:
    raise UserError(f"{path} cannot be read: {error}") from error
  if not isinstance(found, dict):
    raise UserError(f"{path}: wanted an object")
  return found

"""A suite of tasks that is made on this machine, without a download: JSON lines to be read by anything.

  generated  questions that the prompt itself answers, in three grades ([generated.py](tasks/generated.py))
  gym_*      reasoning-gym's, with the extra `eval` ([gym.py](tasks/gym.py))
  cloze_*, continuation_*, translation_*
             of real text in English, French and German, as far as it is at hand ([prose.py](tasks/prose.py))

The same seed, texts and versions give the same bytes.
"""

import hashlib
import importlib.util
import itertools
import os
import random
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from moe_lab.errors import UserError
from moe_lab.evaluate.tasks import generated, gym, prose, text
from moe_lab.evaluate.tasks.items import chosen, numbered
from moe_lab.io.files import dump_json, open_up

ITEMS = 200
MOST_ITEMS = 5000
MANIFEST = "manifest.json"


def write_suite(
  folder: str | Path, *, texts: Mapping[str, str | Path] | None = None, items: int = ITEMS, seed: int = 0
) -> dict:
  """Writes `TASK.jsonl` for each task, and `manifest.json`.

  An item is {id, kind, difficulty, language, prompt, answer}; with choices, a list, answer is the right one's index.

  Args:
    folder: a new one, or one with the same suite in it, which is left as it is.
    texts: language (en, fr, de, ...) -> the text to use instead of what the machine has: a folder or file, all of which
      is used, or an entry of config.data.sources, of which the test split is.
    items: of each task, at most; fewer where the text has no more.
    seed: of what is drawn.

  Returns:
    The manifest: task -> {file, type ("choices" or "exact"), items, sha256, source}, and left_out, a list of lines:
    what could not be made here, and why.

  Raises:
    UserError: the folder holds something else; a text cannot be read.
  """
  if not 3 <= items <= MOST_ITEMS:
    raise UserError(f"items = {items}: wanted 3 to {MOST_ITEMS} of each task")
  for language in texts or ():
    if not re.fullmatch("[a-z]{2,3}", language):
      raise UserError(f"texts[{language!r}]: wanted a language's code of two or three letters, as fr")
  tasks, left_out = _tasks(dict(texts or {}), items, seed)
  files = {f"{task}.jsonl": "".join(f"{dump_json(item)}\n" for item in of_task) for task, (of_task, _) in tasks.items()}
  manifest = {
    task: {
      "file": f"{task}.jsonl",
      "type": "choices" if "choices" in of_task[0] else "exact",
      "items": len(of_task),
      "sha256": hashlib.sha256(files[f"{task}.jsonl"].encode()).hexdigest(),
      "source": source,
    }
    for task, (of_task, source) in tasks.items()
  } | {"left_out": left_out}
  _put(Path(folder).expanduser(), files | {MANIFEST: dump_json(manifest, indent=2) + "\n"})
  return manifest


def is_right(item: Mapping, text: str) -> bool:
  """Returns whether a text is the exact answer of an item, whatever white space is around it.

  A question of reasoning-gym is judged by its own scorer. Of a cloze the first words count: a text goes on behind them.
  """
  said, answer = text.strip(), item["answer"].strip()
  if str(item.get("id", "")).rpartition("-")[0] in gym.names():
    return gym.is_right(item, said)
  if item.get("kind") == "cloze":
    return re.match(re.escape(answer) + r"(?!\w|[-'’]\w)", said) is not None
  return said == answer


def _tasks(texts: dict[str, str | Path], items: int, seed: int) -> tuple[dict[str, tuple[list[dict], str]], list[str]]:
  """Returns task -> its items and their source, and what was left out."""
  tasks: dict[str, tuple[list[dict], str]] = {}
  left_out: list[str] = []

  def add(task: str, candidates: Iterable[dict], source: str) -> None:
    rng = random.Random(f"{seed}/{task}/order")
    found = numbered(task, chosen(candidates, items, rng), rng)
    if found:
      tasks[task] = found, source
    else:
      left_out.append(f"{task}: nothing that would do in {source}")

  for task in generated.names():
    add(task, itertools.islice(generated.candidates(task, random.Random(f"{seed}/{task}")), 6 * items), "generated")
  if importlib.util.find_spec("reasoning_gym"):
    for task in gym.names():
      add(task, gym.candidates(task, seed, items // 3 + 1), f"reasoning-gym {gym.version()}")
  else:
    left_out.append(f"{gym.PREFIX}*: reasoning-gym is not installed (the extra `eval`)")
  for language in sorted({*text.LANGUAGES, *texts}):
    corpus = prose.corpus(language, texts.get(language))
    if corpus is None:
      left_out.append(f"cloze_{language}, continuation_{language}: no text in this language found on this machine")
    else:
      add(f"cloze_{language}", text.cloze(corpus, language), corpus.source)
      passages = text.continuation(corpus, language, random.Random(f"{seed}/continuation_{language}"))
      add(f"continuation_{language}", itertools.islice(passages, 2 * items), corpus.source)
    if language != "en":
      catalogues = prose.found_catalogues(language)
      messages = text.translation(catalogues, language, random.Random(f"{seed}/translation_{language}"))
      source = f"{len(catalogues)} gettext catalogues of this machine"
      add(f"translation_{language}", itertools.islice(messages, 2 * items), source)
  return tasks, left_out


def _put(folder: Path, files: Mapping[str, str]) -> None:
  """Writes a folder in one step, unless it is there already with the same content."""
  try:
    if folder.is_dir() and any(folder.iterdir()):
      _check_same(folder, files)
      return
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp"))
    try:
      for name, content in files.items():
        (scratch / name).write_bytes(content.encode())
      open_up(scratch)
      os.rename(scratch, folder)
    except BaseException:
      shutil.rmtree(scratch, ignore_errors=True)
      raise
  except OSError as error:
    raise UserError(f"{folder}: the suite cannot be written there: {error.strerror}") from None


def _check_same(folder: Path, files: Mapping[str, str]) -> None:
  """Raises UserError unless a folder holds these files and nothing else."""
  there = sorted(path.name for path in folder.iterdir())
  wanted = "wanted a new folder, or one with the same suite in it"
  if MANIFEST not in there:
    raise UserError(f"{folder}: it holds {_some(there)} and no {MANIFEST}; {wanted}")
  other = sorted(set(there) ^ set(files))
  other += [name for name in sorted(set(there) & set(files)) if (folder / name).read_bytes() != files[name].encode()]
  if other:
    raise UserError(f"{folder}: it holds another suite ({_some(other)} differ); {wanted}")


def _some(names: Sequence[str]) -> str:
  return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")

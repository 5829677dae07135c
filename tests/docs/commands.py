"""The command lines of README.md and the guides, as they stand there."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
# In an order in which later ones find the runs of earlier ones.
GUIDES = (
  "train", "routers", "adapt", "evaluate", "serve", "scale", "reports", "reliability", "architecture", "glossary",
)  # fmt: skip
PAGES = ("README.md", *(f"docs/{name}.md" for name in GUIDES), "BUILD.md")
TEMPLATE = "NAME"  # the program of README's line that says how all are called

_PROGRAM = re.compile(r"(?P<before>.*?)(?:\S*python|python) -m experiments\.(?P<name>[\w.]+)(?P<rest>.*)")
_INLINE = re.compile(r"`(python -m experiments\.[^`]+)`")


class Command(NamedTuple):
  """A line that runs a program of ours: experiments.PROGRAM and its arguments."""

  program: str
  arguments: tuple[str, ...]

  def __str__(self) -> str:
    return shlex.join([self.program, *self.arguments])

  def value(self, flag: str) -> str | None:
    """Returns what a flag is given; None: it is not."""
    found = [arg.partition("=")[2] for arg in self.arguments if arg.startswith(f"--{flag}=")]
    return found[-1] if found else None


def blocks(page: str) -> list[list[str]]:
  """Returns the lines of a page's indented and fenced blocks. Within a paragraph an indented line is none."""
  found, fenced, open_block, before = [], False, False, ""
  for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
    if line.startswith("```"):
      fenced, open_block = not fenced, False
    elif fenced or (line.startswith("    ") and (open_block or not before)):
      if not open_block:
        found.append([])
      found[-1].append(line if fenced else line[4:])
      open_block = True
    elif line.strip():
      open_block = False
    before = line.strip()
  return found


def lines(page: str) -> list[str]:
  """Returns the logical lines of a page's blocks: joined where they go on, comments cut off."""
  found = []
  for block in blocks(page):
    whole = ""
    for line in block:
      whole += re.sub(r"\s{2,}#\s.*", "", line).strip()
      if whole.endswith("\\"):
        whole = whole[:-1]
      elif whole.count("[") > whole.count("]"):  # a list of YAML
        whole += " "
      else:
        found.append(whole)
        whole = ""
    assert not whole, f"{page}: {whole!r} does not end"
  return [line for line in found if line]


def command_of(line: str) -> Command | None:
  """Returns the command that a line holds: behind ssh, srun or a loop, or as a list of YAML; None: it has none."""
  if line.startswith("command: ["):
    line = line.partition("[")[2].rstrip("]").replace(",", "")
  match = _PROGRAM.fullmatch(line)
  if match is None:
    return None
  rest = match["rest"].partition(" & ")[0].partition(" [--")[0]
  if match["before"].count("'") % 2:  # within quotes, for another shell
    rest = rest.partition("'")[0]
  return Command(match["name"], tuple(shlex.split(rest)))


def commands(page: str) -> list[Command]:
  """Returns the commands of a page's blocks, and those within its sentences."""
  text = (ROOT / page).read_text(encoding="utf-8")
  found = [command_of(line) for line in (*lines(page), *_INLINE.findall(text))]
  return [command for command in found if command is not None and command.program != TEMPLATE]


def all_commands() -> list[Command]:
  """Returns every command once, in the order of the pages."""
  return list(dict.fromkeys(command for page in PAGES for command in commands(page)))

"""Reads a compiled program's text: its collectives, how often each runs, how much it moves and along which mesh axes.

The compiler's own cost analysis counts a loop's body once and does not tell which devices talk. Both are in the text:
loops say how often they go round, collectives which devices form a group.
"""

import collections
import dataclasses
import re
from collections.abc import Sequence

import numpy as np

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.+)$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONSTANT = re.compile(r"^s32\[\](?:\{[^}]*\})? constant\((\d+)\)")
_ARRAY = re.compile(r"\b(pred|bf16|f8\w*|[suf]\d+|c\d+)\[([\d,]*)\]")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^)]*\))? \{([^}]*)\}")
_CHAIN = re.compile(r'channel_id=(\d+).*chain_id="(\d+)"')
_LISTED = re.compile(r"replica_groups=\{(\{.*?\})\}")
_PAIRS = re.compile(r"source_target_pairs=\{(\{.*?\})\}")
_OPCODES = (
  "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
  "collective-broadcast",
)  # fmt: skip
_COLLECTIVE = re.compile(rf"(?:^|\s)({'|'.join(_OPCODES)})(-start)?\(")
# Between slices, each of which runs a program of its own, the host sends: "{1,2}x{0:3}" are slices times their chips.
_BETWEEN = re.compile(r"\ssend\(.*_xla_megascale_target=\"\{([\d,:]+)\}x.*_xla_megascale_transfer_type=\"(\w+)\"")
BETWEEN = " between slices"


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of a program.

  Attributes:
    opcode: all-gather | all-reduce | reduce-scatter | all-to-all | ragged-all-to-all | collective-permute | ...; with
      `BETWEEN` behind it, of chips in the same place of several slices.
    axes: of the mesh, along which its devices differ.
    size: devices that talk to each other.
    result_bytes: of what each device has afterwards; of a ragged exchange, of all rows that it can have to send;
      between slices, of what it hands over.
    times: how often it runs, loops multiplied.
  """

  opcode: str
  axes: tuple[str, ...]
  size: int
  result_bytes: int
  times: int

  @property
  def bytes_per_chip(self) -> float:
    """Bytes that each device sends, all times together, by the ring that is best for long messages."""
    others = (self.size - 1) / self.size if self.size else 0.0
    factor = {
      "all-reduce": 2 * others,
      f"all-reduce{BETWEEN}": 2 * others,
      f"all-gather{BETWEEN}": self.size - 1,  # of what is sent, which is one part
      "reduce-scatter": self.size - 1,  # of the result, which is one part
      "collective-permute": 1.0,
      "collective-broadcast": 1.0,
    }.get(self.opcode, others)
    return factor * self.result_bytes * self.times


def collectives(text: str, axis_sizes: dict[str, int]) -> list[Collective]:
  """Returns the collectives of a compiled program, those alike put together.

  Args:
    text: `compiled.as_text()`.
    axis_sizes: axis -> devices of a slice, in the order of the mesh.
  """
  computations, entry = _computations(text)
  times = _times(computations, entry)
  found, chains = collections.Counter(), set()
  for name, lines in computations.items():
    if not times[name]:
      continue
    for line in lines.values():
      if match := _BETWEEN.search(line):
        length = _bytes(_members(line[: match.start()].strip())[0])
        opcode = match[2].lower().replace("_", "-") + BETWEEN
        found[(opcode, ("data",), _slices(match[1]), length)] += times[name]
      match = _COLLECTIVE.search(line)
      if not match:
        continue
      # On TPU a collective is written in each of the computations that it runs beside.
      if chain := _CHAIN.search(line):
        if chain.groups() in chains:
          continue
        chains.add(chain.groups())
      opcode, started = match.groups()
      if opcode == "all-reduce" and name.startswith("all-reduce-scatter"):  # TPU: it keeps its part and no more
        opcode = "reduce-scatter"
      shape = line[: match.start()].strip()
      size, axes = _group(line, axis_sizes)
      length = _bytes(_result(shape, opcode) if started else shape)
      if opcode == "ragged-all-to-all":  # there its buffers are for the worst case, and back what it comes from is
        operand = line[match.end() :].split(",")[0].split()[-1].lstrip("%")
        length = min(length, _bytes(lines.get(operand, shape).split("(")[0]))
      if name.startswith("all-reduce-scatter"):
        length //= max(size, 1)
      found[(opcode, axes, size, length)] += times[name]
  return [Collective(*key, count) for key, count in sorted(found.items())]


def _computations(text: str) -> tuple[dict[str, dict[str, str]], str]:
  """Returns computation -> instruction -> its right-hand side, and the entry's name."""
  computations, entry, lines = {}, "", {}
  for line in text.splitlines():
    header = _COMPUTATION.match(line.rstrip())
    if header:
      lines = computations.setdefault(header[2], {})
      entry = header[2] if header[1] else entry
    elif match := _INSTRUCTION.match(line):
      lines[match[1]] = match[2]
  return computations, entry


def _times(computations: dict[str, dict[str, str]], entry: str) -> dict[str, int]:
  """Returns how often each computation runs; of a branch's alternatives every one counts as taken."""
  callers = collections.defaultdict(list)  # computation -> (caller, times in each of its runs)
  for caller, lines in computations.items():
    for line in lines.values():
      trips = _trips(line, computations) if re.search(r"\bwhile\(", line) else 1
      called = _CALLED.findall(line)
      for group in _BRANCHES.findall(line):
        called += [name.strip().lstrip("%") for name in group.split(",")]
      for name in called:
        callers[name].append((caller, trips))
  known = {entry: 1}

  def times(name: str) -> int:
    if name not in known:
      known[name] = sum(times(caller) * trips for caller, trips in callers[name])
    return known[name]

  return {name: times(name) for name in computations}


def _trips(line: str, computations: dict[str, dict[str, str]]) -> int:
  """Returns how often a loop goes round: as the compiler says, or else the constant that its condition names."""
  if match := _TRIPS.search(line):
    return int(match[1])
  condition = re.search(r"condition=%?([\w.\-]+)", line)
  constants = [int(m[1]) for part in computations.get(condition[1], {}).values() if (m := _CONSTANT.match(part))]
  return max(constants, default=1)


def _result(shape: str, opcode: str) -> str:
  """Returns the part of an asynchronous collective's shape that is its result."""
  if opcode not in ("all-gather", "collective-permute") or not shape.startswith("("):
    return shape
  return _members(shape)[1]


def _members(shape: str) -> list[str]:
  """Splits a tuple's shape at its own commas."""
  members, depth, start = [], 0, 1
  for place, letter in enumerate(shape):
    depth += (letter in "([{") - (letter in ")]}")
    if (letter == "," and depth == 1) or (letter == ")" and depth == 0):
      members.append(shape[start:place].strip())
      start = place + 1
  return members


def _bytes(shape: str) -> int:
  """Returns the bytes of all arrays of a shape."""
  total = 0
  for kind, dims in _ARRAY.findall(shape):
    bits = 8 if kind == "pred" or kind.startswith("f8") else int(re.sub(r"\D", "", kind))
    total += int(np.prod([int(n) for n in dims.split(",") if n], dtype=np.int64)) * bits // 8
  return total


def _group(line: str, axis_sizes: dict[str, int]) -> tuple[int, tuple[str, ...]]:
  """Returns how many devices talk to each other, and along which axes they differ."""
  devices = int(np.prod(list(axis_sizes.values())))
  if match := _IOTA.search(line):
    groups, dims, order = (_numbers(part) for part in match.groups(default=""))
    ids = np.arange(np.prod(dims)).reshape(dims).transpose(order or range(len(dims))).reshape(groups)
    members = ids.reshape(-1, ids.shape[-1])[0]
  elif match := _MESH.search(line):
    sizes = {name.strip("' "): int(size) for name, size in (part.split("=") for part in match[1].split(","))}
    varying = {name.strip("' ") for name in match[2].split(",")}
    ids = np.arange(np.prod(list(sizes.values()))).reshape(tuple(sizes.values()))
    members = ids[tuple(slice(None) if name in varying else 0 for name in sizes)].reshape(-1)
  elif match := _LISTED.search(line) or _PAIRS.search(line):
    members = np.array(_numbers(match[1].split("}")[0].strip("{")))
    if "source_target_pairs" in line:
      pairs = np.array([_numbers(pair.strip("{}, ")) for pair in match[1].split("},")])
      return devices, _differing(pairs, axis_sizes)
  else:  # all of them
    members = np.arange(devices)
  return len(members), _differing(members[None], axis_sizes)


def _differing(groups: np.ndarray, axis_sizes: dict[str, int]) -> tuple[str, ...]:
  """Returns the axes along which the devices of any group differ; ids count along the mesh, the last axis fastest."""
  places = np.stack(np.unravel_index(groups, tuple(axis_sizes.values())))  # [axis, group, device]
  differ = (places != places[:, :, :1]).any((1, 2))
  return tuple(axis for axis, differs in zip(axis_sizes, differ, strict=True) if differs)


def _slices(text: str) -> int:
  """Returns how many slices "1,2" or "1:4" are."""
  first, _, last = text.partition(":")
  return int(last) - int(first) + 1 if last else len(text.split(","))


def _numbers(text: str) -> Sequence[int]:
  return [int(n) for n in text.split(",") if n.strip()]

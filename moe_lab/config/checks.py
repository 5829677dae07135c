"""What one value of a field has to be; the error is a line that names the field and what was wanted."""

from moe_lab.errors import ConfigError, did_you_mean


def check_choice(field: str, got: str, choices: tuple[str, ...]) -> None:
  """Raises ConfigError unless `got` is one of the choices."""
  if got not in choices:
    raise ConfigError(field, got, f"one of {', '.join(choices)}{did_you_mean(got, choices)}")


def check_range(field: str, got: float, low: float, high: float = float("inf"), *, open_low: bool = False) -> None:
  """Raises ConfigError unless low <= got <= high, or low < got with `open_low`."""
  # Written so that a NaN fails too.
  if not ((low < got if open_low else low <= got) and got <= high):
    above = "more than" if open_low else "at least"
    raise ConfigError(field, got, f"{above} {low}" + (f" and at most {high}" if high != float("inf") else ""))

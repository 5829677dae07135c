"""Held-out text in which each token wears the number of experts that it got."""

from collections.abc import Sequence

from moe_lab.report.numbers import is_number, number
from moe_lab.report.page import escape, note
from moe_lab.report.palette import LEVELS, level

_MAX_TOKENS = 3000  # a screenful or five; more would only weigh


def passage(tokens: Sequence[dict]) -> str:
  """Returns the text as HTML, with a legend.

  Args:
    tokens: {"text", "experts" (mean over layers), "experts_by_layer", "loss" (nats, or None)} each, in order.
  """
  shown = tokens[:_MAX_TOKENS]
  counts = [token["experts"] for token in shown if is_number(token.get("experts"))]
  if not counts:
    return ""
  low, high = min(counts), max(counts)
  spans = "".join(_span(token, low, high) for token in shown)
  levels = range(LEVELS) if high > low else [level(0.5)]
  ramp = "".join(f'<u class="t{index}"></u>' for index in levels)
  least = f"{low:.2f}" if high > low else ""
  legend = f'<p class="ramp">{least}<b aria-hidden="true">{ramp}</b>{high:.2f} experts (mean over layers)</p>'
  cut = note(f"The first {_MAX_TOKENS} of {len(tokens)} tokens.") if len(tokens) > _MAX_TOKENS else ""
  told = '<output class="told">Point at a token for its numbers.</output>'
  return f'{legend}<div class="passage" translate="no">{spans}</div>{told}{cut}'


def _span(token: dict, low: float, high: float) -> str:
  # A line's end has no width to colour: the style sheet puts a mark into <i>, and copied text stays as it was.
  text = escape(token.get("text", "")).replace("\n", "<i></i>\n")
  experts = token.get("experts")
  if not is_number(experts):
    return text
  tip = f"{number(experts)} experts"
  layers = token.get("experts_by_layer")
  if layers:
    tip += f"; by layer {' '.join(str(count) for count in layers)}"
  if is_number(token.get("loss")):
    tip += f"; loss {token['loss']:.2f} nats"
  shade = level((experts - low) / (high - low) if high > low else 0.5)
  return f'<span class="t{shade}" title="{escape(tip)}">{text}</span>'

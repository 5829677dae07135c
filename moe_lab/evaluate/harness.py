"""Our models for lm-evaluation-harness (arXiv 2405.14782): its requests, answered by the engine. Needs the extra eval.

Texts become tokens as in the harness's own Hugging Face model (lm_eval/models/huggingface.py, 0.4.13), so that its
numbers can be set beside ours: the border between context and continuation, what is cut off on the left, rolling
windows, stop strings. That includes what it does twice: where the tokenizer itself begins every text, a rolling
window has two beginnings.
"""

import collections
from collections.abc import Callable

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from moe_lab.errors import UserError
from moe_lab.evaluate.compute import Compute
from moe_lab.evaluate.scoring import Scorer

MAX_GEN_TOKS = 256  # where a task does not say; the harness's own default
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed")
_NEEDLESS = ("do_sample", "until", "max_gen_toks")  # are read by themselves


class Harness(TemplateLM):
  """A model as the harness sees it.

  Attributes:
    compute: (task, number of the document) -> what all its requests have cost.
  """

  def __init__(self, scorer: Scorer, *, budget: float | None = None, before: Callable[[Instance], str] | None = None):
    """Wraps a model.

    Args:
      scorer: the model.
      budget: mean experts asked for; None: the engine's.
      before: returns what is put before a request's context, such as passages about it.
    """
    super().__init__()
    self.compute: dict[tuple[str, int], Compute] = collections.defaultdict(Compute)
    self._scorer, self._budget, self._before = scorer, budget, before
    self._costs: list[Compute] = []  # of the pairs last scored

  @property
  def eot_token_id(self) -> int:
    return self._scorer.tokenizer.eos_id

  @property
  def prefix_token_id(self) -> int:
    return self._scorer.tokenizer.bos_id

  @property
  def max_length(self) -> int:
    return self._scorer.context

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
    if add_special_tokens is False:
      return self._scorer.tokenizer.encode(string).tolist()
    return self._scorer.encode(string)

  def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
    asked = [_Arguments((self._context(request), request.args[1])) for request in requests]
    answers = super().loglikelihood(asked, disable_tqdm=disable_tqdm)
    for request, cost in zip(requests, self._costs, strict=True):
      self._charge(request, cost)
    return answers

  def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
    scored = self._scorer.log_likelihoods([(context, end) for _, context, end in requests], self._budget)
    self._costs = [one.compute for one in scored]
    return [(one.log_prob, one.greedy) for one in scored]

  def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
    windows, whose = [], []
    for number, request in enumerate(requests):
      (text,) = request.args
      rolled = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1)
      for window in map(make_disjoint_window, rolled):
        windows.append(window)
        whose.append(number)
    totals = [0.0] * len(requests)
    for number, scored in zip(whose, self._scorer.log_likelihoods(windows, self._budget), strict=True):
      totals[number] += scored.log_prob
      self._charge(requests[number], scored.compute)
    return totals

  def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
    end = self._scorer.tokenizer.piece_texts()[self.eot_token_id]
    prompts = [self.tok_encode(self._context(request)) for request in requests]
    settings = [self._settings(request.args[1], end) for request in requests]
    written = self._scorer.write(prompts, settings)
    for request, one in zip(requests, written, strict=True):
      self._charge(request, one.compute)
    return [one.text for one in written]

  def _settings(self, given: dict, end: str) -> dict:
    """Returns what a task asks of generation, as fields of `Request`; greedy unless it says otherwise."""
    wanted = normalize_gen_kwargs(given, MAX_GEN_TOKS)
    unknown = set(wanted) - {*_SAMPLING, *_NEEDLESS}
    if unknown:
      raise UserError(
        f"generation_kwargs: {', '.join(sorted(unknown))} is not known here; wanted {', '.join(_SAMPLING)}"
      )
    fields = {name: wanted[name] for name in _SAMPLING if wanted.get(name) is not None}
    if not wanted["do_sample"]:
      fields["temperature"] = 0.0
    elif "temperature" not in fields:
      fields["temperature"] = 1.0
    stop = tuple(text for text in handle_stop_sequences(wanted["until"], end) if text)
    return fields | {"max_tokens": wanted["max_gen_toks"], "stop": stop, "budget": self._budget}

  def _context(self, request: Instance) -> str:
    return (self._before(request) if self._before else "") + request.args[0]

  def _charge(self, request: Instance, cost: Compute) -> None:
    self.compute[request.task_name, request.doc_id] += cost


class _Arguments:
  """All of a request that the harness's own tokenisation looks at."""

  def __init__(self, args: tuple[str, str]):
    self.args = args

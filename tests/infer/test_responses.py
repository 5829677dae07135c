"""Prompts from files, and responses put together."""

import json

import pytest

from moe_lab.errors import UserError
from moe_lab.infer.engine import Token
from moe_lab.infer.responses import Response, read_prompts


def test_a_response_sums_up():
  response = Response()
  response.add(Token(3, -1.0, 2.0, "a", None))
  response.add(Token(4, -2.0, 3.0, "b", "stop"))
  assert response == Response([3, 4], [-1.0, -2.0], [2.0, 3.0], "ab", "stop")
  assert response.mean_experts == 2.5 and response.mean_log_prob == -1.5


def test_one_prompt_a_line(tmp_path):
  path = tmp_path / "p.txt"
  path.write_text('\ufefffirst\n\n{"prompt": 1}\nwith a form\ffeed\n')
  texts = [(1, "first"), (3, '{"prompt": 1}'), (4, "with a form\ffeed")]
  assert read_prompts(path) == [(f"{path}, line {number}", text, {}) for number, text in texts]


def test_one_object_a_line(tmp_path):
  path = tmp_path / "p.jsonl"
  lines = [{"prompt": "a\u2028", "budget": 2, "stop": "x"}, {"prompt": "b", "stop": ["y", "z"]}]
  path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
  first, second = read_prompts(path)
  assert first == (f"{path}, line 1", "a\u2028", {"budget": 2, "stop": ("x",)})
  assert second == (f"{path}, line 2", "b", {"stop": ("y", "z")})


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("", "wanted at least one prompt"),
    ("{", "line 1: not JSON"),
    ('{"prompt": "a"}\n[]', 'line 2: wanted an object with a text "prompt"'),
    ('{"prompt": "a", "bugdet": 2}', "unknown field 'bugdet' .did you mean 'budget'"),
    ('{"prompt": "a", "seed": "x"}', "seed = 'x': wanted a number"),
    ('{"prompt": "a", "stop": ["b", null]}', "stop = .*: wanted text or a list of texts"),
    ("[" * 100_000, "line 1: not JSON"),
    ('{"prompt": "a", "seed": ' + "1" * 5000 + "}", "line 1: not JSON"),
  ],
)
def test_a_mistake_names_the_line(tmp_path, text, words):
  (tmp_path / "p.jsonl").write_text(text)
  with pytest.raises(UserError, match=words):
    read_prompts(tmp_path / "p.jsonl")

"""The page at /, in a real browser where there is one."""

import re
import time

import pytest

pytest.importorskip("fastapi")

from moe_lab.infer.request import Request  # noqa: E402
from moe_lab.serve import app  # noqa: E402
from moe_lab.serve.served import ServedModel  # noqa: E402
from tests.serve.browser import CHROMIUM, browser  # noqa: E402
from tests.serve.served import engine, running, tokenizer  # noqa: E402

PROMPT = "def function_1(x):\n"
slow = pytest.mark.slow
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")


def test_the_page_needs_nothing_and_trusts_no_text():
  policy, page = app._page()
  assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|https?:| on[a-z]+=", page)
  assert not re.search(r"\bstyle=|<script [^>]*src|<link [^>]*stylesheet|@import|url\(", page)
  assert "default-src 'none'" in policy and "unsafe" not in policy and policy.count("'sha256-") == 2


def text(page) -> str:
  return page.value("document.getElementById('passage').textContent")


def said(page, name: str) -> str:
  return page.value(f"document.getElementById('{name}').textContent")


def choose(page, **values) -> None:
  for name, value in values.items():
    page.value(f"document.getElementById('{name}').value = {value!r}")


def opened(page, server, **look) -> None:
  page.open(f"{server.url}/", **look)
  page.wait("!document.getElementById('go').disabled")


@pytest.fixture(scope="module")
def page():
  with browser() as page:
    yield page


@slow
@in_browser
@pytest.mark.parametrize("look", [{}, {"dark": True}, {"width": 400}])
def test_tokens_arrive_coloured_by_experts(page, look):
  prompt = [tokenizer().bos_id, *tokenizer().encode(PROMPT).tolist()]
  request = Request(prompt, 40, stop_token=tokenizer().eos_id, budget=3.0, max_experts=3)
  tokens = [token for _, token in engine().generate([request])]
  with running(engine()) as server:
    opened(page, server, **look)
    page.console.clear()
    choose(page, temperature=0, max_tokens=40, budget=3.0, max_experts=3)
    page.value("document.getElementById('prompt').focus()")
    page.type(PROMPT)
    page.press("Enter", 13, modifiers=2)
    page.wait("document.getElementById('status').textContent === 'ended at max tokens'")
    assert text(page) == "".join(token.text for token in tokens)
    count, mean = len(tokens), sum(token.experts for token in tokens) / len(tokens)
    assert (said(page, "count"), said(page, "experts")) == (str(count), f"{mean:.2f}")
    assert re.fullmatch(r"\d+ ms", said(page, "first")) and re.fullmatch(r"[\d.]+k?", said(page, "speed"))
    assert re.fullmatch(r"[\d.]+k", said(page, "flops"))
    assert said(page, "low") == f"{min(t.experts for t in tokens):.2f}"
    assert said(page, "high") == f"{max(t.experts for t in tokens):.2f}"
    colours = page.value(
      "[...document.querySelectorAll('#passage span')].map((token) => getComputedStyle(token).backgroundColor)"
    )
    by_experts = {}
    for colour, token in zip(colours, tokens, strict=True):
      by_experts.setdefault(token.experts, set()).add(colour)
    assert len(by_experts) > 1 and all(len(found) == 1 for found in by_experts.values())
    assert len(set.union(*by_experts.values())) == len(by_experts)
    # By keyboard from token to token.
    page.value("document.getElementById('passage').focus()")
    page.press("ArrowRight", 39)
    page.press("ArrowRight", 39)
    assert f"{tokens[1].experts:.2f} experts, log-probability {tokens[1].log_prob:.3f}" in said(page, "told")
    assert page.value("document.documentElement.scrollWidth <= innerWidth")
    assert page.console == []


@slow
@in_browser
def test_stop_ends_the_response_and_frees_its_slot(page, monkeypatch):
  step = engine().step
  monkeypatch.setattr(engine(), "step", lambda: time.sleep(0.05) or step())
  with running(engine()) as server:
    opened(page, server)
    choose(page, mode="chat", prompt="höher?", temperature=0, max_tokens=200)
    page.value("document.getElementById('go').click()")
    page.wait("document.getElementById('passage').childElementCount > 4")
    page.value("document.getElementById('stop').click()")
    page.wait("document.getElementById('status').textContent === 'stopped'")
    until = time.monotonic() + 20
    while engine().num_serving and time.monotonic() < until:
      time.sleep(0.02)
    assert engine().num_serving == 0 and server.server.metrics.totals()["cancelled"] == 1
    assert int(said(page, "count")) < 200 and page.value("document.getElementById('error').hidden")


@slow
@in_browser
def test_a_mistake_is_said(page):
  with running(engine()) as server:
    opened(page, server)
    page.value("document.getElementById('max_tokens').removeAttribute('max')")
    choose(page, prompt="x", max_tokens=9999)
    page.value("document.getElementById('go').click()")
    page.wait("!document.getElementById('error').hidden")
    assert said(page, "error").startswith("max_tokens = 9999: wanted at most")
    choose(page, temperature=0, max_tokens=3)
    page.value("document.getElementById('go').click()")
    page.wait("document.getElementById('error').hidden && document.getElementById('count').textContent === '3'")
  page.value("document.getElementById('go').click()")
  page.wait("document.getElementById('error').textContent === 'the server cannot be reached'")


@slow
@in_browser
def test_a_server_with_a_key_asks_for_it(page):
  with running(engine(), key="open-sesame") as server:
    page.open(f"{server.url}/")
    page.wait("!document.getElementById('key_label').hidden")
    assert said(page, "about") == "This server wants a key." and page.value("document.getElementById('go').disabled")
    for key, condition in (("wrong", "!document.getElementById('error').hidden"),
                           ("open-sesame", "!document.getElementById('go').disabled")):  # fmt: skip
      choose(page, key=key)
      page.value("document.getElementById('key').dispatchEvent(new Event('change'))")
      page.wait(condition)
    choose(page, prompt="x", temperature=0, max_tokens=3)
    page.value("document.getElementById('go').click()")
    page.wait("document.getElementById('count').textContent === '3'")


@slow
@in_browser
def test_a_fixed_budget_cannot_be_slid(page, monkeypatch):
  card = ServedModel.card.fget
  for method, words in (("topk", "every token takes 2"), ("dynamic", "trained for this budget alone")):
    fixed = {"method": method, "budgets": [2.0, 2.0]}
    monkeypatch.setattr(ServedModel, "card", property(lambda s, f=fixed: card(s) | {"compute": card(s)["compute"] | f}))
    with running(engine()) as server:
      opened(page, server)
      assert page.value("document.getElementById('budget').disabled") and words in said(page, "budget_why")

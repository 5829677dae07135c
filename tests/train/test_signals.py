"""SIGTERM is heard once and known everywhere."""

import os
import signal

import pytest

from moe_lab.train.signals import Preemption


@pytest.mark.parametrize("when", ["before", "inside", "after"])
def test_what_one_hears_both_know(when, capsys):
  with Preemption() as study:
    if when == "before":
      os.kill(os.getpid(), signal.SIGTERM)
    with Preemption() as run:
      assert run.requested == (when == "before")
      if when == "inside":
        os.kill(os.getpid(), signal.SIGTERM)
        assert run.requested
    if when == "after":
      os.kill(os.getpid(), signal.SIGTERM)
    assert study.requested
    with Preemption() as following:
      assert following.requested
  assert capsys.readouterr().err.count("SIGTERM") == 1
  assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_nothing_heard():
  with Preemption() as study:
    with Preemption() as run:
      assert not run.requested
    assert not study.requested

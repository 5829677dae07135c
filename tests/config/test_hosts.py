"""The flags that say which processes a run has."""

import pytest
from absl import flags

from moe_lab.config import hosts
from moe_lab.errors import UserError

MEET = ("--coordinator_address=a:1234", "--num_processes=4", "--process_id=3")


def given(*arguments):
  own = flags.FlagValues()
  hosts.define(own)
  own(["program", *arguments])
  return hosts.given(own)


def test_what_is_given():
  assert given() == hosts.Hosts()
  assert given("--num_processes=1").num_processes == 1
  assert given(*MEET, "--initialization_timeout=7") == hosts.Hosts("a:1234", 4, 3, 7, 100)


@pytest.mark.parametrize(
  "arguments, line",
  [
    (("--num_processes=4",), "--num_processes=4: wanted --coordinator_address and --process_id with it"),
    (("--process_id=0",), "--process_id=0: wanted --coordinator_address and --num_processes with it"),
    (MEET[:2], "--coordinator_address=a:1234: wanted --process_id with it"),
    (("--num_processes=1", "--process_id=0"), "--num_processes=1: wanted --coordinator_address with it"),
    ((*MEET, "--process_id=4"), "--process_id=4: wanted 0 to 3"),
    ((*MEET, "--process_id=-1"), "--process_id=-1: wanted 0 to 3"),
    ((*MEET, "--num_processes=0"), "--num_processes=0: wanted at least 1"),
    ((*MEET, "--coordinator_address=a"), "--coordinator_address=a: wanted HOST:PORT"),
    ((*MEET, "--coordinator_address=a:70000"), "--coordinator_address=a:70000: wanted HOST:PORT"),
    (("--initialization_timeout=0",), "--initialization_timeout=0: wanted at least 1 second"),
    (("--heartbeat_timeout=0",), "--heartbeat_timeout=0: wanted at least 1 second"),
    (("--step_timeout=0",), "--step_timeout=0: wanted at least 1 second"),
  ],
)
def test_a_mistake_is_named(arguments, line):
  with pytest.raises(UserError) as refused:
    given(*arguments)
  assert str(refused.value).startswith(line)

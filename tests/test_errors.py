"""Errors that are the user's to mend."""

import pytest

from moe_lab.errors import UserError, require


def test_a_package_that_is_not_installed_names_its_extra():
  require("jax", "anything", "core")
  with pytest.raises(UserError, match=r"^--launcher=ray wants nowhere_to_be_found, .*'\.\[ray\]'$"):
    require("nowhere_to_be_found", "--launcher=ray", "ray")

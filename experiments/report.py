"""Writes a run's page, report.html, from what its directory holds.

python -m experiments.report --workdir=runs/quickstart
"""

from pathlib import Path

from moe_lab.config import program


def main(workdir: Path) -> dict:
  """Writes `workdir`/report.html and returns where it is."""
  from moe_lab.report.run_page import write_report

  return {"report": write_report(workdir), "workdir": workdir}


if __name__ == "__main__":
  program.run(main)

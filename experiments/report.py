"""Writes a page again from what its directory holds: a run's report.html, or a sweep's sweep.html.

python -m experiments.report --workdir=runs/quickstart
"""

from pathlib import Path

from moe_lab.config import program


def main(workdir: Path) -> dict:
  """Writes the page of the run or the sweep in `workdir` and returns where it is."""
  from moe_lab.report.run_page import write_report
  from moe_lab.report.sweep_page import write_sweep_report

  write = write_sweep_report if (workdir / "sweep.json").is_file() else write_report
  return {"report": write(workdir), "workdir": workdir}


if __name__ == "__main__":
  program.run(main)

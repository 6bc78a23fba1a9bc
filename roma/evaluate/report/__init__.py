"""Reports of evaluations: one page for one or several models over one or several benchmarks."""

from roma.evaluate.report.markdown import markdown
from roma.evaluate.report.write import write_report

__all__ = ["markdown", "write_report"]

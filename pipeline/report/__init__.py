"""The report: one self-contained HTML page of an output folder.

totals (what the folder holds) -> scores (columns of a bounded sample of rows) -> selection (which rows are
shown) -> pictures -> charts -> page (templates/).
"""

from pipeline.report.write import REPORT_FILE, Report, render_report, write_report

__all__ = ["REPORT_FILE", "Report", "render_report", "write_report"]

"""The report: one self-contained HTML page about an output folder.

totals (shards, samples, errors, runs) -> scores (a bounded random sample of rows) -> selection (rows for the
gallery) -> gallery and pictures -> charts -> page (templates/). contact_sheet draws a PNG of random samples.
"""

from pipeline.report.write import REPORT_FILE, Report, render_report, write_report

__all__ = ["REPORT_FILE", "Report", "render_report", "write_report"]

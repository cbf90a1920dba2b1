"""The report of one or more runs: a self-contained HTML page with pictures."""

from hydrazero.trainer.report.page import parity_picture, write_report

__all__ = ["parity_picture", "write_report"]

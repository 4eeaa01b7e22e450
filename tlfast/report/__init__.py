"""A report on a dataset: one HTML page with charts, to be read anywhere. Needs the extra ``plot``."""

from .writing import report_page, write_report

__all__ = ["report_page", "write_report"]

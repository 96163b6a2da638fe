"""What is known of the programs of specs and bundles before a chip is rented: as data, and as one page."""

from rpac.report.checks import Check, read_check
from rpac.report.facts import Report
from rpac.report.gather import gather
from rpac.report.page import check_page, is_page, page
from rpac.report.predictions import Observer
from rpac.report.request import Request

__all__ = ["Check", "Observer", "Report", "Request", "check_page", "gather", "is_page", "page", "read_check"]

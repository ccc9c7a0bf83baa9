"""reports/report.html: the page, and what it shows.

No stage imports it; it reads what the stages wrote.
"""

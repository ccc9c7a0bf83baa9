"""From the predictions of runs to figures: metrics, intervals, paired tests, the recommendation, the tables.

It only computes, from predictions and labels; the page that shows it is in report.
"""

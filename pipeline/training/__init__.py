"""What is trained, and what is saved of it: heads, the fit loop, saved networks, runs.

Figures that judge a run are in comparison.
"""

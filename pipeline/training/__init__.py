"""What every strategy has: a head, what it says of images unlike the training images, a saved network, a run.

The training of what lies before the head is in fine_tuning; figures that judge a run are in comparison.
"""

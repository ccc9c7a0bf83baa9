"""The fit loop behind the freeze boundary: learning rates, epochs, checkpoints, inputs that stay on the GPU.

What starts and what is saved, heads and saved networks, is in training.
"""

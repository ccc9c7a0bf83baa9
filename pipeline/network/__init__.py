"""The pretrained network: its weights and preprocessing, the cut points, and the engines that run it.

What is computed with it for many images, and stored, is in features; what is trained is in training.
"""

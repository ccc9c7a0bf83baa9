"""The pretrained network: its weights and preprocessing, the cut points, what it costs, and the device it runs on.

How a frozen part of it runs over many images, and what is stored, is in features; what is trained is in training.
"""

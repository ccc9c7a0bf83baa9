"""How data come in: from a package or a directory to images.csv, labels.csv and splits.

Only `fetch`, `index` and `split` use it. Nothing here knows of networks.
"""

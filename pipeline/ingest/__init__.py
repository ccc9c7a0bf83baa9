"""How data come in: from a package or a directory to images.csv, labels.csv and the splits.

Only the stages `fetch`, `index` and `split`, and the command `import-idx`, use it. Nothing here deals with networks.
"""

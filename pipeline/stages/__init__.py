"""The stages of dvc.yaml, one module each, run as `python -m pipeline.stages.<name>`.

A stage reads parameters and files, calls the packages above, and writes files. Stages do not import each other.
"""

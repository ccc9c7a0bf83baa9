"""What every stage knows about the data: the tables of images, labels and splits, units, and decoding.

The code that makes these tables from a user's directory is in ingest.
"""

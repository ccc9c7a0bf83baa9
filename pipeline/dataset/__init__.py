"""What every stage knows of the data: the tables of images, labels and splits, units, and decoding.

How these tables are made from a user's directory is in ingest.
"""

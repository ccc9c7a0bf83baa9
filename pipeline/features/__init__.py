"""From image files to cached features: pixels, views, the engines that run frozen networks, HDF5 files, the feature store.

Nothing here knows of labels or splits.
"""

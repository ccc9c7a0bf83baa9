"""From image files to cached features: views, the HDF5 files, the feature store, and filling it.

Nothing here knows of labels or splits.
"""

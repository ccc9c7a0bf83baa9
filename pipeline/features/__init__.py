"""From image files to cached features: pixels, views, the engines that run frozen networks, and the feature store.

Nothing here knows of labels or splits.
"""

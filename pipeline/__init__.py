"""How much of a pretrained network should I train? A pipeline of DVC stages that answers it.

Read dvc.yaml first, then the stages in its order (pipeline/stages/), then the modules from the top down:
params, logs, files, manifest, listing, decoding, duplicates, indexing, inventory, units, splits, metrics,
influence, resampling, statistics, images, backbones, engine, cuts, hdf5, feature_store, extraction, heads, suspects,
training, artifacts, idx, datasets, sweep, predict. A module imports only from those named before it.
"""

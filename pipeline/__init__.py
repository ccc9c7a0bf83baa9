"""How much of a pretrained network should I train? A pipeline of DVC stages that answers it.

Read dvc.yaml first, then the stages in its order (pipeline/stages/), then the modules from the top down; one imports
only from those named before it:

    ground           params, files, logs, manifest
    images come in   listing, decoding, duplicates, indexing, inventory
    splits           units, splits
    how sure         metrics, influence, resampling, statistics
    features         images, backbones, engine, tracing, cuts, hdf5, feature_store, extraction
    training         heads, suspects, training, artifacts
    the comparison   tables, recommendation, comparison, plots, plots_page, pull_request
    tools            idx, datasets, sweep, predict
    the page         charts, pictures, provenance, evidence, gallery, report
"""

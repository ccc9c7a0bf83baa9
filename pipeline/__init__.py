"""How much of a pretrained network should I train? A pipeline of DVC stages that answers it.

Start with dvc.yaml, then stages/, then the packages from the top down: each imports only from those above it.

    params, logs, files     params.yaml; logging and exit codes; files that are whole or absent
    dataset                 what every stage knows of the data: tables, units, decoding
    ingest                  how data come in: sources, listing, indexing, duplicates, splits
    network                 the pretrained network: weights, cut points, cost, device
    features                views of images, engines, the feature store, features.h5
    training                heads, saved networks and runs: what every strategy has
    fine_tuning             the fit loop behind the freeze boundary, its learning rates and checkpoints
    comparison              metrics, intervals, tests, the recommendation, the tables
    advice                  what frozen features say before anything is trained
    report                  reports/report.html
    tools                   the commands beside the stages (python -m pipeline --help)
    stages                  one module for each stage of dvc.yaml
"""

import atexit
import gc
import os

# OpenMP threads that wait for work look for it for some microseconds, and then sleep. By default they keep a core busy:
# beside another program, training is several times slower then. If they slept at once, training alone would be slower
# by a tenth to a third. Must be set before torch is loaded; changes no bits. A user's own choice stays.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# Torch and timm make a million objects that live to the end. Looking for cycles among them takes up to a fifth of the
# time of the imports with Python's own threshold, and a second when the process ends.
gc.set_threshold(100_000, *gc.get_threshold()[1:])
atexit.register(gc.freeze)

"""One thread for torch: two fight with what else runs on two cores, and tests are small."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

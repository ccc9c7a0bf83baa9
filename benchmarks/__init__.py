"""What the pipeline promises, measured: `make bench`, or `make bench-quick` for fewer images.

Speeds are ratios of two things measured in one run, since machines differ and are shared. Tests measure none.
"""

import pipeline  # noqa: F401 (before torch is loaded: it says how threads wait)

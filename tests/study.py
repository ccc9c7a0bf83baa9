"""Until every test imports from tests/factories.py."""

from tests.factories import HOSTILE
from tests.factories import N_STUDY as N
from tests.factories import make_study as make

__all__ = ["HOSTILE", "N", "make"]

"""Until every test imports from tests/factories.py."""

from tests.factories import CARRIED, FLIPS, LINEAR, PLAIN, REPOSITORY, carry, encoded, noise, photograph

__all__ = ["CARRIED", "FLIPS", "LINEAR", "PLAIN", "REPOSITORY", "carry", "encoded", "noise", "photograph"]

"""git as a subprocess."""

import subprocess


def git(*arguments: str) -> str:
    """Output of a git command; ValueError with git's message if it fails."""
    done = subprocess.run(["git", *arguments], capture_output=True, encoding="utf-8")
    if done.returncode:
        raise ValueError(f"git {arguments[0]}: {' '.join(done.stderr.split())}")
    return done.stdout

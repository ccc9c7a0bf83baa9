"""What several tests share: plain options, small pictures, and what a copy of the repository needs to run."""

import io
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.params import Augmentation, HeadOptions

REPOSITORY = Path(__file__).parents[1]
CARRIED = (  # by a copy of the repository in which dvc repro runs
    "dvc.yaml",
    "params.yaml",
    "pipeline",
    "requirements.lock",
    ".gitignore",
    ".dvcignore",
    ".dvc/config",
    ".dvc/.gitignore",
    ".dvc/plots",
    "data/weights/README.md",
)
PLAIN = Augmentation(
    seed=0,
    flips="none",
    right_angles=False,
    rotation_degrees=0.0,
    shift_fraction=0.0,
    scale=(1.0, 1.0),
    crop_area=(1.0, 1.0),
    crop_aspect=(1.0, 1.0),
    brightness=0.0,
    contrast=0.0,
    saturation=0.0,
    hue=0.0,
    noise_std=0.0,
)
FLIPS = PLAIN.model_copy(update={"flips": "both"})
LINEAR = HeadOptions(
    kind="linear",
    hidden=(),
    dropout=0.0,
    standardize=True,
    penalty="l2",
    l1_ratio=0.5,
    class_weights="none",
    strengths=(0.1,),
    max_iterations=500,
    learning_rate=1e-3,
    epochs=1,
    batch_size=8,
    threads=1,
)


def carry(root: Path) -> None:
    """Copy what git knows, or would, of the repository as it is now, as far as dvc repro needs it."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", "--", *CARRIED]
    tracked = subprocess.run(listed, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, tracked):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPOSITORY / name, root / name)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def photograph() -> Image.Image:
    return Image.fromarray(noise(7, 9, 3)).resize((36, 28), Image.Resampling.BICUBIC)

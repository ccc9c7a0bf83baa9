"""Predict new images with a saved run."""

import codecs
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline.dataset import decoding
from pipeline.features import engine
from pipeline.features.views import evaluation_views, make_views
from pipeline.network.device import choose_device
from pipeline.training import heads, models


def show(run: str, images: Sequence[Path], *, is_json: bool) -> None:
    """Print class, probability and path of every image that can be read; ValueError if one cannot.

    `run`: the path of a saved run without its ending, e.g. models/full_retrain/seed_0.
    """
    card = Path(run.removesuffix(".safetensors").removesuffix(".json") + ".json")
    predictions, failures = predict(card, images)
    if is_json:
        is_ascii = codecs.lookup(sys.stdout.encoding or "ascii").name != "utf-8"
        print(json.dumps(predictions, indent=2, ensure_ascii=is_ascii))
    else:
        width = max((len(entry["class"]) for entry in predictions), default=0)
        for entry in predictions:
            print(f"{entry['class']:<{width}}  {entry['probability']:.4f}  {entry['path']}")
    if failures:
        raise ValueError("; ".join(failures))


def predict(run: Path, paths: Sequence[Path]) -> tuple[list[dict], list[str]]:
    """Predictions of the images that can be read, and one message for each of the others."""
    network, card = models.load_network(run)
    device = choose_device("auto")
    views = evaluation_views(card.evaluation_views)
    predictions, failures = [], []
    for path in paths:
        try:
            content = path.read_bytes()
            name = decoding.sha256(content)
            pixels = make_views(content, name, views, card.backbone.preprocessing, card.augmentation)
        except (OSError, ValueError) as error:
            failures.append(f"{path}: {error}")
            continue
        (logits,) = engine.run(network, [torch.from_numpy(pixels)], "torch", "fp32", device, len(pixels))
        probability = heads.mean_log_probability(torch.from_numpy(logits)[None])[0].exp()
        best = int(probability.argmax())
        predicted = {"class": card.class_names[best], "probability": round(float(probability[best]), 6)}
        predictions.append(predicted | {"path": str(path)})
    return predictions, failures

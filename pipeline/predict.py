"""Predict new images with a saved run: `python -m pipeline.predict RUN IMAGE… [--json]`.

RUN is the path of a saved run without its ending, e.g. models/full_retrain/seed_0.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from pipeline import artifacts, engine, heads, images, logs


def main() -> None:
    """Print class, probability and path of every image that can be read; fail if one cannot."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.predict", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    arguments = parser.parse_args()
    run = arguments.run
    if run.suffix not in (".json", ".safetensors"):
        run = run.with_name(f"{run.name}.json")
    predictions, failures = predict(run.with_suffix(".json"), arguments.images)
    if arguments.json:
        print(json.dumps(predictions, indent=2, ensure_ascii=False))
    else:
        width = max((len(entry["class"]) for entry in predictions), default=0)
        for entry in predictions:
            print(f"{entry['class']:<{width}}  {entry['probability']:.4f}  {entry['path']}")
    if failures:
        raise ValueError("; ".join(failures))


def predict(run: Path, paths: list[Path]) -> tuple[list[dict], list[str]]:
    """Predictions of the images that can be read, and one message for each of the others."""
    network, card = artifacts.load_network(run)
    device = engine.choose_device("auto")
    predictions, failures = [], []
    for path in paths:
        try:
            content = path.read_bytes()
            which = range(card.evaluation_views)
            pixels = images.views(
                images.decode(content), images.sha256(content), which, card.preprocessing, card.augmentation
            )
        except (OSError, ValueError) as error:
            failures.append(f"{path}: {error}")
            continue
        logits = torch.from_numpy(next(engine.run(network, [pixels], "torch", "fp32", device)))
        probability = np.exp(heads.mean_log_probability(logits[None])[0].numpy())
        best = int(probability.argmax())
        predictions.append(
            {"class": card.class_names[best], "probability": round(float(probability[best]), 6), "path": str(path)}
        )
    return predictions, failures


if __name__ == "__main__":
    logs.run(main)

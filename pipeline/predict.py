"""Predict new images with a saved run: python -m pipeline.predict RUN IMAGE… [--json].

RUN is the path of a saved run without its ending, e.g. models/full_retrain/seed_0.
"""

import argparse
import json
from pathlib import Path

import torch

from pipeline import artifacts, engine, heads, images, logs


def main() -> None:
    """Print class, probability and path of every image that can be read; fail if one cannot."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.predict", description=__doc__)
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    arguments = parser.parse_args()
    run = Path(arguments.run.removesuffix(".safetensors").removesuffix(".json") + ".json")
    predictions, failures = predict(run, arguments.images)
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
            image, name = images.decode(content), images.sha256(content)
        except (OSError, ValueError) as error:
            failures.append(f"{path}: {error}")
            continue
        pixels = images.views(image, name, range(card.evaluation_views), card.preprocessing, card.augmentation)
        (logits,) = engine.run(network, [torch.from_numpy(pixels)], "torch", "fp32", device)
        probability = heads.mean_log_probability(torch.from_numpy(logits)[None])[0].exp()
        best = int(probability.argmax())
        predicted = {"class": card.class_names[best], "probability": round(float(probability[best]), 6)}
        predictions.append(predicted | {"path": str(path)})
    return predictions, failures


if __name__ == "__main__":
    logs.run(main)

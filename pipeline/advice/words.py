"""Findings, as JSON -> paragraphs of advice, with **emphasis** and no other markup.

The four scenarios are those of the notes of Stanford's course CS231n, "Transfer learning" (Karpathy), which cite
Yosinski et al. 2014, "How transferable are features in deep neural networks?". Neither gives thresholds. 5,000 images
are the small data of Raghu et al. 2019, "Transfusion: understanding transfer learning for medical imaging"; 100 images
a class, and half of the errors avoided, are conventions of this project. The size of a data set alone does not decide:
Kornblith et al. 2019, "Do better ImageNet models transfer better?", found little gain from pretraining on some
fine-grained data sets. So the text says what was measured beside what the textbook proposes.
"""

from typing import Any

from pipeline.comparison.intervals import CONFIDENCE
from pipeline.params import AdviseOptions

Json = dict[str, Any]
MOST = 0.9  # of what the best block adds to naming the largest class: an early block that has it separates "most"
TEXTBOOK = {
    ("small", "similar"): "a linear head on the last features: feature_extraction",
    ("small", "different"): "a linear head on features of earlier blocks: features.cut",
    ("large", "similar"): "fine-tuning the whole network: full_retrain",
    ("large", "different"): "fine-tuning the whole network from the pretrained weights, full_retrain, or from_scratch",
}


def paragraphs(found: Json, options: AdviseOptions) -> list[str]:
    """The advice, the most important first."""
    if found["cannot_tell"]:
        return [f"**No advice.** {sentence(found['cannot_tell'])}", *cautions(found)]
    return [where(found), scenario(found, options), more_images(found), *cautions(found)]


def sentence(text: str) -> str:
    """With a capital and a full stop."""
    return f"{text[:1].upper()}{text[1:].removesuffix('.')}."


def percent(value: Json) -> str:
    """A fraction and its interval."""
    return f"{value['value']:.1%} ({value['low']:.1%} to {value['high']:.1%})".replace("%", " %")


def points(value: Json) -> str:
    """A difference of fractions and its interval."""
    middle, low, high = (100 * value[name] for name in ("value", "low", "high"))
    return f"{middle:+.1f} points ({low:+.1f} to {high:+.1f})"


def where(found: Json) -> str:
    """What an early block separates, and whether the last one, or all together, add."""
    blocks, base = found["blocks"], found["majority_class"]["value"]
    last, near = blocks[-1]["linear"], blocks[-1]["nearest"]
    text = (
        f"**Where the information sits.** A linear head on the last features is right for {percent(last)} of the "
        f"images, the nearest neighbours for {percent(near)}; naming the largest class always, for "
        f"{100 * base:.1f} %."
    )
    if len(blocks) == 1:
        return text
    best = max(block["linear"]["value"] for block in blocks)
    if best <= base:
        text += " No block does better than naming the largest class."
    else:
        number = next(i for i, block in enumerate(blocks) if block["linear"]["value"] - base >= MOST * (best - base))
        name = blocks[number]["cut"]
        cut = "at the end of the network" if name == "all" else f"after {name}"
        text += (
            f" Most of what there is to separate ({100 * MOST:.0f} % of the gain over the largest class) is there "
            f"{cut}, number {number + 1} of {len(blocks)}: {percent(blocks[number]['linear'])}."
        )
    added, together = found["last_minus_before"], found["together_minus_last"]
    word = verdict(added, "adds to", "takes away from", "is not shown to add to")
    text += f" The last block {word} the one before it: {points(added)}."
    word = verdict(together, "are better than", "are worse than", "are not shown to be better than")
    text += f" All blocks together {word} the last: {points(together)}"
    better = together["low"] > 0
    return text + ("; `features.cut: every_block` uses them, with `features.pool: avg`." if better else ".")


def verdict(difference: Json, above: str, below: str, unclear: str) -> str:
    """Which word fits a difference: its interval lies above 0, below 0, or contains it."""
    return above if difference["low"] > 0 else below if difference["high"] < 0 else unclear


def scenario(found: Json, options: AdviseOptions) -> str:
    """Which of the four, what the textbook proposes, and what the measurement says of it."""
    n, n_classes, network = found["n_train"], found["classes"], found["network"]
    per_class, in_head = n / n_classes, (network["features"] + 1) * n_classes
    size = "large" if n >= options.large_images and per_class >= options.large_class else "small"
    text = (
        f"**Scenario.** {n:,} training images, {per_class:,.0f} a class, are a {size} data set (large: "
        f"{options.large_images:,} and {options.large_class:,} a class): {n / in_head:.2g} images for each parameter "
        f"of a linear head, {n / max(network['parameters'], 1):.2g} for each of the base."
    )
    avoided = found.get("errors_avoided")
    if avoided is None:
        if "random_weights" in found:
            easy = "A head on the same network with random weights makes no error, so these images need no pretraining"
            return f"{text} {easy}, and how similar they are to the pretraining data cannot be told."
        known = "the network has random weights" if network["weights"] == "random" else "there is no comparison"
        return f"{text} How similar the images are to the pretraining data is not known: {known}."
    threshold = options.similar_errors_avoided
    kind = "similar" if avoided["value"] >= threshold else "different"
    is_clear = not avoided["low"] < threshold <= avoided["high"]
    text += (
        f" A head on the same network with random weights is right for {percent(found['random_weights'])}; the "
        f"pretrained features avoid {percent(avoided)} of its errors, so the images are {kind} "
        f"{'to' if kind == 'similar' else 'from'} the pretraining data as far as features tell (similar: "
        f"{100 * threshold:.0f} % or more{'' if is_clear else '; the interval contains the threshold'})."
    )
    return (
        f"{text} For {size} and {kind}, the textbook proposes {TEXTBOOK[size, kind]}. {measurement(found, size, kind)}"
    )


def measurement(found: Json, size: str, kind: str) -> str:
    """What the features say of the textbook's proposal."""
    blocks = found["blocks"]
    if found["errors_avoided"]["low"] <= 0:
        return "But the pretrained features are not shown to be better than random ones: compare from_scratch too."
    if size == "large":
        return "Features cannot say what fine-tuning gains; the comparison of strategies does."
    if len(blocks) == 1:
        return "The blocks of this network cannot be compared."
    earlier = max(blocks[:-1], key=lambda block: block["linear"]["value"])
    against, n = earlier["minus_last"], len(blocks) - 1
    beats = against["value"] > 0 and n * against["p"] < 1 - CONFIDENCE  # Bonferroni: it is the best of so many
    line = f"The best of {n} earlier blocks, {earlier['cut']}, has {points(against)} against the last"
    if kind == "similar":
        agrees = "which speaks for an earlier cut" if beats else "so the last features are a good place for the head"
    else:
        agrees = "which agrees" if beats else "so an earlier cut alone is not shown to help"
    return f"{line}, {agrees}. Whether training blocks gains more, only the comparison tells."


def more_images(found: Json) -> str:
    """What the learning curve says of 2 and 4 times as many."""
    start = "**Would more images help?**"
    if not found["curve"]:
        return f"{start} There are too few images for a learning curve."
    now, double, fourfold = found["curve"]["expected"]
    gain = 100 * (fourfold["value"] - now["value"])
    is_clear = fourfold["low"] > now["value"]
    word = "would help" if is_clear else "may help little" if gain < 1 else "may help, but the curve cannot show it"
    return (
        f"{start} With {now['images']:,} training images a linear head on these features is expected to be right for "
        f"{percent(now)}, with twice as many for {percent(double)}, with four times as many for {percent(fourfold)}: "
        f"more images {word}. This is about a head on frozen features and images like these; fine-tuned networks "
        "usually gain more from images."
    )


def cautions(found: Json) -> list[str]:
    """What to keep in mind, in one paragraph, if anything."""
    single, left_out = found["classes_of_one_unit"], found["left_out"]
    lines = [
        f"{single} of {found['classes']} classes have one independent image: no head can be judged on them"
        * bool(single and found["classes"] > 1),
        f"with {found['units']} independent images the intervals are rough" * found["few_units"],
        f"{left_out:,} images were left out (advise.images)" * bool(left_out),
        *found["remarks"],
    ]
    kept = [sentence(line) for line in lines if line]
    return [f"**Note.** {' '.join(kept)}"] if kept else []

"""The command line beside the stages: `python -m pipeline --help`, or `freeze-depth --help`."""

from pathlib import Path

import click

from pipeline import logs


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """How much of a pretrained network should I train?

    The stages of the experiment run by `dvc repro`. These are the commands beside them.
    """


@cli.command()
@click.argument("name")
@click.option("--all", "is_complete", is_flag=True, help="Every cut point, not only the last of each block.")
@click.option("--json", "is_json", is_flag=True, help="Print a JSON list instead of a table.")
def cuts(name: str, *, is_complete: bool, is_json: bool) -> None:
    """Where the network NAME (torchvision/… or timm/…) can be cut, and what that costs."""
    from pipeline.tools import cuts

    cuts.show(name, is_complete=is_complete, is_json=is_json)


@cli.group()
def store() -> None:
    """Look after the feature store: status, verify, gc."""
    from pipeline.features import store
    from pipeline.params import load_params

    store.put_at(load_params().runtime.store)


@store.command()
def status() -> None:
    """List the keys: what they are, rows, bytes, last use."""
    from pipeline.tools import store

    store.status()


@store.command()
def verify() -> None:
    """Compare every shard with its checksum; fails if one is damaged."""
    from pipeline.tools import store

    store.verify()


@store.command()
@click.option("--days", type=float, required=True, metavar="N", help="Remove keys that no run used for N days.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def gc(days: float, *, yes: bool) -> None:
    """Remove keys that were not used lately, left-overs, and checkpoints of interrupted training."""
    from pipeline.tools import store

    store.collect_garbage(days, is_asked=not yes)


@cli.command()
@click.argument("run")
@click.argument("images", nargs=-1)
@click.option("--paths", metavar="FILE", type=click.Path(path_type=Path), help="CSV with a column path: more images.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json", "jsonl", "csv"]),
    help="Default: what the ending of --output names, or table.",
)
@click.option("--json", "form", flag_value="json", help="The same as --format json.")
@click.option("--top", type=click.IntRange(1), metavar="K", help="Show the K most probable classes, instead of all.")
@click.option("--raw", "is_raw", is_flag=True, help="Without the temperature that training fitted on validation.")
@click.option(
    "--min-confidence", type=click.FloatRange(0, 1), default=0.0, metavar="P", help="Below, an image is undecided."
)
@click.option("--output", metavar="FILE", type=click.Path(path_type=Path), help="Write to this file.")
@click.option("--workers", type=click.IntRange(0), metavar="N", help="Processes that decode; default: one per core.")
def predict(
    run: str,
    images: tuple[str, ...],
    *,
    paths: Path | None,
    form: str | None,
    top: int | None,
    is_raw: bool,
    min_confidence: float,
    output: Path | None,
    workers: int | None,
) -> None:
    """Predict IMAGES with the saved run RUN, e.g. models/full_retrain/seed_0.

    IMAGES are files, directories with images in and below them, or quoted patterns such as 'photos/**/*.jpg'. Files
    that cannot be read are named at the end, with exit code 1; the others are predicted.
    """
    from pipeline.tools import predict

    if not images and paths is None:
        raise click.UsageError("expected IMAGES, or --paths FILE")
    options = predict.Options(form or predict.form_of(output), top, is_raw, min_confidence)
    predict.show(run, images, paths, options, output, workers)


@cli.command()
@click.argument("run")
@click.argument("others", nargs=-1, required=True, metavar="[RUN2] DATA")
@click.option("--output", metavar="DIR", type=click.Path(path_type=Path), help="Default: below reports/evaluations/.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Files and directories to leave out; repeatable.")
@click.option("--column", "columns", multiple=True, metavar="OURS=THEIRS", help="A column of labels.csv; repeatable.")
@click.option("--workers", type=click.IntRange(0), metavar="N", help="Processes that decode; default: one per core.")
def evaluate(
    run: str,
    others: tuple[str, ...],
    *,
    output: Path | None,
    exclude: tuple[str, ...],
    columns: tuple[str, ...],
    workers: int | None,
) -> None:
    """Evaluate the saved run RUN on new labelled images: does it hold on them?

    DATA is a directory with a sub-directory per class or a labels.csv, or another such table. A second run is compared
    with the first on the same images. Writes evaluation.html, .md and .json. Files that cannot be read are left out,
    with exit code 1.
    """
    from pipeline.ingest.directory import OPTIONAL
    from pipeline.tools import evaluate

    *second, data = list(others)
    if len(second) > 1:
        raise click.UsageError(f"expected one or two runs and a directory, found {len(others) + 1} arguments")
    named = {ours: theirs for ours, _, theirs in (pair.partition("=") for pair in columns)}
    if not {*named} <= {"path", "label", *OPTIONAL} or not all(named.values()):
        known = ", ".join(("path", "label", *OPTIONAL))
        raise click.UsageError(f"--column: found {', '.join(columns)}; expected e.g. label=diagnosis, one of {known}")
    evaluate.show([run, *second], Path(data), output, exclude, named, workers)


@cli.command()
@click.argument("run")
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--full-image", "is_whole", is_flag=True, help="Resize and crop inside: the input is a whole image.")
@click.option(  # the first that can resize with antialias
    "--opset", type=click.IntRange(18, 23), default=18, show_default=True, help="The version of ONNX."
)
@click.option(
    "--images",
    multiple=True,
    metavar="IMAGES",
    help="A file, directory or pattern of images to check with; repeatable. Default: validation and test images.",
)
def export(run: str, output: Path, images: tuple[str, ...], *, is_whole: bool, opset: int) -> None:
    """Write the saved run RUN to OUTPUT (.onnx), from pixels to probabilities, and check it against predict."""
    from pipeline.tools import export

    export.show(run, output, images, is_whole=is_whole, opset=opset)


@cli.command("model-card")
@click.argument("run")
@click.argument("directory", type=click.Path(path_type=Path))
def model_card(run: str, directory: Path) -> None:
    """Write README.md, the model card of the saved run RUN, into DIRECTORY."""
    from pipeline.tools import model_card

    model_card.show(run, directory)


@cli.command()
@click.option("--networks", is_flag=True, help="Compare the networks of the experiments that were run at HEAD.")
@click.option("--cost/--no-cost", default=True, help="Time a few batches of each strategy; default: yes.")
def advise(*, networks: bool, cost: bool) -> None:
    """What to try, whether more images would help, and what each strategy costs, before anything is trained.

    Runs the stage `advise`, and those before it, where their inputs changed.
    """
    from pipeline.tools import advise

    advise.show_networks() if networks else advise.show(is_timed=cost)


@cli.command("first-look")
def first_look() -> None:
    """A first answer in minutes: heads, references, advice and a page, in the directory first-look/."""
    from pipeline.tools import first_look

    first_look.make()


@cli.command()
def report() -> None:
    """Write reports/report.html, a page that shows the results."""
    from pipeline.report import page

    page.write()


@cli.command()
@click.argument("strategy", required=False)
@click.option(
    "--at", multiple=True, metavar="CUT", help="A freeze boundary to try, instead of the default; repeatable."
)
@click.option("--depths", type=click.IntRange(2), default=8, show_default=True, help="Try so many cut points at most.")
@click.option("--seed", "seeds", type=int, multiple=True, help="Default: the first of fine_tune.seeds; repeatable.")
@click.option(
    "--minutes", type=click.FloatRange(0, min_open=True), help="Try only as many depths as fit, two at least."
)
def sweep(
    strategy: str | None, at: tuple[str, ...], depths: int, seeds: tuple[int, ...], minutes: float | None
) -> None:
    """Find out how deep STRATEGY should train: propose its `freeze_until`.

    Trains depths for a few epochs, keeps the better half by validation NLL, doubles the epochs, until two are left. By
    default of partial_freeze, at cut points spread over the depth. Every training is a DVC experiment; the workspace
    stays as it is.
    """
    from pipeline.tools import sweep

    sweep.show(strategy, at, seeds, depths, minutes)


@cli.command()
@click.option("--against", required=True, metavar="REV", help="The revision to compare with, e.g. main.")
@click.option("--pictures", metavar="DIR", type=click.Path(path_type=Path), help="Draw the plots into this directory.")
def compare(against: str, pictures: Path | None) -> None:
    """Print the Markdown of a pull request; fails if a guarded metric got worse by more than it may."""
    from pipeline.tools import pull_request

    pull_request.show(against, pictures)


@cli.command("import-idx")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("directory", type=click.Path(path_type=Path))
def import_idx(source: Path, directory: Path) -> None:
    """Make a data set in DIRECTORY of the IDX files (MNIST's format) in SOURCE."""
    from pipeline.ingest import sources

    sources.import_idx(source, directory)


@cli.command("plots-page")
def plots_page() -> None:
    """Write .dvc/plots/page.html, which `dvc plots show` fills."""
    from pipeline.tools import plots_page

    plots_page.write()


def main() -> None:
    """Run a command; a user's mistake is one line and exit code 1, a wrong option exit code 2."""
    logs.run(lambda: cli(prog_name="python -m pipeline"))


if __name__ == "__main__":
    main()

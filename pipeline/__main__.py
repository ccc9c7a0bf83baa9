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
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "is_json", is_flag=True, help="Print a JSON list instead of a table.")
def predict(run: str, images: tuple[Path, ...], *, is_json: bool) -> None:
    """Predict IMAGES with the saved run RUN, e.g. models/full_retrain/seed_0."""
    from pipeline.tools import predict

    predict.show(run, images, is_json=is_json)


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
    """Print the Markdown of a pull request; fails if a guarded metric got worse."""
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

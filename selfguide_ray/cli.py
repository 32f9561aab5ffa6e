"""The command line: `selfguide run CONFIG key=value …`, `selfguide status|report RUN`, `selfguide compare RUN …`."""

import json
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from selfguide_ray import __version__, comparison
from selfguide_ray.config_file import fields, load
from selfguide_ray.method import SELFGUIDE, guarded, perform
from selfguide_ray.progress import out
from selfguide_ray.progress import plain as shown
from selfguide_ray.report import headline
from selfguide_ray.run import Run
from selfguide_ray.status import progress_of

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """SELF-GUIDE on Ray: a language model writes its own training data for your tasks, and learns from it."""


@app.command()
def run(
    config: Annotated[str, typer.Argument(help="A YAML file, such as configs/quickstart.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Settings over those of the file.")
    ] = None,
) -> None:
    """Run the whole method, from task files to the report; the same command again continues it.

    Exit code 0: all done. 1: something was left behind, and is listed. 2: bad input, or another job works on the run;
    nothing was done. 3: the budget is used up. 130: stopped by Ctrl-C or SIGTERM, after what was in hand.

    Example: selfguide run configs/quickstart.yaml run=runs/first tasks.select='example00[1-4]*' inputs.rounds=4
    """
    raise typer.Exit(guarded(lambda: perform(load(config, overrides or ()), SELFGUIDE)))


@app.command()
def search(
    config: Annotated[str, typer.Argument(help="A YAML file, such as configs/search.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Settings over those of the file.")
    ] = None,
) -> None:
    """Go through a grid of settings on validation instances, and judge the choice by what is held out.

    Points share every table that they can; the same command again continues the search.
    """
    from selfguide_ray.search.command import search as go

    raise typer.Exit(guarded(lambda: go([config, *(overrides or ())])))


@app.command()
def doctor(
    config: Annotated[str | None, typer.Argument(help="A YAML file; without one the defaults are looked at.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Settings over those of the file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list instead of a table.")] = False,
) -> None:
    """Look for what would stop or mislead a run: packages, student, prompts, folder, tasks, Ray. Nothing is started.

    Exit code 0: nothing is wrong, though there may be warnings. 1: something is. 2: bad input.
    """
    from selfguide_ray.doctor.command import examine, exit_code, table

    def show() -> int:
        given = list(overrides or ())
        bare = config is not None and "=" in config  # no file, only settings
        found = examine(load(None, [config, *given]) if bare else load(config, given))
        if as_json:
            typer.echo(json.dumps(found))
        else:
            out.print(table(found))
        return exit_code(found)

    raise typer.Exit(guarded(show))


@app.command()
def plan(
    config: Annotated[str, typer.Argument(help="A YAML file, such as configs/quickstart.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Settings over those of the file.")
    ] = None,
    rate: Annotated[
        str | None, typer.Option(metavar="RUN", help="A run, ended or not, that tells speeds and what survives.")
    ] = None,
    price: Annotated[float | None, typer.Option(help="Money for an hour of an engine or a training worker.")] = None,
    against: Annotated[
        str | None, typer.Option(metavar="RUN", help="Hold the plan against this run; by default its own, once begun.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> None:
    """Tell what a run will take before it starts: rows, tokens, hours and money of each table. Nothing is started.

    Once the run has begun, planned figures stand beside actual ones. Without --rate there are no times.
    """
    from selfguide_ray.planning import planning, tables

    def show() -> int:
        told = planning(load(config, overrides or ()), rate, price, against)
        if as_json:
            typer.echo(json.dumps(told))
            return 0
        for table in tables(told):
            out.print(table)
        return 0

    raise typer.Exit(guarded(show))


@app.command()
def submit(
    config: Annotated[
        str, typer.Argument(help="A YAML file inside the working directory, such as configs/paper.yaml.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Settings over those of the file.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="The cluster's dashboard, such as http://HEAD:8265; by default RAY_ADDRESS.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the job's log until it ends, or not.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the command.")] = False,
) -> None:
    """Hand a run to a Ray cluster: print the `ray job submit` line and run it; its exit code is passed on.

    The same command again continues the run. `ray job stop` leaves the job cluster.drain_seconds for what is in hand.
    """
    from selfguide_ray.submit import submit as hand_over

    raise typer.Exit(guarded(lambda: hand_over(config, overrides or (), address, wait, dry_run)))


@app.command()
def status(
    folder: Annotated[str, typer.Argument(metavar="RUN", help="The run's folder or URI.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Show how far a run is: shards, rows, what was kept, time and tokens of each table, and what failed."""

    def show() -> int:
        told = progress_of(Run(folder))
        if as_json:
            typer.echo(json.dumps(told))
            return 0
        title = Text(shown(folder), "italic")
        table = Table("table", "done", "rows", "kept", "seconds", "generated tokens", title=title, title_justify="left")
        for name, figures in told["tables"].items():
            of = f"{figures['done']}/{figures['of']}"
            counts = (figures[key] for key in ("rows", "kept", "seconds", "generated_tokens"))
            table.add_row(name, of, *(f"{count:,.0f}" if count else "" for count in counts))
        out.print(table)
        for what in told["left_behind"]:
            out.print(f"left behind: {shown(what)}", markup=False, style="red")
        return 0

    raise typer.Exit(guarded(show))


@app.command()
def report(folder: Annotated[str, typer.Argument(metavar="RUN", help="The run's folder or URI.")]) -> None:
    """Print systems x tasks of a run; the whole report is RUN/report.html."""

    def show() -> int:
        progress_of(Run(folder))
        out.print(headline(Run(folder)))
        return 0

    raise typer.Exit(guarded(show))


@app.command()
def compare(
    groups: Annotated[
        list[str], typer.Argument(metavar="RUN[,RUN…]…", help="Runs; with commas, those of one setting.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> None:
    """Compare finished runs of the same tasks: each system's mean, SELF-GUIDE's gain over prompting and over the first runs.

    Runs that differ by seed are one argument, with commas between. In brackets: a 95 % interval over tasks; after ±: the
    standard deviation between runs; q: the p-value of a difference, corrected for all groups and families.

    Example, an ablation: selfguide compare runs/full-1,runs/full-2 runs/no-filter-1,runs/no-filter-2
    """

    def show() -> int:
        told = comparison.compare([[run.strip() for run in group.split(",") if run.strip()] for group in groups])
        if as_json:
            typer.echo(json.dumps(told))
            return 0
        for table in comparison.tables(told):
            out.print(table)
        return 0

    raise typer.Exit(guarded(show))


@app.command()
def settings(
    word: Annotated[str, typer.Argument(help="Only settings whose name or meaning has this in it.")] = "",
) -> None:
    """List the settings with their defaults; `a / b` is for classification / generation tasks."""
    table = Table("setting", "default", "meaning", box=None)
    for row in fields():
        if word.lower() in " ".join(row).lower():
            table.add_row(*map(escape, row))
    out.print(table)


if __name__ == "__main__":
    app()

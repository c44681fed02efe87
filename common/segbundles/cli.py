"""The ``segbundles`` command.

Heavy modules are imported inside the commands, so that ``--help`` is fast. An error of the library (ValueError) is
shown as one message, the last thing on the screen, with exit status 1.
"""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape
from rich.progress import track
from rich.table import Column, Table
from typer.core import TyperGroup

from segbundles.datasets import DATA_SETS, SPLITS, DataFaults, DataSet, Prepared
from segbundles.phantoms import PHANTOMS

_MOST_FAULTS = 100


class ErrorGroup(TyperGroup):
    """Show a ValueError of any of its commands as one message instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except ValueError as error:
            _show_error(error)
            raise typer.Exit(1) from error


def _group(**kwargs: Any) -> typer.Typer:
    return typer.Typer(no_args_is_help=True, add_completion=False, **kwargs)


app = _group(cls=ErrorGroup, help="Segment images with bundles, train and evaluate them, and prepare data for them.")
prepare_app = _group(help="Check a data set, or your own data, and write the datalist.json.")
phantom_app = _group(help="Write a synthetic data set, to try the bundles without real data.")
app.add_typer(prepare_app, name="prepare")
app.add_typer(phantom_app, name="phantom")

Out = Annotated[Path, typer.Option("--out", help="Folder of the datalist.json; nothing is written outside it.")]
PhantomOut = Annotated[Path, typer.Option("--out", help="Folder of the phantom; nothing is written outside it.")]
Seed = Annotated[int, typer.Option(help="Seed of what is drawn.")]
Size = Annotated[tuple[int, int], typer.Option(help="Pixels: width, height.")]


def _prepare_command(data_set: DataSet) -> Callable[..., None]:
    def command(
        source: Annotated[Path, typer.Option(help="Folder that contains the data set.")],
        out: Out,
        validation_fraction: Annotated[float, typer.Option(help="Share of the cases for validation, 0 to 1.")] = 0.2,
        seed: Annotated[int, typer.Option(help="Seed of the split.")] = 0,
        validation_case: Annotated[
            list[str] | None,
            typer.Option(help="Case or group (patient) that always goes to validation; may be repeated."),
        ] = None,
        split: Annotated[
            Path | None,
            typer.Option(help="JSON file with lists of case or group names: training, validation, testing."),
        ] = None,
        folds: Annotated[int | None, typer.Option(help="Number of parts for cross-validation.")] = None,
        fold: Annotated[int | None, typer.Option(help="Part that is validation, from 0.")] = None,
        **options: Any,
    ) -> None:
        from segbundles.datasets import get_data_set, prepare

        prepared = prepare(
            get_data_set(data_set.name, **options),
            source,
            out,
            validation_fraction=validation_fraction,
            seed=seed,
            validation_cases=validation_case or (),
            split=split,
            folds=folds,
            fold=fold,
            track=partial(_track, description="Checking"),
        )
        _show_prepared(prepared)

    *shared, _ = signature(command, eval_str=True).parameters.values()
    command.__signature__ = signature(command).replace(parameters=[*shared, *_own_options(data_set)])
    return command


def _own_options(data_set: DataSet) -> list[Parameter]:
    """Return the parameters of a data set's ``options`` as options of the command line."""
    if data_set.options is None:
        return []
    own = []
    for parameter in signature(data_set.options, eval_str=True).parameters.values():
        kind, text = get_args(parameter.annotation)
        option = typer.Option(f"--{parameter.name.replace('_', '-')}", help=text)
        own.append(parameter.replace(annotation=Annotated[kind, option]))
    return own


for _data_set in DATA_SETS.values():
    prepare_app.command(_data_set.name, help=escape(_data_set.summary))(_prepare_command(_data_set))


Bundle = Annotated[str, typer.Argument(help="Folder of the bundle, or its name.", show_default=False)]
Data = Annotated[str, typer.Argument(help="Folder with a datalist.json, as from prepare.", show_default=False)]
Output = Annotated[str, typer.Argument(help="Folder to write to.", show_default=False)]
_SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}
_KNOBS = "Settings are written as --knob value, such as --device cpu. segbundles knobs BUNDLE lists them all."


@app.command(context_settings=_SETTINGS, epilog=_KNOBS)
def segment(
    context: typer.Context,
    bundle: Bundle,
    source: Annotated[
        str, typer.Argument(metavar="INPUT", help="An image, or a folder of images.", show_default=False)
    ],
    output: Output,
) -> None:
    """Segment images: masks, measurements and a page to look at."""
    from segbundles.commands import segment_command

    _run([segment_command(bundle, source, output, context.args)])


@app.command(context_settings=_SETTINGS, epilog=_KNOBS)
def train(context: typer.Context, bundle: Bundle, data: Data, output: Output) -> None:
    """Train a bundle; the weights go to OUTPUT/models.

    With --initial_weights shipped the bundle's own weights are fine-tuned, with a smaller learning rate and fewer
    epochs, and the validation cases are scored before and after.
    """
    from segbundles.commands import args_file, train_commands

    _run(train_commands(bundle, data, output, context.args))
    _compare_with_shipped(bundle, data, output, context.args)
    models = Path(output, "models")
    with_it = shlex.join(["--ckpt_dir", str(models), *args_file(context.args)])
    for line in (
        f"Weights: {models / 'model.pt'}",
        f"How good they are: {shlex.join(['segbundles', 'evaluate', bundle, data, str(Path(output, 'evaluation'))])} "
        f"{with_it}",
        f"Use them: segbundles segment {shlex.quote(bundle)} INPUT OUTPUT {with_it}",
    ):
        _console().print(line, highlight=False, markup=False, soft_wrap=True)


def _compare_with_shipped(bundle: str, data: str, output: str, settings: Sequence[str]) -> None:
    """Score the validation cases with the bundle's weights and with those fine-tuned from them."""
    from segbundles.commands import before_and_after, fine_tunes
    from segbundles.finetuning import has_validation, scores

    if not fine_tunes(settings):
        return
    if not has_validation(data):
        _console().print("The list has no validation cases: nothing says whether the fine-tuning has helped.")
        return
    _run(before_and_after(bundle, data, output, settings))
    before, after = (scores(output, name) for name in ("evaluation_before", "evaluation"))
    table = Table("Validation, mean", "Before", "After", title="Fine-tuning, scored with the same settings")
    for metric in (name for name in before if name in after):
        table.add_row(metric, f"{before[metric]:.4f}", f"{after[metric]:.4f}")
    _console().print(table)


@app.command()
def adapt(
    bundle: Bundle,
    data: Data,
    out: Annotated[Path, typer.Option("--out", help="JSON file to write, for --args_file.")],
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Without it: a GPU if there is one.")] = None,
    memory_gib: Annotated[
        float | None, typer.Option(help="Memory for a training, in GiB. Without it: what is free, at most 8.")
    ] = None,
) -> None:
    """Write settings that fit a data set: classes, spacing, patches, batch and limits, each with the reason."""
    from segbundles.adapt import adapt, measure, write_plans
    from segbundles.commands import args_path

    plans, notes = adapt(bundle, data, measure(device, memory_gib), partial(_track, description="Reading"))
    files = write_plans(plans, out, f"Settings for {data}, from segbundles adapt.")
    table = Table("Setting", "Bundle", "Here", "Why")
    for plan in plans:
        prefix = "locator: " if args_path(out, plan.config) != out else ""
        for name, reason in plan.reasons.items():
            values = (str(plan.knob(name)), str(plan.chosen[name]) if name in plan.chosen else "the same")
            table.add_row(*map(escape, (prefix + name, *values, reason)))
    _console().print(table)
    for note in notes:
        _console().print("[yellow]note:[/yellow]", escape(note), highlight=False)
    words = shlex.join(["segbundles", "train", bundle, data])
    for line in (
        *(f"wrote {file}" for file in files),
        f"Train with it: {words} OUTPUT --args_file {shlex.quote(str(out))}",
    ):
        _console().print(line, highlight=False, markup=False, soft_wrap=True)


@app.command(context_settings=_SETTINGS, epilog=_KNOBS)
def evaluate(context: typer.Context, bundle: Bundle, data: Data, output: Output) -> None:
    """Compare masks with labels: metrics and a report."""
    from segbundles.commands import evaluate_command

    _run([evaluate_command(bundle, data, output, context.args)])


@app.command(context_settings=_SETTINGS, epilog=_KNOBS)
def crossvalidate(
    context: typer.Context,
    bundle: Bundle,
    data: Data,
    output: Output,
    folds: Annotated[int, typer.Option(help="Number of folds, 2 or more.")] = 5,
) -> None:
    """Train and score a bundle on parts of the data in turn, so that every case is scored once.

    Groups such as patients stay together. Run the same command again to continue. Settings are those of training and
    evaluation.
    """
    from segbundles.crossvalidation import fold_commands, join_folds, start_folds

    folders = start_folds(bundle, data, output, folds, context.args)
    for folder in folders:
        _run(fold_commands(bundle, folder, context.args))
    summary = join_folds(Path(bundle).name, output, folders)
    title = f"{summary['groups']} {summary['unit']}"
    table = Table("Metric", "Mean", "95 % interval", "SD", "Cases", title=title)
    for name, entry in summary.items():
        if isinstance(entry, dict) and "mean" in entry:
            interval = "" if entry["low"] is None else f"{entry['low']:.4g} to {entry['high']:.4g}"
            values = ("" if value is None else f"{value:.4g}" for value in (entry["mean"], entry["sd"]))
            mean, sd = values
            table.add_row(escape(name), mean, interval, sd, f"{entry['n']} of {summary['cases']}")
    _console().print(table)
    _console().print(f"Results: {Path(output, 'report.html')}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def compare(
    evaluations: Annotated[
        list[Path], typer.Argument(help="Folders of evaluate or crossvalidate, two or more.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder to write to.")] = Path("comparison"),
) -> None:
    """Compare evaluations of the same cases with the first one, case by case."""
    from segbundles.comparison import compare
    from segbundles.statistics import difference_line

    summary = compare(evaluations, out)
    for one in summary["evaluations"]:
        _console().print(f"{one['letter']}: {one['folder']}", highlight=False, markup=False, soft_wrap=True)
    columns = ("Metric", "A", "Other", "Difference (95 % interval)", "p", "Better", "Equal", "Worse", "Cases")
    table = Table(*columns, title=f"Intervals and p over {summary['groups']} {summary['unit']}")
    for row in summary["differences"]:
        before, after, p = ("" if row[key] is None else f"{row[key]:.4g}" for key in ("before", "after", "p"))
        counts = (str(row[key]) for key in ("wins", "ties", "losses"))
        cases = f"{row['n']} of {summary['cases']}"
        table.add_row(row["metric"], before, f"{row['letter']}: {after}", difference_line(row), p, *counts, cases)
    _console().print(table)
    _console().print(f"Results: {out / 'compare.html'}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def calibrate(
    bundle: Bundle,
    folder: Annotated[
        Path,
        typer.Argument(
            help="Folder of crossvalidate, or of evaluate on cases that the weights have not seen, with "
            "--save_predictions true.",
            show_default=False,
        ),
    ],
    weights: Annotated[
        Path | None, typer.Option(help="Weights whose facts get the result. Without it: those of the bundle.")
    ] = None,
    record: Annotated[
        Path | None, typer.Option(help="JSON file for the comparison. Without it: FOLDER/confidence.json.")
    ] = None,
) -> None:
    """Calibrate the confidence of weights with unseen cases, and measure whether it finds bad masks."""
    from segbundles.calibration import calibrate, summary_lines, summary_rows
    from segbundles.commands import find_bundle

    root = find_bundle(bundle)
    chosen = weights or root / "models" / "model.pt"
    found = calibrate(root, folder, chosen, record, partial(_track, description="Reading"))
    table = Table("Way to expect the score", "Rank correlation", "AUROC failures", "AUROC worst fifth", "Mean error")
    for row in summary_rows(found):
        table.add_row(*map(escape, row))
    _console().print(table)
    for line in (*summary_lines(found), f"Written into the facts of {chosen}"):
        _console().print(line, highlight=False, markup=False, soft_wrap=True)


@app.command()
def merge(
    sources: Annotated[
        list[Path], typer.Argument(help="Folders with a datalist.json, two or more.", show_default=False)
    ],
    out: Out,
) -> None:
    """Join the datalists of folders, prepared or by hand, into one."""
    from segbundles.datasets import merge

    _show_prepared(merge(sources, out))


def _run(commands: Sequence[Sequence[str]]) -> None:
    from segbundles.commands import run_commands

    say = partial(_console(stderr=True).print, highlight=False, markup=False, soft_wrap=True)
    if status := run_commands(commands, say):
        raise typer.Exit(status if status > 0 else 128 - status)


@app.command(context_settings=_SETTINGS)
def check(
    context: typer.Context,
    bundle: Bundle,
    config: Annotated[
        list[str] | None,
        typer.Option(
            help="Config to check, a name or a path; repeat it for patches. Without it, and without settings: all."
        ),
    ] = None,
    args_file: Annotated[
        str | None, typer.Option("--args_file", "--args-file", help="Settings in JSON, as for monai.bundle.")
    ] = None,
    schema: Annotated[
        Path | None,
        typer.Option(
            help="File with the schema of metadata.json; without it the schema is downloaded.", show_default=False
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of data to read and check for train.json, or for --config.", show_default=False),
    ] = None,
) -> None:
    """List what is wrong with a bundle's configs, and with data for them, before anything is trained.

    This runs expressions and imports modules that the bundle names: check only bundles from sources you trust.
    Settings are written as for monai.bundle: --key value.
    """
    from segbundles.check import check_bundle, read_overrides
    from segbundles.commands import find_bundle

    _console().print("A check runs code that the bundle names: check only bundles from a source that you trust.")
    root = Path(bundle) if Path(bundle).is_dir() else find_bundle(bundle)
    overrides, reading = read_overrides(context.args, root), partial(_track, description="Reading")
    checked = check_bundle(root, config or (), args_file, overrides, schema, data, reading)
    rows = []
    for item in checked:
        if not item.findings:
            # without a summary it contains a file that another row reports as unreadable
            status = "[green]ok[/green]" if item.summary else "[yellow]not checked[/yellow]"
            rows.append((status, item.config, "", item.summary, ""))
        for found in item.findings:
            status = "[red]fault[/red]" if found.fault else "[yellow]warning[/yellow]"
            rows.append((status, found.config, found.id, found.problem, found.repair))
    narrow = _console().width < 120
    columns = ("Status", "Where", "Finding") if narrow else ("Status", "Config", "Id", "Finding", "Repair")
    table = Table(*(Column(name, overflow="fold") for name in columns))
    for status, *texts in rows:
        cells = ["\n".join(filter(None, texts[n : n + 2])) for n in (0, 2)] if narrow else texts
        table.add_row(status, *map(escape, cells), end_section=narrow and bool(texts[3]))
    _console().print(table)
    kinds = [found.fault for item in checked for found in item.findings]
    counts = f"checked: {len(checked)}, faults: {sum(kinds)}, warnings: {len(kinds) - sum(kinds)}"
    _console().print(f"{root.resolve().name}, {counts}", highlight=False, markup=False)
    faults = [found for item in checked for found in item.findings if found.fault]
    if faults:
        first, more = faults[0], f" (and {len(faults) - 1} more, see the table)" if len(faults) > 1 else ""
        place = ", ".join(filter(None, (first.config, first.id)))
        _console().print(
            f"ERROR: {place}: {first.problem}: {first.repair}{more}", highlight=False, markup=False, soft_wrap=True
        )
        raise typer.Exit(1)


@app.command()
def knobs(bundle: Bundle) -> None:
    """Print the table of a bundle's knobs, as its model card has it; in Markdown if a file or a pipe takes it."""
    from segbundles.commands import find_bundle
    from segbundles.knobs import knob_table

    table = knob_table(find_bundle(bundle))
    if _console().is_terminal:
        _console().print(Markdown(table))
    else:
        print(table, end="")


@app.command()
def pack(
    bundle: Bundle,
    out: Annotated[Path, typer.Option("--out", help="Folder to write to.")] = Path(),
    large_files: Annotated[
        str | None,
        typer.Option(
            help="Address of the folder where you will put files above 25 MB, for hosts that refuse them, such as "
            "MONAI's model zoo. Without it, the zip contains everything.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a bundle with its weights as one zip that MONAI can download and MONAI Label can serve."""
    from segbundles.packing import pack

    packed = pack(bundle, out, large_files)
    lines = [f"wrote {file} ({file.stat().st_size / 1e6:.1f} MB)" for file in (packed.zip, *packed.large)]
    if packed.large:
        lines.append(f"Upload {', '.join(file.name for file in packed.large)} to {large_files}.")
    name = packed.zip.name.rpartition("_v")[0]
    words = ["python", "-m", "monai.bundle", "download", "--name", name, "--url", f"URL/{packed.zip.name}"]
    lines.append(f"Others get it with: {shlex.join([*words, '--bundle_dir', 'bundles'])}")
    if packed.large:
        fetch = ["python", "-m", "monai.bundle", "download_large_files", "--bundle_path", f"bundles/{name}"]
        lines.append(f"and then: {shlex.join(fetch)}")
    for line in lines:
        _console().print(line, highlight=False, markup=False, soft_wrap=True)


@app.command(context_settings=_SETTINGS, epilog=_KNOBS)
def export(context: typer.Context, bundle: Bundle) -> None:
    """Write the networks of a bundle as programs (.pt2) beside their weights."""
    from segbundles.check import read_overrides
    from segbundles.commands import find_bundle
    from segbundles.exporting import export_bundle

    for path in export_bundle(bundle, read_overrides(context.args, find_bundle(bundle))):
        _console().print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def label(
    studies: Annotated[Path, typer.Option(help="Folder of images; labels are stored in it.", show_default=False)],
    bundles: Annotated[
        str | None,
        typer.Option(help="Names or folders, separated by commas. Without it: all bundles here that have weights."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="Weights to serve instead of the bundle's, a.pt, or [a.pt,b.pt] for an ensemble."),
    ] = None,
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8000,
    host: Annotated[str, typer.Option(help="Address to listen on; the server has no password.")] = "127.0.0.1",
    environment: Annotated[
        Path | None,
        typer.Option(
            envvar="SEGBUNDLES_LABEL_ENVIRONMENT",
            help="Folder of MONAI Label's own environment, created at first use. Without it: one in the user's cache.",
        ),
    ] = None,
) -> None:
    """Serve bundles to 3D Slicer with MONAI Label, to segment, correct and train, until Ctrl-C."""
    import signal

    from segbundles.label import MONAI_LABEL, LabelServer, find_bundles, make_environment

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    say = partial(_console().print, highlight=False, markup=False, soft_wrap=True)
    found, without = find_bundles([name.strip() for name in (bundles or "").split(",") if name.strip()])
    for name in without:
        say(f"{name} is left out: it has no weights yet.")
    try:
        chosen = [path.strip() for path in (weights or "").strip("[]").split(",") if path.strip()]
        server = LabelServer(make_environment(environment, say), studies, found, host, port, chosen)
        with server:
            for name in server.trained:
                say(f"{name}: weights trained from here; delete {server.bundle_root(name)} to go back to the bundle's.")
            say("Starting ...")
            models = server.wait_until_ready()["models"]
            say(f"MONAI Label {MONAI_LABEL} at {server.url}")
            table = Table("Model", "Labels")
            for name, model in models.items():
                table.add_row(name, ", ".join(model["labels"]))
            _console().print(table)
            say("In 3D Slicer: install the extension MONAILabel and open the module 'MONAI Label'.")
            say(f"Enter the server {server.url}, press Next Sample, choose a model under Auto Segmentation, press Run.")
            say(f"Log: {server.log}. Ctrl-C stops the server.")
            server.wait()
    except KeyboardInterrupt:
        say("Stopped.")


@phantom_app.command("left_atrium", help=PHANTOMS["left_atrium"])
def left_atrium(
    out: PhantomOut,
    cases: Annotated[int, typer.Option(help="Number of cases, 3 or more.")] = 10,
    seed: Seed = 0,
    size: Annotated[tuple[int, int, int], typer.Option(help="Voxels: width, height, depth.")] = (160, 160, 48),
    spacing_mm: Annotated[tuple[float, float, float], typer.Option(help="Voxel size in mm.")] = (2.0, 2.0, 2.0),
) -> None:
    from segbundles.phantoms.left_atrium import make_phantom

    _show_prepared(make_phantom(out, cases, seed, size, spacing_mm, track=partial(_track, description="Drawing")))


@phantom_app.command("brain", help=PHANTOMS["brain"])
def brain(
    out: PhantomOut,
    cases: Annotated[int, typer.Option(help="Number of patients, 4 or more.")] = 12,
    seed: Seed = 0,
    size: Size = (64, 64),
    slices: Annotated[int, typer.Option(help="Slices per patient, give or take a fifth.")] = 10,
) -> None:
    from segbundles.phantoms.brain import make_phantom

    _show_prepared(make_phantom(out, cases, seed, size, slices, track=partial(_track, description="Drawing")))


@phantom_app.command("em", help=PHANTOMS["em"])
def em(
    out: PhantomOut,
    sections: Annotated[int, typer.Option(help="Number of sections, 3 or more.")] = 12,
    seed: Seed = 0,
    size: Size = (128, 128),
) -> None:
    from segbundles.phantoms.em import make_phantom

    _show_prepared(make_phantom(out, sections, seed, size))


@phantom_app.command("polyp", help=PHANTOMS["polyp"])
def polyp(
    out: PhantomOut,
    sequences: Annotated[int, typer.Option(help="Number of sequences, 3 or more.")] = 12,
    frames: Annotated[int, typer.Option(help="Frames per sequence.")] = 5,
    seed: Seed = 0,
    size: Size = (96, 72),
) -> None:
    from segbundles.phantoms.polyp import make_phantom

    _show_prepared(make_phantom(out, sequences, frames, seed, size))


def _track(items: Sequence[Any], description: str) -> Iterable[Any]:
    return track(items, description, console=_console(stderr=True))


def _console(stderr: bool = False) -> Console:
    # in a log file or a pipe rich would wrap at 80 columns and break paths
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else 160)


def _show_error(error: ValueError) -> None:
    console = _console(stderr=True)
    message = str(error)
    if isinstance(error, DataFaults):
        table = Table("Case", "File", "Fault")
        for fault in error.faults[:_MOST_FAULTS]:
            table.add_row(*(escape(text) for text in (fault.case, error.shown(fault), fault.problem)))
        if (rest := len(error.faults) - _MOST_FAULTS) > 0:
            table.add_row("...", "...", f"and {rest} more")
        console.print(table)
        message = error.summary
    console.print(f"ERROR: {message}", highlight=False, markup=False, soft_wrap=True)


def _show_prepared(prepared: Prepared) -> None:
    console = _console()
    table = Table("Split", *(unit.capitalize() for unit in prepared.units), title=escape(prepared.datalist["name"]))
    for split in SPLITS:
        entries = prepared.datalist[split]
        table.add_row(split, str(len(entries)), str(len({entry["group"] for entry in entries})))
    console.print(table)
    for fact, text in prepared.facts.items():
        console.print(f"{fact}: {text}", highlight=False, markup=False)
    for note in prepared.notes:
        console.print("[yellow]note:[/yellow]", escape(note), highlight=False)
    console.print(f"wrote {prepared.path}", highlight=False, markup=False, soft_wrap=True)


def main() -> None:
    """Run the command line."""
    # errors are also logged; without any handler Python would print them a second time
    logging.getLogger("segbundles").addHandler(logging.NullHandler())
    app()

"""The command line: `embedding-estimate fit | batch | measure | parse | inspect | demo | ui`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn, TextIO

from lib_estimate.errors import EstimateError
from lib_estimate.files import lists
from lib_estimate.files.destination import first_name, free_path
from lib_estimate.files.places import check_place
from lib_estimate.interfaces import show
from lib_estimate.request import MEASURED_BY, EstimateRequest, ModelOptions, Use

log = logging.getLogger(__name__)

CHECKOUT = Path(__file__).parents[2]
DEMO_MODEL = CHECKOUT / "tests" / "shapes_sd" / "shapes_sd.safetensors"
DEMO_PROMPT = "a (small:1.5) red circle to the left of a large blue star"
SHORT_FLAGS = {"learning_rate": "--lr", "continue_from": "--continue"}
PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status. Results go to stdout, progress and notes to stderr, where anything
    wrong is one sentence."""
    sys.stdout.reconfigure(errors="backslashreplace")  # what others put into files need not be printable here
    args = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.DEBUG if args.verbose else logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        return args.run(args)
    except EstimateError as error:
        log.debug("Trace:", exc_info=True)
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("Interrupted. Nothing was saved.", 130)
    except MemoryError:
        return _fail("Out of memory. Use smaller --width and --height, a smaller --batch, or --dtype float16.")
    except Exception as error:
        log.debug("Trace:", exc_info=True)
        if "out of memory" in str(error).lower():
            return _fail(
                "The GPU is out of memory. Use smaller --width and --height, a smaller --batch, or --dtype float16."
            )
        return _fail(f"Unexpected {type(error).__name__}: {error} (add --verbose for the whole trace)")


def _fail(sentence: str, status: int = 1) -> int:
    sys.stderr.write(f"error: {sentence}\n")
    return status


# ---- arguments ----------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="embedding-estimate", description="Turns a prompt, with its emphasis, into one word.")
    parser.add_argument("--version", action="version", version=f"embedding-estimate {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    fit = commands.add_parser("fit", help="estimate an embedding from a prompt")
    fit.add_argument("prompt", metavar="PROMPT", help=_help(EstimateRequest, "prompt"))
    _add_fields(fit, ModelOptions)
    _add_fields(fit, EstimateRequest, skip=("prompt",))
    _add_output(fit)
    fit.set_defaults(run=_fit)

    batch = commands.add_parser("batch", help="estimate an embedding for each line of a file")
    batch.add_argument(
        "file", type=Path, metavar="FILE", help="styles.csv of a webui, text with name, tab, prompt, or JSON"
    )
    batch.add_argument("--prompt", default="", help="the prompt that styles and negative prompts will stand beside")
    _add_fields(batch, ModelOptions)
    _add_fields(batch, EstimateRequest, skip=("prompt", "name"))
    batch.add_argument("--table", type=Path, metavar="FILE.csv", help="write the table of results as csv, too")
    batch.set_defaults(run=_batch)

    measure = commands.add_parser("measure", help="measure an embedding file against a prompt")
    measure.add_argument("file", type=Path, metavar="FILE", help="the embedding")
    measure.add_argument(
        "prompt",
        metavar="PROMPT",
        help="the prompt it should behave like (with --target negative: the prompt beside it)",
    )
    _add_fields(measure, ModelOptions)
    _add_fields(measure, EstimateRequest, only=MEASURED_BY)
    _add_output(measure)
    measure.set_defaults(run=_measure)

    parse = commands.add_parser("parse", help="show how prompts are read")
    parse.add_argument("prompts", nargs="+", metavar="PROMPT")
    parse.add_argument("--steps", type=int, default=20, help="sampling steps, for prompt editing (default: 20)")
    parse.add_argument("--json", action="store_true", help="print JSON")
    parse.set_defaults(run=show.parse)

    inspect = commands.add_parser("inspect", help="show what an embedding file holds")
    inspect.add_argument("file", type=Path, metavar="FILE")
    inspect.add_argument(
        "--model", default="", help="model whose words the vectors are held against; without it, only lengths are shown"
    )
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=show.inspect)

    demo = commands.add_parser("demo", help="the main job on the small model that comes with the project")
    demo.add_argument("--out", type=Path, default=Path("embedding-estimate-demo"), help="folder for the results")
    demo.set_defaults(run=_demo)

    ui = commands.add_parser("ui", help="open the tab in a browser, without a webui")
    _add_fields(ui, ModelOptions, skip=("model",))
    ui.add_argument(
        "--model", action="append", metavar="MODEL",
        help="checkpoint (default: the small model of the project). May be given again, as for fit",
    )  # fmt: skip
    ui.add_argument("--out", default=EstimateRequest.out, help=_help(EstimateRequest, "out"))
    ui.add_argument("--port", type=int, default=7865, help="port on this computer (default: 7865)")
    ui.add_argument("--no-browser", action="store_true", help="don't open a browser")
    ui.add_argument("--api", action="store_true", help="serve the HTTP API as well, under /embedding-estimate/v1/")
    ui.add_argument("--api-auth", metavar="USER:PASSWORD", help="who may use it; several with commas between them")
    ui.set_defaults(run=_ui)
    for command in commands.choices.values():
        command.add_argument("--verbose", action="store_true", help="log details and traces")
    return parser


def _version() -> str:
    with suppress(PackageNotFoundError):
        return version("embedding-estimate")
    text = (CHECKOUT / "pyproject.toml").read_text(encoding="utf-8")  # run from a checkout, not installed
    return re.search(r'(?m)^version = "(.+)"$', text)[1]


def _add_fields(parser: argparse.ArgumentParser, source: type, skip: tuple = (), only: tuple | None = None) -> None:
    """One flag per field of a request, with the field's own default, choices and help."""
    for item in dataclasses.fields(source):
        if item.name in skip or (only is not None and item.name not in only):
            continue
        names = [*([SHORT_FLAGS[item.name]] if item.name in SHORT_FLAGS else []), "--" + item.name.replace("_", "-")]
        default = item.default.value if isinstance(item.default, Enum) else item.default
        shown = "" if default is False or default in ("", ()) else f" (default: {default})"
        text = item.metadata["help"].replace("%", "%%") + shown
        if isinstance(item.default, tuple) or item.name == "model":
            given = {"dest": item.name, "help": text, "metavar": item.name.upper(), "required": item.name == "model"}
            parser.add_argument(*names, action="append", **given)
            continue
        if item.default is False:
            parser.add_argument(*names, dest=item.name, action="store_true", help=text)
            continue
        # A number or one of some words is checked by the request itself.
        fixed = item.metadata["choices"] if item.metadata["low"] is None else None
        parser.add_argument(
            *names, dest=item.name, help=text, default=default, choices=fixed, type=_converter(item),
            required=item.name == "name",
            metavar=None if fixed else item.name.upper(),
        )  # fmt: skip


def _converter(item: dataclasses.Field) -> Any:
    kind = type(item.default)
    if issubclass(kind, str) and item.metadata["low"] is not None:  # a number, or a word such as init_text

        def number_or_word(text: str) -> int | str:
            return int(text) if text.lstrip("-").isdigit() else text

        return number_or_word
    return str if issubclass(kind, str) else kind


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON; - prints it")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="save the pictures side by side as PNG")


def _help(source: type, name: str) -> str:
    return next(item.metadata["help"] for item in dataclasses.fields(source) if item.name == name)


def _filled(source: type, args: argparse.Namespace) -> Any:
    """A request or model options from the parsed flags."""
    values = {}
    for item in dataclasses.fields(source):
        if hasattr(args, item.name):
            value = getattr(args, item.name)
            kind = type(item.default)
            values[item.name] = kind(value or ()) if issubclass(kind, (Enum, tuple)) else value
    return source(**values)


def _checkpoints(args: argparse.Namespace) -> list[ModelOptions]:
    """The options of each model that was given."""
    known: set[Path] = set()
    for model in args.model:
        if Path(model).resolve() in known:
            raise EstimateError(f"--model {model} is given twice: leave one of them out.")
        known.add(Path(model).resolve())
    rest = {name: value for name, value in vars(args).items() if name != "model"}
    return [_filled(ModelOptions, argparse.Namespace(**rest, model=model)) for model in args.model]


# ---- commands -----------------------------------------------------------------------------------------------------


def _fit(args: argparse.Namespace) -> int:
    request = _filled(EstimateRequest, args)
    first = replace(request, name=first_name(request))
    free_path(first.validate())  # torch takes seconds to load
    _check_output(args)

    from lib_estimate import job

    job.check_destination(first)  # before the model is loaded
    outcome = _run(request, _checkpoints(args))
    _results(args).write(_summary(outcome))
    _output(args, outcome.record, outcome.fidelity, outcome.title)
    return 0


def _batch(args: argparse.Namespace) -> int:
    request, options = _filled(EstimateRequest, args), _checkpoints(args)
    listed = lists.read(args.file, request)

    from lib_estimate.interfaces import many

    return many.run(args.file, listed, request, options, args.table, _Bars, _interrupts)


def _run(
    request: EstimateRequest, options: Sequence[ModelOptions], errors: list[tuple[int, float]] | None = None
) -> Any:
    """Runs an estimate with progress bars on stderr; returns its Outcome. options: of each checkpoint."""
    from lib_estimate import job, words
    from lib_estimate.hosts.several import together
    from lib_estimate.hosts.standalone import StandaloneHost
    from lib_estimate.progress import Cancel, StepReport

    host = together([StandaloneHost(each, Path(request.out)) for each in options])
    cancel, before, last = Cancel(), 0, 0
    with _interrupts(cancel), _Bars() as bars:
        for progress in words.estimate(request, host, cancel):
            if isinstance(progress, job.Outcome):
                return progress
            bars.show(progress)
            if errors is None or not isinstance(progress, StepReport):
                continue
            if progress.step <= last - before:  # another stage, and another measure
                before = last
                errors.append((before, math.nan))
            last = before + progress.step
            if progress.error is not None:
                errors.append((last, progress.error))
    raise AssertionError("an estimate ends with an Outcome")


@contextmanager
def _interrupts(cancel: Any) -> Iterator[None]:
    """Ctrl-C stops the learning and saves the best vectors; a second one stops at once."""

    def stop(*_: object) -> None:
        if cancel.wanted is not None:
            raise KeyboardInterrupt
        sys.stderr.write("\nStopping; the best vectors so far are saved. Press Ctrl-C again to drop everything.\n")
        cancel.save()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _Bars:
    """A tqdm bar per phase; none where stderr is no terminal."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.name = ""

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def show(self, progress: Any) -> None:
        if hasattr(progress, "text"):
            self.__exit__()
            self.name = ""
            sys.stderr.write(f"note: {progress.text}\n")
            return
        if hasattr(progress, "costs"):
            return
        learning = hasattr(progress, "loss")
        name = f"Learning ({progress.part})" if learning else progress.name
        done, total = (progress.step, progress.steps) if learning else (progress.done, progress.total)
        if name != self.name:
            from tqdm import tqdm

            self.__exit__()
            self.bar, self.name = tqdm(total=total, desc=f"{name:<26}", file=sys.stderr, disable=None), name
        self.bar.update(done - self.bar.n)
        if learning:
            self.bar.set_postfix(loss=f"{progress.loss:.4f}", error=f"{progress.best_error:.4f}", refresh=False)


def _check_output(args: argparse.Namespace) -> None:
    """Refuses files that couldn't be written at the end."""
    for flag, file in (("--json", args.json), ("--sheet", args.sheet)):
        if file and str(file) != "-":
            check_place(Path(file), flag, in_place=True)
    if args.sheet and args.sheet.suffix.lower() not in PICTURES:
        raise EstimateError(f"--sheet is {args.sheet}: its name must end in {', '.join(PICTURES)}.")


def _output(args: argparse.Namespace, record: dict[str, Any], fidelity: Any, name: str) -> None:
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    try:
        if args.sheet and fidelity.pictures:
            _save_sheet(args.sheet, fidelity, record["prompt"], name)
        if args.json == "-":
            sys.stdout.write(text)
        elif args.json:
            Path(args.json).parent.mkdir(parents=True, exist_ok=True)
            Path(args.json).write_text(text, encoding="utf-8")
    except OSError as error:
        raise EstimateError(
            f"{error.filename or 'The output'} was not written: {error.strerror or error}. All else is done."
        ) from error


def _save_sheet(path: Path, fidelity: Any, prompt: str, name: str) -> None:
    from lib_estimate.report.in_words import REFERENCES
    from lib_estimate.report.plots import below_each_other, sheet

    path.parent.mkdir(parents=True, exist_ok=True)
    titles = {"prompt": prompt, "embedding": name, **REFERENCES}
    sheets = [sheet(row.fidelity.pictures, titles | {"prompt": row.name}) for row in fidelity.checkpoints]
    below_each_other(sheets or [sheet(fidelity.pictures, titles)]).save(path)


def _results(args: argparse.Namespace) -> TextIO:
    """Where sentences about the result go: not among the JSON."""
    return sys.stderr if args.json == "-" else sys.stdout


def _summary(outcome: Any) -> str:
    from lib_estimate.job import cost_sentence
    from lib_estimate.report.in_words import result_sentence

    settings = outcome.record["settings"]
    cost = cost_sentence(outcome.record["forwards"], settings["sampling_steps"], settings["cfg_scale"])
    said = result_sentence(outcome.fidelity, outcome.title)
    saved = "".join(f"Saved {path}\n" for path in (outcome.path, *outcome.others))
    use = "".join(f"Write in your {side}: {text}\n" for side, text in outcome.written.items())
    return f"{saved}{said}\n{cost}\n{use}"


def _measure(args: argparse.Namespace) -> int:
    request = _filled(EstimateRequest, args)
    request.validate()
    _check_output(args)

    from lib_estimate.files import reading
    from lib_estimate.hosts.several import together
    from lib_estimate.hosts.standalone import StandaloneHost
    from lib_estimate.measuring import measured, measurement
    from lib_estimate.report.fidelity import Fidelity
    from lib_estimate.report.in_words import result_sentence

    embedding = reading.load(args.file)
    host = together([StandaloneHost(each, args.file.parent) for each in _checkpoints(args)])
    with _Bars() as bars:
        for progress in measured(embedding, request, host):
            if isinstance(progress, Fidelity):
                fidelity = progress
            else:
                bars.show(progress)
    _output(args, measurement(args.file, embedding, request, fidelity), fidelity, embedding.name)
    _results(args).write(result_sentence(fidelity, embedding.name) + "\n")
    return 0


def _demo(args: argparse.Namespace) -> int:
    from lib_estimate.errors import ModelError
    from lib_estimate.report.plots import curve

    if not DEMO_MODEL.exists():
        raise ModelError(f"The demo's model is not at {DEMO_MODEL}: run the demo from a checkout of the project.")
    request = EstimateRequest(
        prompt=DEMO_PROMPT, name="demo-star", out=str(args.out), overwrite=True, use=Use.WHOLE, images=4
    )
    errors: list[tuple[int, float]] = []
    sys.stderr.write(f"Estimating {DEMO_PROMPT!r} on the small model; this takes about a minute.\n")
    outcome = _run(request, [ModelOptions(model=str(DEMO_MODEL))], errors)
    sheet, plot = args.out / "demo-star.sheet.png", args.out / "demo-star.curve.png"
    _save_sheet(sheet, outcome.fidelity, DEMO_PROMPT, request.name)
    curve(plot, outcome.losses, errors, outcome.fidelity.unweighted_noise)
    sys.stdout.write(
        f"{_summary(outcome)}\n"
        f"{outcome.path}\n    the embedding: a webui uses it by writing {request.name} in a prompt\n"
        f"{sheet}\n    the same noise under the prompt, the embedding and the prompt without its weights: "
        "the first two columns should look alike, the third differs\n"
        f"{plot}\n    how the error fell while learning; the dashed line is the prompt without its weights\n"
    )
    return 0


def _ui(args: argparse.Namespace) -> int:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        from lib_estimate.interfaces import api, standalone_tab
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise EstimateError("The tab needs Gradio: pip install -e '.[ui]'") from error
    args.model = args.model or [str(DEMO_MODEL)]
    if args.api_auth is not None and not args.api:
        raise EstimateError("--api-auth is of the HTTP API: give --api, too.")
    accounts = api.read_accounts(args.api_auth) if args.api else None
    standalone_tab.launch(_checkpoints(args), args.out, args.port, browser=not args.no_browser, accounts=accounts)
    return 0

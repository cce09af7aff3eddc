"""The command line: cc4s run, train, evaluate, predict, export, pseudo-label, scribble, demo, ladder, compare, tune,
inspect."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from cc4s.errors import UserError

# Exit codes: 0 done, 1 a defect of the program, 2 bad input, 130 interrupted.
BAD_INPUT = 2
INTERRUPTED = 130

_RUN_EXAMPLES = """examples:
  cc4s run acdc --data data/acdc_scribble --out runs/acdc
  cc4s run msrc21 --data data/msrc21 --out runs/msrc21 budget=smoke
  cc4s run folder --data my_data --out runs/mine train.batch_size=8 loss.entropy=0.5
  cc4s run my_recipe.yaml --data my_data --out runs/mine

A run that was interrupted goes on when the same command is given again.
Every key of the configuration can be set; `cc4s run DATASET --print-config` shows them all.
Several devices: torchrun --nproc-per-node 2 -m cc4s run ...
"""


class _Parser(argparse.ArgumentParser):
    """Errors are one line and exit with 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected integers such as 0,1,2") from error


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected numbers such as 0.75,1,1.25") from error


def _names(text: str) -> list[str]:
    return text.split(",")


def _version() -> str:
    from importlib.metadata import version

    return version("cc4s")


def _add_recipe(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    names = "voc2012, pascal_context, acdc, msrc21, folder, synthetic, or a .yaml recipe"
    if optional:
        names += "; by default the checkpoint's own"
    parser.add_argument(
        "words",
        nargs="*" if optional else "+",
        metavar="DATASET [key=value ...]",
        help=f"{names}; then configuration",
    )


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="DIR", help="the data folder, only read (not for synthetic)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run's folder; runs/DATASET by default")
    parser.add_argument("--budget", metavar="smoke|short|cpu|full", help="the same as budget=...")
    _add_device_options(parser)


def _add_device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", metavar="auto|cpu|cuda", help="the same as device=...")
    parser.add_argument(
        "--kernels",
        metavar="auto|reference|cpu|triton|cuda",
        help="the same as kernels=...",
    )


def _add_crf(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--crf",
        nargs="?",
        const="exact",
        choices=("exact", "lattice"),
        help="dense CRF on the probabilities: exact (the default; on a CPU on a reduced grid, crf.cpu_size), or the "
        "lattice of the package pydensecrf",
    )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="cc4s", description="Train and use segmenters from scribbles (CC4S).", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"cc4s {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], None], text: str, **options: Any) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **options,
        )
        command.set_defaults(run=run)
        return command

    run = add("run", _run, "Train, evaluate and report: the whole method, resumable.", epilog=_RUN_EXAMPLES)
    _add_recipe(run)
    _add_run_options(run)
    run.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")

    train = add("train", _train, "Train stages without evaluation or report; also under torchrun.")
    _add_recipe(train)
    _add_run_options(train)
    train.add_argument("--stage", help="stop after this stage (ur, ss, ur2, ss2); all by default")

    evaluate = add("evaluate", _evaluate, "Metrics of a checkpoint (ours or the authors') on the evaluation split.")
    _add_recipe(evaluate, optional=True)
    evaluate.add_argument(
        "--checkpoint", type=Path, required=True, metavar="FILE", help="a .pt or the authors' .pth.tar"
    )
    evaluate.add_argument("--data", metavar="DIR", help="the data folder; by default the one of the training")
    evaluate.add_argument("--out", type=Path, metavar="FILE", help="write the metrics as JSON")
    _add_crf(evaluate)
    _add_device_options(evaluate)

    predict = add("predict", _predict, "Masks and overlays for images of any size.")
    predict.add_argument(
        "--checkpoint", type=Path, required=True, metavar="FILE", help="a .pt or the authors' .pth.tar"
    )
    predict.add_argument("inputs", nargs="+", metavar="IMAGE", help="image files or folders; key=value words as in run")
    predict.add_argument("--out", type=Path, required=True, metavar="DIR", help="masks/ and overlays/ go here")
    predict.add_argument("--scales", type=_numbers, metavar="S,S,...", help="scales of the multi-scale average")
    predict.add_argument(
        "--flip", action=argparse.BooleanOptionalAction, default=None, help="average with the mirrored image"
    )
    predict.add_argument("--window", type=int, metavar="PIXELS", help="side of the sliding window")
    predict.add_argument("--stride", type=float, metavar="SHARE", help="stride as a share of the window")
    predict.add_argument("--long-side", type=int, metavar="PIXELS", help="long side at scale 1; 0 keeps the size")
    predict.add_argument("--no-overlays", action="store_true", help="masks only")
    _add_device_options(predict)

    export = add("export", _export, "The network as one file that runs without this package, also in ONNX Runtime.")
    export.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="a .pt or the authors' .pth.tar")
    export.add_argument("--format", required=True, choices=["torch-export", "onnx"], help="kind of file")
    export.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file: .pt2 or .onnx")

    pseudo = add("pseudo-label", _pseudo_label, "Pseudo-labels of the training images from a checkpoint.")
    _add_recipe(pseudo, optional=True)
    pseudo.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="a .pt or the authors' .pth.tar")
    pseudo.add_argument("--data", metavar="DIR", help="the data folder; by default the one of the training")
    pseudo.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the PNGs")
    pseudo.add_argument("--threshold", type=float, metavar="P", help="least probability of a label")
    _add_crf(pseudo)
    _add_device_options(pseudo)

    scribble = add("scribble", _scribble, "Make scribbles from masks, or shrink or drop existing ones.")
    kinds = scribble.add_subparsers(dest="kind", required=True, metavar="KIND")
    for kind, text, source in (
        ("generate", "strokes from index masks", "labels"),
        ("shrink", "keep a share of every stroke's length; ratio 0 leaves points", "scribbles"),
        ("drop", "drop every stroke with probability ratio", "scribbles"),
    ):
        sub = kinds.add_parser(kind, help=text, description=f"Scribbles: {text}.", allow_abbrev=False)
        sub.add_argument(
            "--data",
            type=Path,
            required=True,
            metavar="DIR",
            help=f"data folder with {source}/, or a folder of index PNGs",
        )
        sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder for the PNGs")
        if kind != "generate":
            sub.add_argument("--ratio", type=float, required=True, metavar="R", help="in [0, 1]")
        if kind != "shrink":
            sub.add_argument("--seed", type=int, default=0)

    demo = add("demo", _demo, "The whole pipeline on a built-in synthetic set, in minutes on a CPU.")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR")
    demo.add_argument("words", nargs="*", metavar="key=value", help="configuration, as in run")
    _add_device_options(demo)

    ladder = add("ladder", _ladder, "The ablation ladder: every part of the method on top of the one before.")
    _add_recipe(ladder)
    _add_run_options(ladder)
    ladder.add_argument("--seeds", type=_seeds, default=[0], metavar="0,1,2", help="one run per rung and seed")
    ladder.add_argument(
        "--rungs",
        type=_names,
        metavar="NAME,...",
        help="pce, rw, entropy, consistency, pseudo, cc4s, full, released by default; also aspp, without_entropy,"
        " without_kl, without_trace",
    )
    ladder.add_argument("--shrink", type=_numbers, default=[], metavar="R,R,...", help="runs with shrunk scribbles")
    ladder.add_argument("--drop", type=_numbers, default=[], metavar="P,P,...", help="runs with dropped scribbles")
    ladder.add_argument(
        "--results", type=Path, metavar="FILE", help="the JSON file that runs are added to; ladder.json by default"
    )
    ladder.add_argument("--minutes", type=float, metavar="M", help="stop after M minutes; the same command goes on")

    compare = add("compare", _compare, "Methods side by side: score, images per second, peak memory; resumable.")
    _add_recipe(compare)
    _add_run_options(compare)
    compare.add_argument(
        "--methods", type=_names, required=True, metavar="NAME,...", help="values of method=, such as pce,potts,cc4s"
    )
    compare.add_argument("--seeds", type=_seeds, default=[0], metavar="0,1,2", help="one run per method and seed")

    tune = add("tune", _tune, "Search the weights of the losses on the validation split (recipes/tuning.yaml).")
    _add_recipe(tune)
    _add_run_options(tune)
    tune.add_argument("--trials", type=int, default=8, metavar="N", help="8 by default; the recipe is the first")
    tune.add_argument("--seed", type=int, default=0, help="of the draws and of the training")
    tune.add_argument(
        "--results", type=Path, metavar="FILE", help="the JSON file of the trials, tuning.json by default"
    )
    tune.add_argument("--minutes", type=float, metavar="M", help="stop after M minutes; the same command goes on")

    inspect = add("inspect", _inspect, "Why a rung helps or not: gradients of the terms, the walk, eigenvectors.")
    inspect.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs, or of a ladder")
    inspect.add_argument("--out", type=Path, required=True, metavar="FILE", help="FILE.json, FILE.md and FILE.png")
    return parser


def _split_words(words: Sequence[str], *, optional: bool = False) -> tuple[str | None, list[str]]:
    """DATASET and key=value words, in any order."""
    names = [word for word in words if "=" not in word]
    if len(names) > 1 or (not names and not optional):
        raise UserError(f"command line: got {' '.join(words)!r}, expected one DATASET and key=value words")
    return (names[0] if names else None), [word for word in words if "=" in word]


def _config(arguments: argparse.Namespace) -> Any:
    from cc4s.config import load_config

    recipe, overrides = _split_words(arguments.words)
    assert recipe is not None
    config = load_config(
        recipe,
        overrides,
        data__root=arguments.data,
        budget=arguments.budget,
        device=arguments.device,
        kernels=arguments.kernels,
    )
    return config


def _need_data(config: Any) -> None:
    if not config.data.root and config.data.format != "synthetic":
        raise UserError("--data: not given, expected the data folder")


def _default_out(arguments: argparse.Namespace) -> Path:
    if arguments.out is not None:
        return arguments.out
    recipe, _ = _split_words(arguments.words)
    return Path("runs") / Path(str(recipe)).stem


def _print_stages(rows: dict[str, dict[str, Any]]) -> None:
    """One line per stage: the summary numbers in percent."""
    from cc4s.report import format_percent, text_table

    columns = {"miou": "mIoU", "dice": "Dice", "volume_dice": "volume Dice", "pixel_accuracy": "pixel acc."}
    present = [key for key in columns if any(key in row for row in rows.values())]
    cells = [[name, *(format_percent(row.get(key)) for key in present)] for name, row in rows.items()]
    print(text_table(cells, ["", *(columns[key] for key in present)]), end="")


def _print_classes(metrics: dict[str, Any]) -> None:
    """One line per class: IoU and Dice in percent."""
    from cc4s.report import format_percent, text_table

    columns = {"per_class_iou": "IoU", "per_class_dice": "Dice", "per_class_volume_dice": "volume Dice"}
    present = [key for key in columns if key in metrics]
    classes = list(metrics["per_class_iou"])
    cells = [[name, *(format_percent(metrics[key][name]) for key in present)] for name in classes]
    print(text_table(cells, ["class", *(columns[key] for key in present)]), end="")


def _run(arguments: argparse.Namespace) -> None:
    from cc4s.config import to_yaml

    config = _config(arguments)
    if arguments.print_config:
        print(to_yaml(config), end="")
        return
    _need_data(config)
    from cc4s.engine.pipeline import Run

    run = Run(config, _default_out(arguments))
    metrics = run.execute()
    if run.runtime.is_main:
        _print_stages(metrics["stages"])
        print(f"report: {run.folder.report_file}")


def _train(arguments: argparse.Namespace) -> None:
    config = _config(arguments)
    _need_data(config)
    from cc4s.engine.pipeline import Run

    run = Run(config, _default_out(arguments))
    run.execute(until=arguments.stage, report=False)
    if run.runtime.is_main:
        print(f"checkpoints: {run.folder.path / 'checkpoints'}")


def _ladder(arguments: argparse.Namespace) -> None:
    from cc4s.engine.ladder import Scribbles, minutes_from_now, run_ladder

    recipe, overrides = _split_words(arguments.words)
    assert recipe is not None
    _need_data(_config(arguments))
    poorer = [Scribbles(kind, ratio) for kind in ("shrink", "drop") for ratio in getattr(arguments, kind)]
    ladder = run_ladder(
        recipe,
        _default_out(arguments),
        seeds=arguments.seeds,
        rungs=arguments.rungs,
        scribbles=poorer or (Scribbles(),),
        results=arguments.results,
        deadline=minutes_from_now(arguments.minutes),
        overrides=overrides,
        data__root=arguments.data,
        budget=arguments.budget,
        device=arguments.device,
        kernels=arguments.kernels,
    )
    if ladder:
        from cc4s.report import ladder_markdown, robustness_markdown

        print((robustness_markdown if poorer else ladder_markdown)(ladder))
        if not ladder["complete"]:
            print("time is over; the same command goes on")


def _tune(arguments: argparse.Namespace) -> None:
    from cc4s.engine.ladder import minutes_from_now
    from cc4s.engine.tuning import run_tuning

    recipe, overrides = _split_words(arguments.words)
    assert recipe is not None
    _need_data(_config(arguments))
    search = run_tuning(
        recipe,
        _default_out(arguments),
        trials=arguments.trials,
        seed=arguments.seed,
        results=arguments.results,
        deadline=minutes_from_now(arguments.minutes),
        overrides=overrides,
        data__root=arguments.data,
        budget=arguments.budget,
        device=arguments.device,
        kernels=arguments.kernels,
    )
    if search:
        from cc4s.report import tuning_markdown

        print(tuning_markdown(search))
        if "best" not in search:
            print("time is over; the same command goes on")


def _inspect(arguments: argparse.Namespace) -> None:
    from cc4s.engine.inspection import inspect_runs

    print(inspect_runs(arguments.runs, arguments.out))


def _compare(arguments: argparse.Namespace) -> None:
    from cc4s.engine.comparison import run_comparison

    recipe, overrides = _split_words(arguments.words)
    assert recipe is not None
    _need_data(_config(arguments))
    comparison = run_comparison(
        recipe,
        _default_out(arguments),
        methods=arguments.methods,
        seeds=arguments.seeds,
        overrides=overrides,
        data__root=arguments.data,
        budget=arguments.budget,
        device=arguments.device,
        kernels=arguments.kernels,
    )
    if comparison:
        from cc4s.report.comparison import comparison_markdown

        print(comparison_markdown(comparison))


def _demo(arguments: argparse.Namespace) -> None:
    from cc4s.engine.demo import TITLES, run_demo

    rows = run_demo(arguments.out, arguments.words, device=arguments.device, kernels=arguments.kernels)
    if rows:
        _print_stages({TITLES[name]: row for name, row in rows.items()})
        print(f"report: {arguments.out / 'report.html'}")


def _trained(arguments: argparse.Namespace, words: Sequence[str], recipe: str | None = None) -> Any:
    from cc4s.engine.checkpoint import load_trained

    fixed = {"device": arguments.device, "kernels": arguments.kernels}
    words = [*words, *(f"{key}={value}" for key, value in fixed.items() if value is not None)]
    return load_trained(arguments.checkpoint, words, recipe=recipe, data=getattr(arguments, "data", None))


def _evaluate(arguments: argparse.Namespace) -> None:
    from cc4s.engine.apply import evaluate_checkpoint

    recipe, words = _split_words(arguments.words, optional=True)
    if arguments.crf:
        words += ["inference.crf=true", f"crf.method={arguments.crf}"]
    metrics = evaluate_checkpoint(_trained(arguments, words, recipe), arguments.out)
    if metrics:
        _print_classes(metrics)
        _print_stages({"evaluation": metrics})


def _pseudo_label(arguments: argparse.Namespace) -> None:
    from cc4s.engine.apply import pseudo_label_folder

    recipe, words = _split_words(arguments.words, optional=True)
    if arguments.threshold is not None:
        words.append(f"pseudo.threshold={arguments.threshold}")
    if arguments.crf:
        words += ["pseudo.crf=true", f"crf.method={arguments.crf}"]
    result = pseudo_label_folder(_trained(arguments, words, recipe), arguments.checkpoint, arguments.out)
    if result:
        print(f"{result['images']} pseudo-labels, {result['coverage']:.1%} of the pixels: {arguments.out}")


def _predict(arguments: argparse.Namespace) -> None:
    from cc4s.engine.apply import predict_images

    words = [word for word in arguments.inputs if "=" in word and not Path(word).exists()]
    images = [Path(word) for word in arguments.inputs if word not in words]
    options = {
        "scales": arguments.scales,
        "flip": arguments.flip,
        "window": arguments.window,
        "stride": arguments.stride,
        "long_side": arguments.long_side,
    }
    words += [f"inference.{key}={str(value).lower()}" for key, value in options.items() if value is not None]
    count = predict_images(_trained(arguments, words), images, arguments.out, overlays=not arguments.no_overlays)
    if count:
        print(f"{count} masks: {arguments.out / 'masks'}")


def _export(arguments: argparse.Namespace) -> None:
    from cc4s.engine.checkpoint import load_trained
    from cc4s.engine.export import export

    export(load_trained(arguments.checkpoint), arguments.format, arguments.out)
    print(f"exported: {arguments.out}")


def _scribble(arguments: argparse.Namespace) -> None:
    from cc4s.data import drop_folder, generate_scribble_folder, shrink_folder

    data, out = arguments.data, arguments.out
    if arguments.kind == "generate":
        count = generate_scribble_folder(data, out, arguments.seed, progress=True)
    elif arguments.kind == "shrink":
        count = shrink_folder(data, out, arguments.ratio, progress=True)
    else:
        count = drop_folder(data, out, arguments.ratio, arguments.seed, progress=True)
    print(f"{count} scribbles: {out}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses a command line whose words may stand before, between and after the options."""
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    words = getattr(parsed, "words", getattr(parsed, "inputs", None))
    unknown = [word for word in rest if words is None or word.startswith("-")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if words is not None:
        words += rest
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code."""
    parsed = _parse(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("cc4s").setLevel(logging.INFO)
    try:
        parsed.run(parsed)
    except UserError as error:
        return _complain(str(error))
    except ModuleNotFoundError as error:
        return _complain(f"the package {error.name} is not installed: pip install 'cc4s[train]'")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _complain(f"{where}{error.strerror or error}")
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues the run", file=sys.stderr)
        return INTERRUPTED
    finally:
        _leave_processes()
    return 0


def _leave_processes() -> None:
    """Ends the process group of a distributed run, once everyone is done with it."""
    if "torch.distributed" in sys.modules:
        from torch import distributed

        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()


def _complain(message: str) -> int:
    if "DataLoader worker process" in message:
        # A loader process passes its whole traceback on; the last line is the error.
        message = message.strip().splitlines()[-1].partition("UserError: ")[2] or message
    if "tqdm" in sys.modules:
        # A bar that the error left open would share its line with the message.
        for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
            bar.close()
    # All processes of a distributed run come here with the same message.
    if os.environ.get("RANK", "0") == "0":
        print(f"cc4s: error: {' '.join(message.split())}", file=sys.stderr)
    return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())

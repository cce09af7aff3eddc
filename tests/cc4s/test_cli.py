"""The command line: what it accepts, and that bad input ends with one line, exit code 2 and nothing changed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cc4s.cli import main
from tests.cc4s.data_tools import make_folder, png
from tests.cc4s.run_tools import TINY
from tests.cc4s.test_released_checkpoint import plain, save


def digest(folder: Path) -> dict[str, str]:
    """Relative path -> content hash of everything in a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def check_refused(arguments: list[str], capsys: pytest.CaptureFixture[str], *expected: str) -> None:
    """The command ends with 2 and one line of error that holds the expected words; no traceback."""
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    lines = [line for line in error.replace("\r", "\n").splitlines() if "error:" in line]
    assert code == 2, error
    assert len(lines) == 1, error
    assert "Traceback" not in error
    for word in expected:
        assert word in lines[0], lines[0]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "data")


def run_words(data: Path, out: Path) -> list[str]:
    return ["run", "folder", "--data", str(data), "--out", str(out), *TINY]


def break_image(data: Path) -> None:
    path = data / "images" / "a.jpg"
    path.write_bytes(path.read_bytes()[:300])


def break_size(data: Path) -> None:
    png(data / "labels" / "c d.png", np.zeros((20, 20), np.uint8))


def break_value(data: Path) -> None:
    png(data / "scribbles" / "b.png", np.full((40, 56), 7, np.uint8))


def break_mode(data: Path) -> None:
    Image.new("RGB", (56, 40), (1, 2, 3)).save(data / "labels" / "ü.png")


def break_scribbles(data: Path) -> None:
    for path in (data / "scribbles").iterdir():
        png(path, np.full((40, 56), 255, np.uint8))


BROKEN_DATA: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "missing folder": (shutil.rmtree, ("data", "folder")),
    "missing images": (lambda data: shutil.rmtree(data / "images"), ("images",)),
    "empty list": (lambda data: (data / "train.txt").write_text("\n"), ("train.txt",)),
    "unknown name in list": (lambda data: (data / "train.txt").write_text("nothing\n"), ("nothing",)),
    "size mismatch": (break_size, ("c d.png", "20 x 20", "56 x 40")),
    "value out of range": (break_value, ("b.png", "7", "3 classes")),
    "colour label": (break_mode, ("ü.png", "RGB")),
    "truncated image": (break_image, ("a.jpg",)),
    "empty scribbles": (break_scribbles, ("scribbles",)),
}


@pytest.mark.parametrize("case", BROKEN_DATA)
def test_bad_data_is_one_line_and_changes_nothing(
    case: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harm, expected = BROKEN_DATA[case]
    out = tmp_path / "out"
    harm(data)
    check_refused(run_words(data, out), capsys, *expected)
    assert not out.exists() or digest(out).keys() <= {".lock"}


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("trian.batch_size=2", ("trian.batch_size", "train.batch_size")),
        ("train.batchsize=2", ("train.batchsize", "did you mean train.batch_size")),
        ("train.batch_size=two", ("train.batch_size", "two")),
        ("train.batch_size=-1", ("train.batch_size", "-1")),
        ("train.compile=perhaps", ("train.compile", "perhaps")),
        ("augment.scale_min=nan", ("augment.scale_min", "nan")),
        ("stages.7.lr=1", ("stages.7",)),
        ("method=magic", ("method", "magic", "cc4s")),
        ("budget=huge", ("budget", "huge", "smoke")),
        ("model.backbone=resnet7", ("model.backbone", "resnet7")),
        ("model.backbone_weights=nowhere.pth", ("nowhere.pth",)),
        ("loss.relaxation=cubic", ("loss.relaxation", "cubic")),
    ],
)
def test_bad_configuration_names_the_key(
    word: str, expected: tuple[str, ...], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refused([*run_words(data, tmp_path / "out"), word], capsys, *expected)
    assert not (tmp_path / "out").exists()


def test_recipe_files_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("dataset: folder\ntrain: {learning: 3}\n")
    check_refused(["run", str(recipe), "--data", "."], capsys, "mine.yaml", "train.learning")
    recipe.write_text("dataset: [unclosed\n")
    check_refused(["run", str(recipe), "--data", "."], capsys, "mine.yaml")
    check_refused(["run", str(tmp_path / "none.yaml"), "--data", "."], capsys, "none.yaml")
    check_refused(["run", "imagenet", "--data", "."], capsys, "imagenet", "voc2012")


def test_missing_data_option(capsys: pytest.CaptureFixture[str]) -> None:
    check_refused(["run", "acdc"], capsys, "--data")
    check_refused(["run", "acdc", "--nonsense"], capsys, "--nonsense")
    check_refused(["fly"], capsys, "fly")


def test_foreign_and_other_output_folders_are_left_alone(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    check_refused(run_words(data, out), capsys, str(out), "not empty")
    assert (out / "thesis.tex").read_text() == "precious"

    (out / "thesis.tex").unlink()
    assert main(["train", *run_words(data, out)[1:], "--stage", "ur"]) == 0
    before = digest(out)
    check_refused([*run_words(data, out), "seed=5"], capsys, str(out), "seed")
    assert digest(out) == before


def test_checkpoint_of_another_architecture(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["train", *run_words(data, out)[1:], "--stage", "ur"]) == 0
    checkpoint = out / "checkpoints" / "ur.pt"
    evaluate = ["evaluate", "--checkpoint", str(checkpoint), "--data", str(data)]
    assert main(evaluate) == 0
    check_refused([*evaluate, "model.backbone=resnet34"], capsys, "ur.pt", "not the weights of this architecture")
    check_refused(["evaluate", "--checkpoint", "none.pt", "--data", str(data)], capsys, "none.pt", "no such file")

    other = make_folder(tmp_path / "other", classes=4)
    check_refused(["evaluate", "--checkpoint", str(checkpoint), "--data", str(other)], capsys, "classes")

    torch.save({"weights": torch.zeros(3)}, tmp_path / "plain.pt")
    check_refused(["evaluate", "--checkpoint", str(tmp_path / "plain.pt"), "--data", str(data)], capsys, "plain.pt")
    (tmp_path / "torn.pt").write_bytes(checkpoint.read_bytes()[:1000])
    check_refused(["evaluate", "--checkpoint", str(tmp_path / "torn.pt"), "--data", str(data)], capsys, "torn.pt")


def test_authors_checkpoint_on_voc(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Evaluated and used as it is, on a VOC tree; the numbers are those of the network applied by hand."""
    network = plain(layers=18, classes=21)
    checkpoint = save(network, tmp_path / "authors.pth.tar")
    plain_layout = make_folder(tmp_path / "plain", names=("x", "y"), classes=21)
    voc = tmp_path / "VOCdevkit" / "VOC2012"
    (voc / "ImageSets" / "Segmentation").mkdir(parents=True)
    (plain_layout / "images").rename(voc / "JPEGImages")
    (plain_layout / "labels").rename(voc / "SegmentationClassAug")
    (voc / "ImageSets" / "Segmentation" / "val.txt").write_text("x\ny\n")
    out = tmp_path / "metrics.json"
    words = ["evaluate", "--checkpoint", str(checkpoint), "--data", str(tmp_path / "VOCdevkit"), "--out", str(out)]
    assert main([*words, "inference.scales=[1.0]", "inference.long_side=0"]) == 0
    assert "aeroplane" in capsys.readouterr().out
    metrics = json.loads(out.read_text())

    right = total = 0
    for name in ("x", "y"):
        with Image.open(voc / "JPEGImages" / f"{name}.jpg") as image:
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        with torch.no_grad():
            logits = network.eval()(((pixels - mean[:, None, None]) / std[:, None, None])[None])
        logits = logits[0] if isinstance(logits, tuple) else logits
        logits = torch.nn.functional.interpolate(logits, pixels.shape[1:], mode="bilinear", align_corners=True)
        with Image.open(voc / "SegmentationClassAug" / f"{name}.png") as label:
            truth = np.array(label)
        right += int((logits[0].argmax(0).numpy() == truth)[truth != 255].sum())
        total += int((truth != 255).sum())
    # Ties aside, the same argmax: one pixel of rounding at most.
    assert metrics["pixel_accuracy"] == pytest.approx(right / total, abs=1 / total)
    predict = ["predict", "--checkpoint", str(checkpoint), str(voc / "JPEGImages"), "--out", str(tmp_path / "masks")]
    assert main([*predict, "--scales", "1"]) == 0
    assert len(list((tmp_path / "masks" / "masks").iterdir())) == 2


class _Harm:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('pickled code ran')",))


def test_pickled_code_is_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": _Harm()}, tmp_path / "harm.pt")
    check_refused(["evaluate", "--checkpoint", str(tmp_path / "harm.pt"), "--data", str(data)], capsys, "harm.pt")


def test_full_disk_is_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert main(["train", *run_words(data, out)[1:], "--stage", "ur"]) == 0
    before = digest(out)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    check_refused(["train", *run_words(data, out)[1:], "--stage", "ss"], capsys, "No space left on device")
    after = digest(out)
    # Nothing that was there is lost; no half-written file stays. The log grows by design.
    assert {k: v for k, v in before.items() if k != "log.jsonl"} == {k: v for k, v in after.items() if k != "log.jsonl"}


def test_predict_any_image_size(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["train", *run_words(data, out)[1:], "--stage", "ur"]) == 0
    images = tmp_path / "images"
    images.mkdir()
    sizes = {"tiny": (9, 11), "wide": (20, 90), "grey": (70, 40)}
    for name, (height, width) in sizes.items():
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels[..., 0] if name == "grey" else pixels).save(images / f"{name}.png")
    masks = tmp_path / "masks"
    words = ["predict", "--checkpoint", str(out / "checkpoints" / "ur.pt"), str(images), "--out", str(masks)]
    assert main([*words, "--scales", "0.5,1", "--flip", "--window", "33", "--stride", "0.5"]) == 0
    for name, size in sizes.items():
        with Image.open(masks / "masks" / f"{name}.png") as mask:
            assert mask.mode == "P"
            assert mask.size == size[::-1]
            assert np.asarray(mask).max() < 3
        with Image.open(masks / "overlays" / f"{name}.png") as overlay:
            assert overlay.size == size[::-1]
    check_refused(["predict", "--checkpoint", words[2], "none.png", "--out", str(masks)], capsys, "none.png")


def test_pseudo_labels_keep_the_scribbles(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(["train", *run_words(data, out)[1:], "--stage", "ur"]) == 0
    folder = tmp_path / "pseudo"
    words = ["pseudo-label", "--checkpoint", str(out / "checkpoints" / "ur.pt"), "--data", str(data)]
    assert main([*words, "--out", str(folder), "--threshold", "1.0"]) == 0
    for name in ("a", "b"):
        # Nothing is that certain: only the scribbles are left.
        made = np.asarray(Image.open(folder / f"{name}.png"))
        np.testing.assert_array_equal(made, np.asarray(Image.open(data / "scribbles" / f"{name}.png")))


def test_exact_crf_says_on_which_grid(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out, metrics = tmp_path / "run", tmp_path / "metrics.json"
    assert main(["train", *run_words(data, out)[1:], "--stage", "ur"]) == 0
    checkpoint = ["--checkpoint", str(out / "checkpoints" / "ur.pt"), "--data", str(data), "crf.cpu_size=24"]
    note = "exact, on a grid with a long side of at most 24 pixels (crf.cpu_size)"
    with caplog.at_level("INFO", logger="cc4s"):
        assert main(["evaluate", *checkpoint, "--out", str(metrics), "--crf"]) == 0
    assert json.loads(metrics.read_text())["crf"] == note
    assert f"dense CRF: {note}" in caplog.messages
    folder = tmp_path / "pseudo"
    assert main(["pseudo-label", *checkpoint, "--out", str(folder), "--crf", "exact"]) == 0
    assert json.loads((folder / "pseudo_labels.json").read_text())["result"]["crf"] == note
    assert main(["evaluate", *checkpoint, "--out", str(metrics)]) == 0
    assert "crf" not in json.loads(metrics.read_text())


def test_scribble_commands(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scribble", "generate", "--data", str(data), "--out", str(tmp_path / "made")]) == 0
    assert {path.name for path in (tmp_path / "made").iterdir()} == {"a.png", "b.png", "c d.png", "ü.png"}
    before = digest(data)
    for kind in ("shrink", "drop"):
        out = tmp_path / kind
        assert main(["scribble", kind, "--data", str(data), "--out", str(out), "--ratio", "0.5"]) == 0
        assert len(list(out.iterdir())) == 4
    shrunk = np.asarray(Image.open(tmp_path / "shrink" / "a.png"))
    whole = np.asarray(Image.open(data / "scribbles" / "a.png"))
    assert 0 < (shrunk != 255).sum() < (whole != 255).sum()
    assert digest(data) == before
    check_refused(
        ["scribble", "drop", "--data", str(data), "--out", str(tmp_path / "x"), "--ratio", "1.5"], capsys, "ratio"
    )
    check_refused(
        ["scribble", "drop", "--data", str(data), "--out", str(tmp_path / "made"), "--ratio", "0.9"], capsys, "made"
    )


def test_print_config_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "voc2012", "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert "crop: 465" in printed
    for words in (
        ["--help"],
        *([name, "--help"] for name in ("run", "train", "evaluate", "predict", "ladder", "compare", "demo")),
    ):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 0
        assert "usage: cc4s" in capsys.readouterr().out


def test_ladder_writes_tables(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "ladder"
    words = ["ladder", "folder", "--data", str(data), "--out", str(out), "--seeds", "0,1", "--rungs", "pce,released"]
    assert main([*words, *TINY]) == 0
    ladder = json.loads((out / "ladder.json").read_text())
    assert [(run["rung"], run["seed"]) for run in ladder["runs"]] == [
        ("pce", 0),
        ("released", 0),
        ("pce", 1),
        ("released", 1),
    ]
    assert all(0 <= run["miou"] <= 1 for run in ladder["runs"])
    assert "released" in (out / "ladder.md").read_text()


def test_outputs_that_cannot_be_written_are_refused_before_the_work(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["train", *run_words(data, out)[1:], "--stage", "ur"]) == 0
    evaluate = ["evaluate", "--checkpoint", str(out / "checkpoints" / "ur.pt"), "--data", str(data), "--out"]
    check_refused([*evaluate, str(tmp_path)], capsys, str(tmp_path), "regular file")
    check_refused([*evaluate, "/dev/null"], capsys, "/dev/null", "regular file")
    assert Path("/dev/null").is_char_device()
    predict = ["predict", "--checkpoint", str(out / "checkpoints" / "ur.pt"), str(data / "images"), "--out", str(out)]
    check_refused(predict, capsys, str(out), "folder of a run")
    check_refused(run_words(data, data / "run"), capsys, "data folder")
    assert not (data / "run").exists()
    file = tmp_path / "file"
    file.write_text("mine")
    check_refused(run_words(data, file), capsys, str(file))
    assert file.read_text() == "mine"


def test_damaged_run_files_are_named(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    words = ["train", *run_words(data, out)[1:], "--stage", "ur"]
    assert main(words) == 0
    config = (out / "config.yaml").read_text()
    (out / "config.yaml").write_text(config[:200] + "\n  [")
    check_refused(words, capsys, "config.yaml", "damaged")
    (out / "config.yaml").write_text(config)
    (out / "stages" / "ur.json").write_text("{")
    check_refused([*run_words(data, out)], capsys, "ur.json", "damaged")


@pytest.mark.parametrize(
    "words", ["inference.crf=true crf.method=lattice", "data.volume_pattern=(", "report.wandb=true"]
)
def test_what_only_later_stages_need_is_checked_first(
    words: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    check_refused([*run_words(data, out), *words.split()], capsys, words.split()[-1].split("=")[0])
    assert not (out / "log.jsonl").exists()

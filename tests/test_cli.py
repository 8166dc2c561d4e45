"""Flags and files become settings; bad input is one line and an exit code; every command runs."""

import json
import resource
import signal
import socket
import subprocess
import sys
import time
import typing
from dataclasses import replace
from pathlib import Path

import optuna
import pytest

import elmlib
from elmlib import cli
from elmlib.config import FilterConfig, StudyPlace, SummaryTrainingConfig
from elmlib.data.records import EmbeddingFile, cache_folder, find_split, read_records
from elmlib.evaluation import sample_frame
from elmlib.inference import Elm, generate_file, newest_run
from elmlib.models import load_adapter
from elmlib.study.results import storage_address
from elmlib.study.study import StudyFailedError
from elmlib.study.trial import open_storage
from elmlib.training.loggers import read_metrics
from elmlib.training.trainer import UnstableTrainingError, train

TEXT_PATHS = ("summary_data_path", "checkpoint_dir", "resume_from", "data_dir", "llm_model_name", "source")


def test_flags_reach_the_config() -> None:
    flags = "--epochs 3 --batch-size 4 --learning-rate 1e-4 --drift-weight 0.05 --no-use-contrastive --dropout 0.2"
    flags += " --drift-target-similarity 0.8 --wandb --wandb-project p --gradient-checkpointing --no-use-bf16"
    _, config = cli.parse(["train", *flags.split()])
    assert config == SummaryTrainingConfig(
        max_epochs=3, batch_size=4, learning_rate=1e-4, text_drift_weight=0.05, use_contrastive_loss=False,
        dropout_rate=0.2, text_drift_target_similarity=0.8, use_wandb=True, wandb_project="p",
        use_gradient_checkpointing=True, use_bf16=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_field_is_a_flag_with_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.parse([name, "--help"])
    text = capsys.readouterr().out
    for field in cli.COMMANDS[name][0].__dataclass_fields__:
        assert f"--{field.replace('_', '-')}" in text


def test_config_file_gives_the_defaults_and_flags_win(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"learning_rate": 1e-4, "batch_size": 4}))
    _, config = cli.parse(["train", "--config", str(path), "--batch-size", "8"])
    assert (config.learning_rate, config.batch_size, config.max_epochs) == (1e-4, 8, 2)


def test_resuming_takes_the_runs_own_settings(tiny_config: SummaryTrainingConfig) -> None:
    last = train(replace(tiny_config, max_epochs=1)).last
    _, config = cli.parse(["train", "--data-dir", tiny_config.summary_data_path, "--resume-from", str(last)])
    assert config.identity() == replace(tiny_config, max_epochs=1).identity()
    assert config.checkpoint_dir == tiny_config.checkpoint_dir


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["trian"], 2, "no command 'trian'"),
        (["train", "--epochs", "two"], 2, "two"),
        (["train", "--no-such-flag"], 2, "no-such-flag"),
        (["train", "--batch-size", "0"], 2, "batch_size is 0; expected a number from 1"),
        (
            ["generate", *["--checkpoint", "a", "--input", "b", "--output", "c", "--top-p", "2"]],
            2,
            "top_p is 2.0; expected a number",
        ),
        (["report", "--checkpoint", "a", "--output", "b.png"], 2, "expected a CSV file"),
        (["study", "--seeds", "0"], 2, "seeds is 0; expected a number from 1"),
        (["study", "--config", "no.json"], 1, "no.json"),
        (["train", "--data-dir", "no/such/folder"], 1, "no train_synthesis.jsonl: looked at"),
        (["train", "--config", "no.json"], 1, "no.json"),
        (["filter", "--input-dir", "nowhere"], 1, "nowhere/train_synthesis.jsonl does not exist"),
        (["generate", "--checkpoint", "a.safetensors", "--input", "b", "--output", "c"], 1, "a.safetensors"),
        (["evaluate", "--predictions", "p.jsonl", "--references", "r.jsonl"], 1, "no r.jsonl"),
    ],
)
def test_bad_input_is_one_clear_line(
    arguments: list[str], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == code
    output = capsys.readouterr()
    assert message in output.out + output.err
    assert "Traceback" not in output.err


def test_train_generate_and_evaluate_through_the_command(tiny_config: SummaryTrainingConfig, tmp_path: Path) -> None:
    """The guide's Manual Evaluation, on a real process for each command."""
    settings, output, scores = tmp_path / "s.json", tmp_path / "out" / "predictions.jsonl", tmp_path / "scores.json"
    settings.write_text(replace(tiny_config, max_epochs=1).to_json())
    _elm("train", "--config", settings, "--epochs", "1")
    best = Path(tiny_config.checkpoint_dir) / "best_summary_model.safetensors"
    test_file = Path(tiny_config.summary_data_path) / "test_synthesis.jsonl"  # in synthesis/, as the guide leaves out
    _elm("generate", "--checkpoint", best, "--input", test_file, "--output", output)
    assert len(output.read_text().splitlines()) == 24
    table = _elm("evaluate", "--predictions", output, "--references", test_file, "--output", scores)
    assert "shuffled" in table and "BERTScore settings" in table
    assert {"bertscore_f1", "bertscore_f1_shuffled", "bertscore_composite"} <= json.loads(scores.read_text()).keys()
    card = tmp_path / "out" / "card.csv"
    flags = ["--data-dir", tiny_config.summary_data_path, "--samples", "6", "--output", card]
    table = _elm("report", "--checkpoint", best, *flags)
    assert "chance, 1 of 24" in table and "top-1 of 24" in table and str(card.with_suffix(".png")) in table
    assert (
        card.read_text().startswith("system,")
        and card.with_name("card_texts.jsonl").is_file()
        and card.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    )
    assert best.with_name("curves.png").read_bytes().startswith(b"\x89PNG")
    assert find_split(Path(tiny_config.summary_data_path), "test").records.is_file()


def _elm(*arguments: object) -> str:
    command = [sys.executable, "-m", "elmlib.cli", *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_importing_torch_is_left_to_the_command_that_needs_it() -> None:
    code = "import sys; from elmlib import cli; cli.parse(['filter']); print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_a_package_that_is_not_installed_is_named_with_the_extra_that_brings_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)  # what importing a missing package looks like
    monkeypatch.setattr(elmlib, "study", elmlib.study)  # a new import replaces it, which has to be undone too
    for name in [name for name in sys.modules if name.startswith("elmlib.study")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["study"])
    assert stopped.value.code == 1
    assert "optuna" in capsys.readouterr().err


def test_help_lists_at_most_ten_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    commands = capsys.readouterr().out.split("commands")[1].split("presets")[0]
    listed = [line.split()[0] for line in commands.splitlines() if line.startswith("  ")]
    assert listed == list(cli.COMMANDS) and len(listed) <= 10


def test_a_dry_run_of_train_prints_settings_and_steps_and_writes_nothing(
    tiny_config: SummaryTrainingConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    flags = ["--data-dir", tiny_config.summary_data_path, "--checkpoint-dir", str(run), "--batch-size", "8"]
    cli.main(["train", *flags, "--dry-run"])
    printed = capsys.readouterr().out
    assert "96 training rows, about 24 steps of 8 rows; nothing is written" in printed and '"batch_size": 8' in printed
    assert not run.exists()
    for name in cli.COMMANDS.keys() - {"train"}:
        with pytest.raises(SystemExit) as stopped:
            cli.main([name, "--dry-run"])
        assert stopped.value.code == 2


def test_ctrl_c_saves_the_run_and_exits_with_130(tiny_config: SummaryTrainingConfig, tmp_path: Path) -> None:
    settings = tmp_path / "s.json"
    settings.write_text(replace(tiny_config, max_epochs=400, eval_interval=10_000, save_interval=10_000).to_json())
    process = subprocess.Popen(
        [sys.executable, "-m", "elmlib.cli", "train", "--config", str(settings)], stderr=subprocess.PIPE, text=True
    )
    metrics = Path(tiny_config.checkpoint_dir) / "metrics.jsonl"
    give_up = time.monotonic() + 60
    while not metrics.is_file() or metrics.read_text().count('"step"') < 30:
        assert time.monotonic() < give_up and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in errors
    result = json.loads((metrics.parent / "result.json").read_text())
    assert result["stopped"] == "interrupted"
    assert (metrics.parent / f"adapter_step_{result['steps']}.safetensors").is_file()


@pytest.mark.parametrize("error", [StudyFailedError, UnstableTrainingError])
def test_failed_work_exits_with_3(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> None:
        raise error("three trials failed alike")

    monkeypatch.setitem(cli.COMMANDS, "filter", (FilterConfig, fail))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["filter"])
    assert stopped.value.code == 3 and capsys.readouterr().err == "elm: error: three trials failed alike\n"


def test_a_bug_is_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(_: object) -> None:
        [1].remove(2)

    monkeypatch.setitem(cli.COMMANDS, "filter", (FilterConfig, bug))
    with pytest.raises(ValueError, match=r"list\.remove"):
        cli.main(["filter"])


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "s.yaml").write_text("output_dir: ~/a\n")
    (tmp_path / "s.json").write_text('{"resume_from": "~/c"}')
    for flags in (["--output-dir=~/a"], ["--config", str(tmp_path / "s.yaml")]):
        assert cli.parse(["filter", *flags]).config.output_dir == tmp_path / "a"
    assert cli.parse(["train", "--data-dir=~/b"]).config.summary_data_path == str(tmp_path / "b")
    assert cli.parse(["train", "--config=~/s.json"]).config.resume_from == str(tmp_path / "c")
    assert cli.parse(["train", "--data-dir=~/b"]).config.checkpoint_dir == "data/checkpoints"
    with pytest.raises(SystemExit):
        cli.main(["filter", "--output-dir=~no-such-user/a"])


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ELMLIB_CACHE", "~/cache")
    assert cache_folder() == tmp_path / "cache"
    for kind, _ in cli.COMMANDS.values():
        hints = typing.get_type_hints(kind)
        paths = {name: Path("~/x.csv") for name, hint in hints.items() if hint in (Path, Path | None)}
        config = kind(**paths | {name: "~/x.csv" for name in TEXT_PATHS if name in hints and name not in paths})
        for name in (*paths, *(name for name in TEXT_PATHS if name in hints)):
            assert str(getattr(config, name)) == str(tmp_path / "x.csv"), name
    address = storage_address(StudyPlace(storage="sqlite:///~/x/study.db"))
    assert address == f"sqlite:///{tmp_path}/x/study.db"


def test_a_tilde_is_the_home_folder_for_notebooks(
    trained_run: Path, tiny_config: SummaryTrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data").symlink_to(tiny_config.summary_data_path)
    (tmp_path / "run").symlink_to(trained_run)
    assert load_adapter(Path("~/run")).step == load_adapter(Path("~/run/best_summary_model.safetensors")).step
    assert newest_run({"~/run": "~/data"}) == ("~/run", "~/data")
    split = find_split(Path("~/data"), "val")
    with EmbeddingFile(Path("~/data/embeddings/val_embeddings.safetensors")) as file:
        assert list(read_records(split.records, file.num_rows))
    assert len(read_metrics(Path("~/run/metrics.jsonl"))) and len(sample_frame(Path("~/run/predictions.jsonl"), 1))
    assert generate_file(Path("~/run"), Path("~/data/val_synthesis.jsonl"), Path("~/out/a.jsonl"), progress=False) == 24
    Elm.from_pretrained("~/run").save_pretrained("~/saved")
    assert {path.name for path in tmp_path.iterdir()} == {"data", "run", "out", "saved"}


@pytest.mark.parametrize("case", ["a folder in the file's place", "a file in the folder's place", "a port in use"])
def test_an_error_of_the_system_is_one_line(
    case: str, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["filter", "--input-dir", str(small_data / "synthesis"), "--output-dir", "new/a"]
    arguments += ["--input-embeddings-dir", str(small_data / "embeddings"), "--output-embeddings-dir", "new/b"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        if case == "a folder in the file's place":
            (tmp_path / "new/a/filter_report.json").mkdir(parents=True)
        elif case == "a file in the folder's place":
            (tmp_path / "new").touch()
        else:
            open_storage("sqlite:///papermill_runs/s/study.db")
            optuna.create_study(study_name="s", storage="sqlite:///papermill_runs/s/study.db")
            arguments = ["dashboard", "--study-name", "s", "--port", str(taken.getsockname()[1])]
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
    assert stopped.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("elm: error: ")


@pytest.mark.parametrize("size", [100, 2000, 8000])
@pytest.mark.parametrize("name", ["corpus", "filter", "train", "generate", "report", "evaluate"])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    name: str, size: int, small_data: Path, trained_run: Path, tiny_config: SummaryTrainingConfig, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("ELMLIB_CACHE", str(tmp_path / "cache"))
    out, records = tmp_path / "out", find_split(small_data, "test").records
    (tmp_path / "s.json").write_text(replace(tiny_config, max_epochs=1, checkpoint_dir=str(out)).to_json())
    rows = [{"text": f"Text {i} of many.", "summary": f"Summary {i}.", "prediction": f"Text {i}."} for i in range(24)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text, data = str(tmp_path / "t.jsonl"), ["--input-dir", str(records.parent), "--input-embeddings-dir"]
    share = ["--val-fraction", "0.3", "--test-fraction", "0.3"]
    flags = {
        "corpus": ["--source", text, "--output-dir", str(out), "--output-embeddings-dir", str(out), *share],
        "filter": [*data, str(small_data / "embeddings"), f"--output-dir={out}/a", f"--output-embeddings-dir={out}/b"],
        "train": ["--config", str(tmp_path / "s.json")],
        "generate": ["--checkpoint", str(trained_run), "--input", str(records), "--output", str(out / "o.jsonl")],
        "report": ["--checkpoint", str(trained_run), "--data-dir", str(small_data), "--output", str(out / "o.csv")],
        "evaluate": ["--predictions", text, "--references", str(records), "--output", str(out / "o.json")],
    }[name]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))  # no file may be longer, as on a full disk
    code: object = 0
    try:
        cli.main([name, *flags])
    except SystemExit as stopped:
        code = stopped.code
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    told = capsys.readouterr().err.splitlines()[-1]
    assert (size > 100 and name in ("generate", "evaluate")) or (
        code == 1 and told.startswith("elm: error: ") and "File too large" in told
    )
    left = {path.name for path in out.rglob("*") if path.is_file()} if out.exists() else set()
    left = {it for it in left if not it.endswith(".partial")}  # of a corpus: whole batches, from which it goes on
    assert left <= (
        {"o.jsonl", "o.jsonl.about.json", "o.json"} if code == 0 else {"metrics.jsonl", "o.jsonl.about.json"}
    )
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_reader_that_has_seen_enough_is_no_error(small_data: Path) -> None:
    command = (
        f"{sys.executable} -m elmlib.cli train --dry-run --data-dir {small_data} | head -n 1; echo ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["{", "0"] and not done.stderr

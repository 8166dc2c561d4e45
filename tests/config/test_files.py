"""Files and presets give the settings that flags give."""

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import save_deberta, save_qwen_pair, sentences, write_split

from elmlib import cli
from elmlib.config import (
    PRESETS,
    CorpusConfig,
    EvaluateConfig,
    InputError,
    StudyConfig,
    SummaryTrainingConfig,
    base_config,
    make_config,
    preset_settings,
    read_settings,
)
from elmlib.inference.summarizer import Elm
from elmlib.models import pretrained
from elmlib.models.pretrained import encode, load_embedder
from elmlib.training.trainer import train

GUIDE = PRESETS["qwen3-4b"]


def test_a_file_says_what_flags_say_and_flags_win(tmp_path: Path) -> None:
    for name, text in (("s.json", '{"limit": 7, "val_fraction": 0.2}'), ("s.yaml", "limit: 7\nval_fraction: 0.2\n")):
        (tmp_path / name).write_text(text)
        call = cli.parse(["corpus", "--config", str(tmp_path / name), "--limit", "9"])
        assert call.config == CorpusConfig(limit=9, val_fraction=0.2)
    (tmp_path / "t.yaml").write_text("learning_rate: 0.0001\nuse_text_drift_loss: false\n")
    call = cli.parse(["train", "--config", str(tmp_path / "t.yaml"), "--epochs", "3"])
    assert call.config == SummaryTrainingConfig(learning_rate=1e-4, use_text_drift_loss=False, max_epochs=3)


def test_lists_switches_and_nothings_come_through(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("gpu_memory: [24, 80]\nuse_bf16: false\n")
    config = cli.parse(["plan", "--config", str(tmp_path / "p.yaml")]).config
    assert config.gpu_memory == (24.0, 80.0) and not config.use_bf16
    (tmp_path / "f.yaml").write_text("skip_bad: true\noutput_dir: kept\n")
    config = cli.parse(["filter", "--config", str(tmp_path / "f.yaml")]).config
    assert config.skip_bad and config.output_dir == Path("kept")
    (tmp_path / "e.json").write_text('{"predictions": "p", "references": "r", "output": null}')
    config = cli.parse(["evaluate", "--config", str(tmp_path / "e.json")]).config
    assert config == EvaluateConfig(Path("p"), Path("r"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("s.json", '{"limt": 7}', "unknown setting limt; known are source"),
        ("s.json", "{", "not valid JSON"),
        ("s.yaml", "a: [", "not valid YAML"),
        ("s.yaml", "- 1", "expected one mapping of settings, found [1]"),
    ],
)
def test_a_bad_file_is_named(
    name: str, text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["corpus", "--config", str(tmp_path / name)])
    told = capsys.readouterr().err
    assert stopped.value.code == 1 and message in told and name in told


def test_a_preset_gives_each_command_what_it_has(tmp_path: Path) -> None:
    config = cli.parse(["train", "--preset", "qwen3-4b", "--batch-size", "4"]).config
    assert (config.llm_model_name, config.embedding_dim, config.batch_size) == (GUIDE["llm_model_name"], 2560, 4)
    assert config.bertscore_model == "microsoft/deberta-xlarge-mnli" and config.use_bf16
    corpus = cli.parse(["corpus", "--preset", "qwen3-4b"]).config
    assert (corpus.embedding_model_name, corpus.embedding_batch_size) == (GUIDE["embedding_model_name"], 128)
    plan = cli.parse(["plan", "--preset", "qwen3-4b"]).config
    assert (plan.llm_model_name, plan.embedding_dim, plan.batch_size) == (GUIDE["llm_model_name"], 2560, 8)
    study = cli.parse(["study", "--preset", "qwen3-4b"]).config
    (tmp_path / "more.yaml").write_text("max_new_tokens: 99\n")
    base = base_config(study.preset, tmp_path / "more.yaml")
    assert (base.embedding_dim, base.max_new_tokens) == (2560, 99)
    with pytest.raises(InputError, match="no preset 'qwen'; there are qwen3-4b"):
        preset_settings("qwen", StudyConfig)
    assert read_settings(tmp_path / "more.yaml") == {"max_new_tokens": 99}


@pytest.mark.slow
def test_the_guides_preset_trains_on_models_of_its_architectures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen3 twice and DeBERTa, tiny and random, in the place of the three that it names."""
    llm, embedder = save_qwen_pair(tmp_path / "qwen", 2560)
    for name, folder in (
        ("llm_model_name", llm), ("embedding_model_name", embedder),
        ("bertscore_model", save_deberta(tmp_path / "bert")),
    ):  # fmt: skip
        monkeypatch.setitem(pretrained.ALIASES, GUIDE[name], str(folder))
    pairs = sentences(60, 5)
    vectors = encode(load_embedder(GUIDE["embedding_model_name"], "cpu"), [text for text, _ in pairs], 16)
    assert vectors.shape == (60, 2560)
    for split, rows in (("train", slice(0, 40)), ("val", slice(40, 60))):
        write_split(tmp_path / "data", split, pairs[rows], vectors[rows])
    config = base_config("qwen3-4b")
    result = train(replace(
        config, summary_data_path=str(tmp_path / "data"), checkpoint_dir=str(tmp_path / "run"), max_epochs=1,
        eval_samples=6, eval_nll_samples=8, max_new_tokens=6, hidden_dim=64,
    ))  # fmt: skip
    assert {"bertscore_f1", "bertscore_f1_shuffled", "drift_similarity"} <= result.metrics.keys()
    elm = Elm.from_pretrained(tmp_path / "run")
    assert len(elm.summarize(elm.embed(["A text."]))) == 1


def test_one_meaning_of_config_for_the_study_too(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text("trials: 7\ngrid: variants.yaml\npreset: qwen3-4b\n")
    config = cli.parse(["study", "--config", str(tmp_path / "study.yaml"), "--jobs", "2"]).config
    assert config == StudyConfig(trials=7, grid=Path("variants.yaml"), preset="qwen3-4b", jobs=2)
    (tmp_path / "bad.yaml").write_text("batch_size: 4\n")
    with pytest.raises(InputError, match=r"bad.yaml: unknown setting batch_size"):
        cli.parse(["study", "--config", str(tmp_path / "bad.yaml")])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trials": True}, "trials is True; expected int"),
        ({"wandb": 1}, "wandb is 1; expected bool"),
        ({"preset": "x"}, "preset is 'x'; expected one of"),
        ({"space": 3}, "space is 3; expected Path | None"),
        ({"trials": 0}, "trials is 0; expected a number from 1"),
    ],
)
def test_make_config_refuses_another_type(values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_config(StudyConfig, values)

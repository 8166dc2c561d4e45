"""The teacher says what the LLM predicts when it reads the text, and says it once."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from elmlib import teacher as module
from elmlib.config import SummaryTrainingConfig
from elmlib.data import Split, opening_split
from elmlib.losses import predict, teacher_kl
from elmlib.model import Elm
from elmlib.prompts import OPENING_TEMPLATE, prompt_ids
from elmlib.teacher import load_teacher
from elmlib.trainer import train
from elmlib.workbench import Workbench, prepare

CPU = torch.device("cpu")


@pytest.fixture
def bench(tiny_config: SummaryTrainingConfig, monkeypatch: pytest.MonkeyPatch, tmp_path) -> Workbench:
    monkeypatch.setenv("ELMLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "SHARD", 40)  # 96 rows: two whole shards and a part of one
    return prepare(tiny_config, CPU)


def naive_log_probs(elm: Elm, split: Split, row: int, text_tokens: int) -> torch.Tensor:
    """The whole prompt with the text in it, no cache, no batch, all logits: (answer tokens, vocab)."""
    text = elm.tokenizer(split.records[row].source_text, add_special_tokens=False).input_ids[:text_tokens]
    prompt, answer = split.prompts[row], split.answers[row]
    ids = torch.tensor([[*prompt.before, *text, *prompt.behind, *answer]])
    with torch.no_grad():
        logits = elm.llm(input_ids=ids, use_cache=False).logits[0]
    return logits[-len(answer) - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize("text_tokens", [3, 128])
def test_the_teacher_is_the_llm_reading_the_text(bench: Workbench, tiny_config, text_tokens: int) -> None:
    config = replace(tiny_config, teacher_top_k=5, teacher_text_tokens=text_tokens)
    teacher = load_teacher(bench.elm, bench.train, config)
    rows = [95, 0, 41, 39, 40]
    lesson = teacher(rows, CPU)
    expected = torch.cat([naive_log_probs(bench.elm, bench.train, row, text_tokens) for row in rows])
    top = expected.topk(5)
    torch.testing.assert_close(lesson.log_probs, top.values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(expected.gather(1, lesson.ids), top.values, rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_reads_the_same(bench: Workbench, tiny_config, monkeypatch, tmp_path) -> None:
    first = load_teacher(bench.elm, bench.train, tiny_config)([3, 50], CPU)
    monkeypatch.setenv("ELMLIB_CACHE", str(tmp_path / "other"))
    whole = prepare(replace(tiny_config, use_gradient_checkpointing=True), CPU)
    second = load_teacher(whole.elm, whole.train, tiny_config)([3, 50], CPU)
    torch.testing.assert_close(second.log_probs, first.log_probs, rtol=1e-4, atol=1e-4)


def test_it_is_computed_once_and_again_only_for_what_it_depends_on(bench, tiny_config, monkeypatch) -> None:
    calls = []
    reread = Elm.reread
    monkeypatch.setattr(Elm, "reread", lambda self, *given: calls.append(1) or reread(self, *given))

    def batches(elm=bench.elm, split=bench.train, **changes) -> int:
        calls.clear()
        load_teacher(elm, split, replace(tiny_config, **changes))
        return len(calls)

    assert batches() > 0
    assert batches() == 0
    assert batches(learning_rate=1e-4, seed=7, num_soft_tokens=1) == 0  # other trials share it
    assert batches(teacher_top_k=3) > 0
    assert batches(teacher_text_tokens=4) > 0
    assert batches(split=opening_split(bench.train, bench.elm.tokenizer, 6)) > 0
    with torch.no_grad():
        bench.elm.llm.base_model.layers[0].mlp.up_proj.weight.mul_(1.01)
    assert batches() > 0


def test_a_stopped_computation_goes_on_behind_its_last_whole_shard(bench, tiny_config, monkeypatch) -> None:
    write = module._write_shard
    written = []

    def fail_at_the_second(folder, *given):
        if len(written) == 1:
            np.save(folder / "ids.npy", np.zeros(1))  # half written
            raise KeyboardInterrupt
        written.append(folder.name)
        write(folder, *given)

    monkeypatch.setattr(module, "_write_shard", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        load_teacher(bench.elm, bench.train, tiny_config)
    monkeypatch.setattr(
        module, "_write_shard", lambda folder, *given: written.append(folder.name) or write(folder, *given)
    )
    load_teacher(bench.elm, bench.train, tiny_config)
    assert [name.removesuffix(".tmp") for name in written] == ["00000000", "00000040", "00000080"]


def test_a_record_without_its_text_is_named(bench: Workbench, tiny_config) -> None:
    records = list(bench.train.records)
    records[5] = replace(records[5], source_text="")
    with pytest.raises(ValueError, match=r"train-5.*has no source_text, which teacher_kl needs"):
        load_teacher(bench.elm, replace(bench.train, records=records), tiny_config)


def test_soft_tokens_that_are_the_text_have_no_divergence(bench: Workbench) -> None:
    """The loss's zero: an adapter that said exactly the text's own token embeddings would have nothing to learn."""
    split, elm = bench.train, copy.copy(bench.elm)
    elm.place = "text"
    row = 7
    text = elm.tokenizer(split.records[row].source_text, add_special_tokens=False).input_ids
    speak = torch.nn.Module()
    speak.forward = lambda embeddings: elm.table[torch.tensor([text])]
    batch = split.collate([row])
    lesson = load_teacher(elm, split, SummaryTrainingConfig())([row], CPU)
    found = predict(elm.with_adapter(speak)(batch).hidden, elm.head, batch.labels, 1, lesson.ids)
    same = teacher_kl(lesson.log_probs, found.asked_log_probs)
    torch.testing.assert_close(same, torch.zeros_like(same), rtol=0, atol=1e-5)
    other = predict(elm(batch).hidden, elm.head, batch.labels, 1, lesson.ids)
    assert teacher_kl(lesson.log_probs, other.asked_log_probs).mean() > 0.01


def test_a_run_with_the_teacher_lowers_its_divergence(tiny_config, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("ELMLIB_CACHE", str(tmp_path / "cache"))
    rows = []

    class Keep:
        def log(self, row) -> None:
            rows.append(row)

        def close(self) -> None:
            pass

    config = replace(tiny_config, use_teacher_kl=True, teacher_kl_weight=100.0, max_epochs=4, learning_rate=5e-3)
    train(config, [Keep()])
    values = [row.values["teacher_kl"] for row in rows if row.kind == "step"]
    assert min(values) > 0
    assert sum(values[-6:]) < sum(values[:6])


def test_the_opening_split_has_each_text_once_and_asks_for_its_beginning(bench: Workbench) -> None:
    twice = replace(bench.train, sources=[source // 2 for source in bench.train.sources])
    tokenizer = bench.elm.tokenizer
    opening = opening_split(twice, tokenizer, 6)
    assert len(opening) == 48
    assert opening.prompts[0] == prompt_ids(tokenizer, OPENING_TEMPLATE)
    for row in range(len(opening)):
        text = tokenizer.decode(opening.answers[row][:-1])
        assert opening.records[row].source_text.startswith(text)
        assert len(opening.answers[row]) == 7
        assert opening.answers[row][-1] == opening.prompts[row].end_of_turn
    assert torch.equal(opening.vectors([3]), twice.vectors([6]))

"""A split becomes batches of one prompt and like length; bad data is refused; no target reaches generation."""

import dataclasses
import random
import shutil
import time

import msgspec
import pytest
import safetensors.torch
import torch
from transformers import AutoTokenizer

from elmlib.config import InputError, SummaryTrainingConfig
from elmlib.data.dataset import Batch, PromptBatch, SummaryDataset, epoch_batches, load_batches, load_split
from elmlib.data.prompts import IGNORE_INDEX, TASK_TEMPLATES, PromptIds, prompt_ids
from elmlib.data.records import EmbeddingFile, Record, read_records

SUMMARY, OTHER = TASK_TEMPLATES["summary"], "Sum up:\n\n{text}\n\nIn short:"
VECTORS = torch.arange(20.0).view(5, 4)
PROMPTS = [PromptIds([1, 2], [3], 0), PromptIds([4], [5, 6], 0)]


@pytest.fixture(scope="module")
def tokenizer(tiny_llm):
    return AutoTokenizer.from_pretrained(tiny_llm)


def record(index, target, **changes):
    made = Record("summary", SUMMARY, index, target, 0, 0.3, 0.85, 5, f"source-{index}", "A text.")
    return msgspec.structs.replace(made, **changes)


def write(folder, records, vectors=VECTORS):
    """A train split directly in `folder`, and a config that reads it."""
    (folder / "train_synthesis.jsonl").write_bytes(b"".join(r.to_line() for r in records))
    safetensors.torch.save_file({"embeddings": vectors}, folder / "train_embeddings.safetensors")
    return SummaryTrainingConfig(summary_data_path=str(folder), embedding_dim=4, num_soft_tokens=2)


def make_split(lengths, sources=None, prompts=None):
    """A split in memory; row i's answer is i + 1, `lengths[i]` times, and its vector is i."""
    rows, prompts = range(len(lengths)), prompts or [PROMPTS[0]] * len(lengths)
    return SummaryDataset(
        records=[
            record(row, f"target {row}", input_prompt_template=f"{prompt.before} {{text}}")
            for row, prompt in enumerate(prompts)
        ],
        answers=[[row + 1] * length for row, length in enumerate(lengths)],
        sources=list(sources or rows),
        prompts=prompts,
        embeddings=torch.arange(float(len(lengths)))[:, None].expand(-1, 3),
        too_long=0,
        fingerprint="",
    )


def mixed_split(rows):
    """Lengths of 1 to 30 and two prompts, both at random."""
    chance = random.Random(0)
    prompts = [PROMPTS[chance.random() < 0.3] for _ in range(rows)]
    return make_split([chance.randint(1, 30) for _ in range(rows)], prompts=prompts)


def padding(split, batches):
    return sum(int((split.collate(batch).labels == IGNORE_INDEX).sum()) for batch in batches)


def test_a_split_is_read_whole_and_in_order(tiny_config, tokenizer, small_data):
    split = load_split(tiny_config, "train", tokenizer)
    with EmbeddingFile(small_data / "embeddings" / "train_embeddings.safetensors") as file:
        expected = torch.from_numpy(file.rows(0, 96).copy())
    assert split.records == list(read_records(small_data / "synthesis" / "train_synthesis.jsonl", 96))
    assert len(split) == len(split.answers) == len(split.sources) == len(split.prompts) == 96
    assert torch.equal(split.vectors(range(96)), expected)
    assert split.sources == list(range(96))
    assert split.too_long == 0
    assert all(prompt is split.prompts[0] for prompt in split.prompts)
    assert split.prompts[0] == prompt_ids(tokenizer, SUMMARY)
    assert [split[row] for row in range(96)] == list(range(96))


def test_an_answer_is_the_target_and_the_end_of_turn(tiny_config, tokenizer):
    split = load_split(tiny_config, "val", tokenizer)
    for row, answer in zip(split.records, split.answers, strict=True):
        assert tokenizer.decode(answer[:-1]) == row.target_text
        assert answer[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_both_layouts_give_the_same_split(tiny_config, tokenizer, small_data, tmp_path):
    for file in (*small_data.glob("synthesis/val_*"), *small_data.glob("embeddings/val_*")):
        shutil.copy(file, tmp_path)
    flat = load_split(dataclasses.replace(tiny_config, summary_data_path=str(tmp_path)), "val", tokenizer)
    nested = load_split(tiny_config, "val", tokenizer)
    assert (flat.records, flat.answers, flat.fingerprint) == (nested.records, nested.answers, nested.fingerprint)
    assert torch.equal(flat.vectors(range(24)), nested.vectors(range(24)))


def test_the_fingerprint_tells_data_apart(tokenizer, tmp_path):
    def fingerprint(target, vectors):
        return load_split(write(tmp_path, [record(0, target)], vectors), "train", tokenizer).fingerprint

    first = fingerprint("One.", VECTORS)
    assert fingerprint("One.", VECTORS.clone()) == first
    middle_rows_swapped = VECTORS[[0, 2, 1, *range(3, len(VECTORS))]]
    others = [fingerprint("One.", vectors) for vectors in (VECTORS + 1, middle_rows_swapped)]
    assert len({first, fingerprint("Two.", VECTORS), *others}) == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_a_vector_that_is_not_finite_or_zero_is_refused_by_its_row(tokenizer, tmp_path, value):
    vectors = VECTORS.clone()
    vectors[2] = value
    with pytest.raises(InputError, match=r"train_embeddings.safetensors: row 2 is"):
        load_split(write(tmp_path, [record(0, "One."), record(2, "Two.")], vectors), "train", tokenizer)
    load_split(write(tmp_path, [record(0, "One.")], vectors), "train", tokenizer)  # no record points to it


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_find_their_own_vectors_and_sources(tokenizer, tmp_path, dtype):
    records = [record(i, f"Row {i}.") for i in (3, 0, 3, 4)]
    records += [record(1, "No source id.", source_id=""), record(1, "Again.", source_id="")]
    split = load_split(write(tmp_path, records, VECTORS.to(dtype)), "train", tokenizer)
    assert torch.equal(split.vectors(range(6)), VECTORS[[3, 0, 3, 4, 1, 1]])
    assert split.vectors([0]).dtype == torch.float32
    assert split.sources == [0, 1, 0, 2, 3, 3]
    assert torch.equal(split.collate([5, 1]).embeddings, VECTORS[[1, 0]])
    assert split.collate([5, 1]).sources.tolist() == [3, 1]


def test_white_space_around_a_target_is_not_learned(tokenizer, tmp_path):
    split = load_split(write(tmp_path, [record(0, " \n The end. \n"), record(1, "The end.")]), "train", tokenizer)
    assert split.answers[0] == split.answers[1]


def test_rows_that_are_too_long_are_left_out_and_counted(tokenizer, tmp_path):
    records = [record(i, target) for i, target in enumerate(("a b", "a b c d e f g h", "a b c", "a"))]
    config = write(tmp_path, records)
    prompt = prompt_ids(tokenizer, SUMMARY)
    sizes = [len(prompt.before) + 2 + len(prompt.behind) + len(tokenizer(r.target_text).input_ids) + 1 for r in records]
    for limit, kept in ((sizes[1], [0, 1, 2, 3]), (sizes[1] - 1, [0, 2, 3]), (sizes[0], [0, 3])):
        split = load_split(dataclasses.replace(config, max_seq_length=limit), "train", tokenizer)
        assert split.records == [records[row] for row in kept]
        assert [answer[:-1] for answer in split.answers] == [
            tokenizer(records[row].target_text).input_ids for row in kept
        ]
        assert torch.equal(split.vectors(range(len(split))), VECTORS[kept])
        assert split.too_long == 4 - len(kept)
    with pytest.raises(InputError, match=r"train_synthesis\.jsonl: all 4 rows exceed max_seq_length 8"):
        load_split(dataclasses.replace(config, max_seq_length=8), "train", tokenizer)


def test_vectors_of_another_size_are_refused(tiny_config, tokenizer):
    with pytest.raises(InputError, match=r"train_embeddings\.safetensors holds vectors of size 384.* 2560"):
        load_split(dataclasses.replace(tiny_config, embedding_dim=2560), "train", tokenizer)


def test_another_task_is_refused_unless_asked_for(tokenizer, tmp_path):
    other = record(1, "word", task_type="keywords", input_prompt_template=TASK_TEMPLATES["keywords"])
    config = write(tmp_path, [record(0, "One."), other])
    with pytest.raises(InputError, match=r"train_synthesis\.jsonl holds a record of task 'keywords'"):
        load_split(config, "train", tokenizer)
    split = load_split(dataclasses.replace(config, summary_only=False), "train", tokenizer)
    assert split.prompts == [prompt_ids(tokenizer, TASK_TEMPLATES[task]) for task in ("summary", "keywords")]


def test_missing_files_are_named(tokenizer, tmp_path):
    config = write(tmp_path, [record(0, "One.")])
    with pytest.raises(InputError, match=r"test_synthesis\.jsonl"):
        load_split(config, "test", tokenizer)
    (tmp_path / "train_embeddings.safetensors").unlink()
    with pytest.raises(InputError, match=r"train_embeddings\.safetensors"):
        load_split(config, "train", tokenizer)


def test_a_bad_record_is_named_by_its_line(tokenizer, tmp_path):
    for bad in (record(5, "Beyond the last row."), record(1, " "), record(1, "x", input_prompt_template="No slot.")):
        config = write(tmp_path, [record(0, "One."), bad])
        with pytest.raises(InputError, match=r"train_synthesis\.jsonl, line 2"):
            load_split(config, "train", tokenizer)


def test_collate_pads_on_the_right_and_ends_each_answer(tiny_config, tokenizer):
    split = load_split(tiny_config, "train", tokenizer)
    rows = [split.answers.index(choose(split.answers, key=len)) for choose in (min, max)] + [5, 9]
    batch = split.collate(rows)
    assert len({len(split.answers[row]) for row in rows}) > 1
    assert batch.labels.shape == (4, len(split.answers[rows[1]]))
    for row, labels in zip(rows, batch.labels.tolist(), strict=True):
        answer = split.answers[row]
        assert labels == answer + [IGNORE_INDEX] * (len(labels) - len(answer))
        assert answer[-1] == batch.prompt.end_of_turn
    assert batch.num_tokens == sum(len(split.answers[row]) for row in rows)
    assert batch.embeddings.shape == (4, 384)
    assert batch.embeddings.dtype == torch.float32
    moved = batch.to(torch.device("cpu"))
    assert isinstance(moved, Batch)
    assert torch.equal(moved.labels, batch.labels)


def test_a_batch_of_two_prompts_is_refused():
    split = make_split([1, 2], prompts=PROMPTS)
    for collate in (split.collate, split.collate_prompts):
        with pytest.raises(AssertionError, match="different prompts"):
            collate([0, 1])


def test_no_target_reaches_generation():
    assert PromptBatch._fields == ("embeddings", "prompt")
    split = make_split([3, 1, 2])
    retold = dataclasses.replace(split, answers=[[7], [8], [9]], records=[record(i, "Other.") for i in range(3)])
    given, again = split.collate_prompts([2, 0]), retold.collate_prompts([2, 0])
    assert torch.equal(given.embeddings, again.embeddings)
    assert torch.equal(given.embeddings, split.vectors([2, 0]))
    assert given.prompt is again.prompt is PROMPTS[0]
    assert isinstance(given.to(torch.device("cpu")), PromptBatch)


@pytest.mark.parametrize("rows", [1, 5, 64, 1300])  # the last is more than the 64 batches that are sorted together
def test_an_epoch_has_every_row_once_and_one_prompt_a_batch(rows):
    split = mixed_split(rows)
    batches = epoch_batches(split, 4, seed=1, epoch=0)
    assert sorted(row for batch in batches for row in batch) == list(range(rows))
    assert all(1 <= len(batch) <= 4 for batch in batches)
    assert all(split.prompts[row] is split.prompts[batch[0]] for batch in batches for row in batch)


def test_an_epoch_is_a_function_of_seed_and_epoch_alone():
    split = mixed_split(200)
    first = epoch_batches(split, 4, seed=1, epoch=0)
    torch.manual_seed(123)  # the global generator has no say, and is left alone
    state = torch.get_rng_state()
    assert epoch_batches(split, 4, seed=1, epoch=0) == first
    assert torch.equal(torch.get_rng_state(), state)


def test_epochs_and_seeds_meet_other_rows_in_another_order():
    split = mixed_split(200)
    met = [
        {frozenset(batch) for batch in epoch_batches(split, 4, seed, epoch)}
        for seed, epoch in ((1, 0), (1, 1), (2, 0), (2, 1))
    ]
    for i, batches in enumerate(met):
        for other in met[:i]:
            assert len(batches & other) < len(batches) / 2


def test_an_epoch_pads_little_and_is_not_sorted():
    split = make_split([length for length in range(1, 31) for _ in range(8)])
    batches = epoch_batches(split, 8, seed=0, epoch=0)
    assert padding(split, batches) == 0  # each length fills a batch
    longest = [max(len(split.answers[row]) for row in batch) for batch in batches]
    assert longest != sorted(longest)


def test_a_bucket_sorts_by_length_and_cuts_at_the_batch_size():
    split = make_split([5, 1, 4, 2, 3, 2, 1])
    assert split.bucket([6, 5, 4, 3, 2, 1, 0], 3) == [[6, 1, 5], [3, 4, 2], [0]]
    assert split.bucket([4, 0], 3) == [[4, 0]]
    assert split.bucket([], 3) == []


def naive_epoch_batches(split, batch_size, seed, epoch):
    """The twin: batches of one prompt at a time, in the order of the templates."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(split), generator=generator).tolist()
    batches = []
    for start in range(0, len(order), 64 * batch_size):
        chunk = order[start : start + 64 * batch_size]
        for prompt in PROMPTS:
            rows = [row for row in chunk if split.prompts[row] is prompt]
            rows.sort(key=lambda row: len(split.answers[row]))
            batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def test_epoch_batches_agrees_with_the_naive_twin():
    split = mixed_split(500)
    for seed, epoch in ((0, 0), (3, 1)):
        assert epoch_batches(split, 3, seed, epoch) == naive_epoch_batches(split, 3, seed, epoch)


def test_a_bucket_keeps_prompts_apart():
    split = mixed_split(50)
    batches = split.bucket(range(50), 4)
    assert sorted(row for batch in batches for row in batch) == list(range(50))
    for prompt in PROMPTS:
        own = [batch for batch in batches if split.prompts[batch[0]] is prompt]
        rows = [row for batch in own for row in batch]
        assert rows == sorted(rows, key=lambda row: len(split.answers[row]))
        assert set(rows) == {row for row in range(50) if split.prompts[row] is prompt}
        assert all(len(batch) == 4 for batch in own[:-1])


def test_a_subset_is_seeded_sorted_and_without_repeats():
    split = make_split([1] * 40)
    chosen = split.subset(10, seed=0)
    assert chosen == split.subset(10, seed=0) == sorted(set(chosen))
    assert len(chosen) == 10
    assert chosen != split.subset(10, seed=1)
    assert set(split.subset(5, seed=0)) < set(chosen)
    assert split.subset(100, seed=0) == list(range(40))


def test_a_subset_takes_distinct_sources_first():
    sources = [row // 4 for row in range(40)]  # ten sources of four rows
    split = make_split([1] * 40, sources=sources)
    for seed in range(5):
        assert len({sources[row] for row in split.subset(7, seed)}) == 7
        assert {sources[row] for row in split.subset(13, seed)} == set(range(10))
        assert len(split.subset(13, seed)) == 13
    places = {row % 4 for seed in range(5) for row in split.subset(10, seed)}
    assert places == {0, 1, 2, 3}  # any row of a source may stand for it


def test_a_sample_of_the_training_rows_is_fixed_nested_and_leaves_the_other_splits(tiny_config, tokenizer):
    whole = load_split(tiny_config, "train", tokenizer)
    few, more, again = (
        load_split(dataclasses.replace(tiny_config, train_rows=rows, seed=seed), "train", tokenizer)
        for rows, seed in ((5, 0), (10, 0), (5, 1))
    )
    assert (len(few), len(more)) == (5, 10) and few.records == again.records
    places = [whole.records.index(record) for record in more.records]
    assert set(map(str, few.records)) < set(map(str, more.records)) and places == sorted(places)
    assert more.answers == [whole.answers[place] for place in places]
    assert torch.equal(more.vectors(range(10)), whole.vectors(places))
    assert len({split.fingerprint for split in (whole, few, more)}) == 3 and few.fingerprint == again.fingerprint
    few_val = load_split(dataclasses.replace(tiny_config, train_rows=5), "val", tokenizer)
    assert few_val.records == load_split(tiny_config, "val", tokenizer).records
    everything = load_split(dataclasses.replace(tiny_config, train_rows=10_000), "train", tokenizer)
    assert everything.fingerprint == whole.fingerprint


@pytest.mark.parametrize("workers", [0, 1])
def test_loaded_batches_are_the_collated_ones(tiny_config, workers):
    split = mixed_split(30)
    batches = epoch_batches(split, 4, seed=0, epoch=0)
    config = dataclasses.replace(tiny_config, num_workers=workers)
    state = torch.get_rng_state()
    loaded = list(load_batches(split, batches, config))
    assert torch.equal(torch.get_rng_state(), state)  # a resumed run draws the same dropout
    assert len(loaded) == len(batches)
    for batch, rows in zip(loaded, batches, strict=True):
        expected = split.collate(rows)
        assert batch.prompt == expected.prompt
        for tensor, twin in zip(batch[:3], expected[:3], strict=True):
            assert torch.equal(tensor, twin)


def test_the_batches_of_an_epoch_cost_the_same_for_each_row_of_a_large_split():
    one, seconds = record(0, "target"), []
    for rows in (40_000, 320_000):
        lengths = [[1] * (row % 40 + 1) for row in range(rows)]
        split = SummaryDataset([one] * rows, lengths, [0] * rows, [None] * rows, torch.zeros(1, 2), 0, "")
        started = time.perf_counter()
        assert sum(map(len, epoch_batches(split, 16, 0, 0))) == rows
        seconds.append(time.perf_counter() - started)
    assert seconds[1] < 24 * seconds[0], seconds  # 8 times the rows; a quadratic cost would be 64 times

"""The cached prompt, the padding and the batch change nothing: all agrees with one row read whole, without a cache."""

import copy
import dataclasses

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from elmlib.config import InputError
from elmlib.data.dataset import load_split
from elmlib.data.prompts import IGNORE_INDEX, SLOT, TASK_TEMPLATES, prompt_ids
from elmlib.models.adapter import make_adapter
from elmlib.models.elm import SoftTokenModel
from elmlib.models.pretrained import load_llm
from elmlib.training.losses import predict

TEMPLATE = TASK_TEMPLATES["summary"]
ROWS = [0, 3, 5, 8, 10]
OFTEN_SAID = 259
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def tokenizer(tiny_llm):
    return AutoTokenizer.from_pretrained(tiny_llm)


@pytest.fixture
def split(tiny_config, tokenizer):
    return load_split(tiny_config, "train", tokenizer)


@pytest.fixture
def batch(split):
    return split.collate(ROWS)


@pytest.fixture(params=["before_answer", "in_prompt"])
def model(tiny_config, request):
    return make_model(tiny_config, position=request.param)


def make_model(config, checkpointing=False, position="before_answer"):
    """An adapter as training might leave it (no weight at zero), in eval mode, on the LLM in float32."""
    llm, tokenizer = load_llm(config.llm_model_name, torch.float32, "cpu")
    with torch.no_grad():
        # A random LLM hardly ever ends a turn. Input and output embeddings are tied, so the end of turn now outbids one
        # token that this LLM says after more or fewer others.
        table = llm.get_input_embeddings().weight
        table[tokenizer.eos_token_id] = 1.1 * table[OFTEN_SAID]
    return SoftTokenModel(llm, tokenizer, trained_adapter(config, llm, seed=0), checkpointing, position)


def trained_adapter(config, llm, seed):
    adapter = make_adapter(config, llm.get_input_embeddings().weight)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapter.eval()


def naive_prompt(model, soft):
    """Embeddings of the whole chat with one row's soft tokens in their place, (1, length, llm_dim)."""
    chat = [{"role": "user", "content": TEMPLATE}]
    text = model.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    before, after = (model.table[model.tokenizer(piece).input_ids] for piece in text.split(SLOT))
    return torch.cat([before, after, soft] if model.position == "before_answer" else [before, soft, after])[None]


def naive_logits(model, soft, answer):
    """Logits that predict each token of `answer`, from one forward pass over everything, (len(answer), vocab)."""
    prompt = naive_prompt(model, soft)
    embeds = torch.cat([prompt, model.table[answer][None]], dim=1)
    logits = model.llm(inputs_embeds=embeds, use_cache=False).logits[0]
    return logits[prompt.shape[1] - 1 : -1]


@torch.no_grad()
def naive_greedy(model, embedding, max_new_tokens):
    """Token ids up to the end of turn, everything read again at each step."""
    ids = []
    prompt = naive_prompt(model, model.adapter(embedding[None])[0])
    while len(ids) < max_new_tokens:
        embeds = torch.cat([prompt, model.table[torch.tensor(ids, dtype=torch.long)][None]], dim=1)
        token = int(model.llm(inputs_embeds=embeds, use_cache=False).logits[0, -1].argmax())
        if token == model.tokenizer.eos_token_id:
            break
        ids.append(token)
    return ids


def logits_of(model, batch):
    """(batch, answer length, vocab)."""
    return model(batch)[1] @ model.head.T


def gradients(model, batch):
    """Loss, and its gradient by the adapter's parameters, in train mode with the same dropout each time."""
    torch.manual_seed(0)
    model.adapter.train().zero_grad()
    loss = predict(model(batch)[1], model.head, batch.labels, 1).nll
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.adapter.named_parameters()}


@pytest.mark.parametrize("position", ["before_answer", "in_prompt"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_shared_prompt_equals_a_whole_reading(tiny_config, batch, checkpointing, position):
    model = make_model(tiny_config, checkpointing, position)
    with torch.no_grad():
        soft, logits = model(batch)[0], logits_of(model, batch)
        assert soft.shape == (len(ROWS), tiny_config.num_soft_tokens, 32)
        assert logits.shape == (*batch.labels.shape, len(model.table))
        assert torch.equal(soft, model.adapter(batch.embeddings))
        for row, labels in enumerate(batch.labels):
            answer = labels[labels != IGNORE_INDEX]
            expected = naive_logits(model, soft[row], answer)
            torch.testing.assert_close(logits[row, : len(answer)], expected, **CLOSE)


def assert_same_gradients(slopes, expected):
    for name, slope in expected.items():
        assert (slopes[name] - slope).norm() <= 1e-4 * slope.norm(), name


def test_the_gradient_is_that_of_a_whole_reading(model, batch):
    """The keys and values of the prompt are constants, but all that reads them passes the gradient on."""
    loss, slopes = gradients(model, batch)
    torch.manual_seed(0)
    model.adapter.zero_grad()
    naive_loss = 0.0
    for soft, labels in zip(model.adapter(batch.embeddings), batch.labels, strict=True):
        answer = labels[labels != IGNORE_INDEX]
        log_probs = naive_logits(model, soft, answer).log_softmax(-1)
        naive_loss = naive_loss - sum(log_probs[t, token] for t, token in enumerate(answer))
    naive_loss.backward()
    torch.testing.assert_close(loss, naive_loss.detach())
    assert_same_gradients(slopes, {name: p.grad for name, p in model.adapter.named_parameters()})


def test_gradient_checkpointing_changes_nothing_but_the_memory(tiny_config, batch):
    calls, results = [], []
    for checkpointing in (False, True):
        model = make_model(tiny_config, checkpointing)
        model(batch)  # reads the prompt
        counted = []
        layer = model.llm.get_decoder().layers[0]
        layer.mlp.register_forward_pre_hook(lambda *_, counted=counted: counted.append(1))
        results.append(gradients(model, batch))
        calls.append(len(counted))
    (loss, plain), (same_loss, recomputed) = results
    assert calls == [1, 2]  # the second time in the backward pass
    torch.testing.assert_close(same_loss, loss)
    assert_same_gradients(recomputed, plain)


def test_with_gradient_checkpointing_no_gradient_piles_up_in_the_prompt(tiny_config, batch):
    """transformers makes every embedding that it looks up ask for a gradient, which kept ones would add up."""
    model = make_model(tiny_config, checkpointing=True)
    gradients(model, batch)
    kept = model._prefix(batch.prompt.around(model.position)[0])[0]
    assert not kept.requires_grad
    assert kept.grad is None


def test_with_gradient_checkpointing_generation_is_the_same(tiny_config, model, split):
    checkpointed = make_model(tiny_config, checkpointing=True, position=model.position)
    gradients(checkpointed, split.collate(ROWS))  # leaves the LLM in train mode
    checkpointed.adapter.eval()
    prompts = split.collate_prompts(ROWS)
    assert checkpointed.generate(prompts, 10) == model.generate(prompts, 10)


def test_padding_does_not_change_a_rows_logits(model, split, batch):
    wider = batch._replace(labels=torch.nn.functional.pad(batch.labels, (0, 3), value=IGNORE_INDEX))
    with torch.no_grad():
        logits, padded = logits_of(model, batch), logits_of(model, wider)
        torch.testing.assert_close(padded[:, : batch.labels.shape[1]], logits, **CLOSE)
        assert len({len(split.answers[row]) for row in ROWS}) > 1
        for i, row in enumerate(ROWS):
            alone = logits_of(model, split.collate([row]))[0]
            torch.testing.assert_close(logits[i, : len(alone)], alone, **CLOSE)


def test_permuting_the_batch_permutes_the_logits(model, split, batch):
    order = [3, 0, 4, 1, 2]
    with torch.no_grad():
        permuted = logits_of(model, split.collate([ROWS[i] for i in order]))
        torch.testing.assert_close(permuted, logits_of(model, batch)[order], **CLOSE)


def test_logits_at_a_position_do_not_see_its_label_or_later_ones(model, batch):
    labels = batch.labels.clone()
    labels[:, 3:] = torch.where(labels[:, 3:] == IGNORE_INDEX, IGNORE_INDEX, 7)
    with torch.no_grad():
        before, after = logits_of(model, batch), logits_of(model, batch._replace(labels=labels))
    torch.testing.assert_close(after[:, :4], before[:, :4], **CLOSE)
    assert not torch.allclose(after[:, 4], before[:, 4], atol=0.01)


def test_generate_equals_reading_everything_again_at_each_step(model, split):
    naive = [naive_greedy(model, split.vectors([row])[0], 10) for row in ROWS]
    assert len({len(ids) for ids in naive}) > 1  # some rows end early, and are padded
    texts = model.generate(split.collate_prompts(ROWS), 10)
    assert texts == [model.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in naive]


@pytest.mark.parametrize("position", ["before_answer", "in_prompt"])
def test_a_lone_soft_token_generates_as_reading_everything_again(tiny_config, split, position):
    model = make_model(dataclasses.replace(tiny_config, num_soft_tokens=1), position=position)
    naive = [naive_greedy(model, split.vectors([row])[0], 10) for row in ROWS]
    assert model.generate(split.collate_prompts(ROWS), 10) == [
        model.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in naive
    ]


def test_a_rows_text_does_not_depend_on_its_companions(model, split):
    texts = model.generate(split.collate_prompts(ROWS), 10)
    assert len(set(texts)) > 1
    assert model.generate(split.collate_prompts(ROWS[::-1]), 10) == texts[::-1]
    assert [model.generate(split.collate_prompts([row]), 10)[0] for row in ROWS] == texts


def test_generate_stops_at_the_prompts_own_end_of_turn(model, split):
    """Gemma, for one, ends its turns with another token than EOS."""
    said = naive_greedy(model, split.vectors(ROWS[:1])[0], 10)
    end = said[1]
    assert len(said) > 2  # it would go on
    model.tokenizer.add_special_tokens({"extra_special_tokens": [model.tokenizer.convert_ids_to_tokens(end)]})
    prompts = split.collate_prompts(ROWS[:1])
    prompts = prompts._replace(prompt=prompts.prompt._replace(end_of_turn=end))
    assert model.generate(prompts, 10) == [model.tokenizer.decode(said[: said.index(end)]).strip()]


@pytest.mark.parametrize(
    "habit", [{"do_sample": True, "temperature": 2.0}, {"repetition_penalty": 5.0}, {"no_repeat_ngram_size": 1}]
)
def test_generation_is_greedy_whatever_the_llms_own_habits(model, split, habit):
    """Chat models ship a generation_config.json: Qwen3 samples, Qwen2.5 also penalises repetition."""
    prompts = split.collate_prompts(ROWS)
    texts = model.generate(prompts, 10)
    model.llm.generation_config.update(**habit)
    torch.manual_seed(0)
    assert (
        SoftTokenModel(model.llm, model.tokenizer, model.adapter, position=model.position).generate(prompts, 10)
        == texts
    )


def test_training_reaches_the_adapter_and_leaves_the_llm_alone(model, batch):
    before = {name: value.clone() for name, value in model.llm.state_dict().items()}
    _, slopes = gradients(model, batch)
    assert all(slope.isfinite().all() and slope.any() for slope in slopes.values())
    torch.optim.AdamW(model.adapter.parameters()).step()
    assert all(parameter.grad is None for parameter in model.llm.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.llm.state_dict().items())


def test_an_llm_that_is_not_frozen_is_refused(model):
    model.llm.get_decoder().norm.weight.requires_grad_()
    with pytest.raises(AssertionError, match="frozen"):
        SoftTokenModel(model.llm, model.tokenizer, model.adapter)


def test_the_cached_prompt_is_not_changed_by_use(model, split, batch):
    prompts = split.collate_prompts(ROWS[:2])
    with torch.no_grad():
        logits, texts = logits_of(model, batch), model.generate(prompts, 5)
        before = batch.prompt.around(model.position)[0]
        cached = model._prefix(before)[1]
        twin = copy.deepcopy(cached)
        for _ in range(2):
            assert model.generate(prompts, 5) == texts
            assert torch.equal(logits_of(model, batch), logits)
    assert model._prefix(before)[1] is cached
    assert cached.get_seq_length() == len(before)
    for layer, other in zip(cached.layers, twin.layers, strict=True):
        assert torch.equal(layer.keys, other.keys)
        assert torch.equal(layer.values, other.values)


def test_each_prompt_has_its_own_prefix(model, batch):
    other = prompt_ids(model.tokenizer, TASK_TEMPLATES["keywords"])
    with torch.no_grad():
        first = logits_of(model, batch)
        second = logits_of(model, batch._replace(prompt=other))
        assert not torch.allclose(second, first, atol=0.01)
        assert torch.equal(logits_of(model, batch), first)


def test_another_adapter_speaks_through_the_same_llm(tiny_config, model, batch):
    other = model.with_adapter(trained_adapter(tiny_config, model.llm, seed=1))
    with torch.no_grad():
        first, second = logits_of(model, batch), logits_of(other, batch)
        assert other.llm is model.llm
        assert not torch.allclose(second, first, atol=0.01)
        assert torch.equal(logits_of(model, batch), first)


def test_make_adapter_follows_the_config_and_its_seed(tiny_config, model):
    state = torch.get_rng_state()
    first, again = (make_adapter(tiny_config, model.table).state_dict() for _ in range(2))
    other = make_adapter(dataclasses.replace(tiny_config, seed=1), model.table).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["up.weight"], other["up.weight"])
    assert first["linear.weight"].shape == (tiny_config.num_soft_tokens * 32, tiny_config.embedding_dim)
    assert first["up.weight"].shape == (tiny_config.hidden_dim, tiny_config.embedding_dim)
    torch.testing.assert_close(first["norm.weight"], model.table.square().mean().sqrt().expand(32))


@pytest.mark.parametrize("task", TASK_TEMPLATES)
def test_the_pieces_around_a_text_are_the_rendered_chat(tokenizer, task):
    prompt = prompt_ids(tokenizer, TASK_TEMPLATES[task])
    text = "The parser reads the file."
    chat = [{"role": "user", "content": TASK_TEMPLATES[task].replace(SLOT, text)}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(prompt.before) + text + tokenizer.decode(prompt.behind) == rendered
    before, after = rendered.split(text)
    assert prompt.before == tokenizer(before).input_ids
    assert prompt.behind == tokenizer(after).input_ids


def test_the_end_of_turn_is_what_follows_the_assistants_words(tokenizer):
    said = "It is so."
    chat = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": said}]
    ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False)).input_ids
    words = tokenizer(said).input_ids
    start = next(i for i in range(len(ids)) if ids[i : i + len(words)] == words)
    assert prompt_ids(tokenizer, TEMPLATE).end_of_turn == ids[start + len(words)] == tokenizer.eos_token_id


def test_a_chat_that_closes_its_turns_with_nothing_ends_in_eos(tiny_llm):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llm)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
    assert prompt_ids(tokenizer, TEMPLATE).end_of_turn == tokenizer.eos_token_id


def test_a_tokenizer_that_adds_bos_adds_none_to_the_pieces(tiny_llm, tokenizer, tiny_config, split):
    adding = AutoTokenizer.from_pretrained(tiny_llm)
    adding.backend_tokenizer.post_processor = TemplateProcessing("<|im_start|> $A", None, [("<|im_start|>", 0)])
    assert adding("x").input_ids == [0, *tokenizer("x").input_ids]
    assert prompt_ids(adding, TEMPLATE) == prompt_ids(tokenizer, TEMPLATE)
    assert load_split(tiny_config, "train", adding).answers == split.answers


def test_a_tokenizer_without_eos_reads_and_writes(model, split):
    batch, prompt = split.collate_prompts([0, 1]), split.prompts[0]
    expected = model.generate(batch, 5), model.read(["A text.", "Another, longer text."], prompt, 5, 20)
    model.tokenizer.eos_token = model.tokenizer.pad_token = None
    assert (model.generate(batch, 5), model.read(["A text.", "Another, longer text."], prompt, 5, 20)) == expected


def test_a_tokenizer_without_chat_template_is_refused(tiny_llm):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llm)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template; use an instruct model"):
        prompt_ids(tokenizer, TEMPLATE)


@pytest.mark.parametrize("template", ["Summarize.", "", "{text} and {text}"])
def test_a_template_without_one_slot_is_refused(tokenizer, template):
    with pytest.raises(InputError, match="expected once"):
        prompt_ids(tokenizer, template)


def test_a_cache_that_was_not_filled_is_refused(tiny_config, batch):
    """transformers before 5.24 takes `cache=` for an unknown argument, and the prompt is never seen."""
    llm, tokenizer = load_llm(tiny_config.llm_model_name, torch.float32, "cpu")
    model = SoftTokenModel(llm, tokenizer, make_adapter(tiny_config, llm.get_input_embeddings().weight))
    llm.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {name: it for name, it in kwargs.items() if name != "cache"}), with_kwargs=True
    )
    with pytest.raises(InputError, match="transformers"):
        model(batch)

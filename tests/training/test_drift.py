"""Text drift: both heads and the hinge equal the formulas of their docstrings, in value and in gradient."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer, save_qwen_pair, sentences

from elmlib.config import InputError, SummaryTrainingConfig
from elmlib.data.prompts import IGNORE_INDEX
from elmlib.models.adapter import LinearMap
from elmlib.models.pretrained import encode, load_embedder
from elmlib.training.drift import DriftReadout, ReEmbed, expected_token_embedding
from elmlib.training.losses import Predictions, compute_losses, text_drift
from elmlib.training.setup import TrainingComponents, build_components
from elmlib.training.trainer import train

ROWS, LENGTH, VOCAB, DIM = 4, 5, 7, 6
# Answers of 5, 3, 1 and 4 tokens.
LABELS = torch.tensor(
    [
        [1, 2, 3, 4, 5],
        [6, 0, 1, IGNORE_INDEX, IGNORE_INDEX],
        [2] + [IGNORE_INDEX] * 4,
        [3, 3, 0, 6, IGNORE_INDEX],
    ]
)
SOURCES = torch.tensor([0, 1, 0, 2])
TABLE = torch.randn(VOCAB, DIM, generator=torch.Generator().manual_seed(90))
WEIGHTS = torch.tensor([0.0, 1.0, 0.5, 2.0, 0.1, 3.0, 0.7])


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def predictions(seed=0):
    return (3 * normal(ROWS, LENGTH, VOCAB, seed=seed)).log_softmax(-1)


def cosine(a, b):
    return (a @ b) / (a @ a).sqrt() / (b @ b).sqrt()


def naive_expectation(log_probs, labels, top_k):
    """sum of p * w * embedding over sum of p * w, over the answer positions and their top_k tokens."""
    means = []
    for row in range(len(labels)):
        total, mass = torch.zeros(DIM), torch.zeros(())
        for t in range(labels.shape[1]):
            if labels[row, t] == IGNORE_INDEX:
                continue
            for token in log_probs[row, t].argsort(descending=True)[:top_k]:
                share = log_probs[row, t, token].exp() * WEIGHTS[token]
                total, mass = total + share * TABLE[token], mass + share
        means.append(total / mass)
    return torch.stack(means)


def naive_drift(meanings, embeddings, target):
    return torch.stack([(target - cosine(v, e)).clamp(min=0) for v, e in zip(meanings, embeddings, strict=True)])


def gradient(function, given):
    """Gradient of a weighted sum of the outputs, so that no two outputs can stand in for each other."""
    given = given.detach().requires_grad_()
    out = function(given)
    (out * torch.arange(1.0, out.numel() + 1).view_as(out)).sum().backward()
    return given.grad


def most_probable(log_probs, labels, top_k):
    """What `predict` would say, from the log-probabilities of the whole vocabulary."""
    top, ids = log_probs.topk(min(top_k, VOCAB))
    padding = (labels == IGNORE_INDEX)[..., None]
    return Predictions(log_probs.new_zeros(()), top.masked_fill(padding, float("-inf")), ids)


def expectation(log_probs, labels, top_k):
    """The expected token embedding, from the log-probabilities of the whole vocabulary."""
    _, top, ids = most_probable(log_probs, labels, top_k)
    return expected_token_embedding(top, ids, TABLE, WEIGHTS)


@pytest.mark.parametrize("top_k", [1, 3, VOCAB, VOCAB + 10])
def test_the_expected_embedding_equals_its_naive_twin(top_k):
    log_probs = predictions()
    means = expectation(log_probs, LABELS, top_k)
    torch.testing.assert_close(means, naive_expectation(log_probs, LABELS, top_k))
    slopes = [
        gradient(lambda given: expectation(given, LABELS, top_k), log_probs),
        gradient(lambda given: naive_expectation(given, LABELS, top_k), log_probs),
    ]
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-5)


def test_the_whole_vocabulary_gives_the_full_expectation():
    log_probs = predictions()
    present = (LABELS != IGNORE_INDEX)[..., None]
    mass = (log_probs.exp() * WEIGHTS * present).sum(1)  # (rows, vocab)
    expected = mass @ TABLE / mass.sum(1, keepdim=True)
    torch.testing.assert_close(expectation(log_probs, LABELS, VOCAB), expected)


def test_the_expected_embedding_ignores_padding_and_what_the_labels_say():
    log_probs = predictions()
    other = torch.where((LABELS == IGNORE_INDEX)[..., None], predictions(seed=5), log_probs)
    relabelled = torch.where(LABELS == IGNORE_INDEX, LABELS, (LABELS + 1) % VOCAB)
    expected = expectation(log_probs, LABELS, 3)
    assert torch.equal(expectation(other, relabelled, 3), expected)


def test_the_expected_embedding_of_a_row_does_not_depend_on_the_others():
    log_probs = predictions()
    whole = expectation(log_probs, LABELS, 3)
    for row in range(ROWS):
        length = int((LABELS[row] != IGNORE_INDEX).sum())
        alone = (log_probs[row : row + 1, :length], LABELS[row : row + 1, :length])
        torch.testing.assert_close(expectation(*alone, 3)[0], whole[row])


def test_a_model_sure_of_weightless_tokens_gives_no_nan():
    log_probs = torch.full((1, 2, VOCAB), -1e4)
    log_probs[..., 0] = 0.0  # token 0 weighs nothing
    log_probs.requires_grad_()
    mean = expectation(log_probs, torch.tensor([[0, 0]]), 3)
    mean.sum().backward()
    assert mean.isfinite().all()
    assert log_probs.grad.isfinite().all()


def test_text_drift_equals_its_naive_twin():
    meanings, embeddings = normal(ROWS, DIM, seed=1), normal(ROWS, DIM, seed=2)
    for target in (-1.0, 0.0, 0.75, 1.0):
        losses, similarity = text_drift(meanings, embeddings, target)
        torch.testing.assert_close(losses, naive_drift(meanings, embeddings, target))
        for row in range(ROWS):
            torch.testing.assert_close(similarity[row], cosine(meanings[row], embeddings[row]))


def test_text_drift_above_the_target_has_neither_loss_nor_gradient():
    embeddings = normal(ROWS, DIM, seed=2)
    meanings = embeddings + 0.1 * normal(ROWS, DIM, seed=1)
    meanings[3] = -embeddings[3]  # the one row that falls short
    meanings[3, 0] += 1
    losses, similarity = text_drift(meanings, embeddings, 0.75)
    slope = gradient(lambda given: text_drift(given, embeddings, 0.75)[0], meanings)
    assert similarity[:3].min() > 0.75
    assert not losses[:3].any()
    assert not slope[:3].any()
    assert losses[3] > 0.75
    assert slope[3].any()


def test_a_step_down_the_drift_gradient_raises_the_cosine():
    meanings, embeddings = normal(ROWS, DIM, seed=1), normal(ROWS, DIM, seed=2)
    slope = gradient(lambda given: text_drift(given, embeddings, 1.0)[0], meanings)
    before, after = (text_drift(v, embeddings, 1.0)[1] for v in (meanings, meanings - 0.01 * slope))
    assert (after > before).all()


def test_text_drift_has_the_gradient_of_finite_differences():
    rows = [normal(ROWS, DIM, seed=seed, dtype=torch.float64).requires_grad_() for seed in (1, 2)]
    assert text_drift(*rows, 0.75)[0].min() > 0.01  # away from the kink, where no difference is defined
    assert torch.autograd.gradcheck(lambda v, e: text_drift(v, e, 0.75), rows)


def test_text_drift_is_a_row_by_row_loss_so_batches_may_be_split_anywhere():
    meanings, embeddings = normal(ROWS, DIM, seed=1), normal(ROWS, DIM, seed=2)
    for whole, *parts in zip(
        text_drift(meanings, embeddings, 0.75),
        text_drift(meanings[:1], embeddings[:1], 0.75),
        text_drift(meanings[1:], embeddings[1:], 0.75),
        strict=True,
    ):
        torch.testing.assert_close(sum(part.sum() for part in parts), whole.sum())


def test_the_readout_maps_the_expected_embedding_and_lets_the_gradient_through():
    to_embedding = LinearMap(normal(3, DIM, seed=1), normal(3, seed=2))
    log_probs = predictions()
    readout = DriftReadout(TABLE, WEIGHTS, to_embedding)
    meanings = readout(most_probable(log_probs, LABELS, 4))
    for row, mean in enumerate(naive_expectation(log_probs, LABELS, 4)):
        torch.testing.assert_close(meanings[row], to_embedding.weight @ mean + to_embedding.bias)
    slope = gradient(lambda given: readout(most_probable(given, LABELS, 4)), log_probs)
    assert slope[LABELS != IGNORE_INDEX].any(-1).all()
    assert not slope[LABELS == IGNORE_INDEX].any()


@pytest.fixture(scope="module")
def qwen_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random two-layer Qwen3 LLM and a random two-layer Qwen3 embedder of another size, with one tokenizer."""
    return save_qwen_pair(tmp_path_factory.mktemp("qwen"), 24)


@pytest.fixture
def qwen_config(
    qwen_pair: tuple[Path, Path], tiny_config: SummaryTrainingConfig, tmp_path: Path
) -> SummaryTrainingConfig:
    """A run on that pair with the `re_embed` head; the vectors are the embedder's own."""
    from conftest import write_split

    llm, embedder = qwen_pair
    pairs = sentences(60, 5)
    vectors = encode(load_embedder(str(embedder), "cpu"), [text for text, _ in pairs], 16)
    for split, rows in (("train", slice(0, 40)), ("val", slice(40, 60))):
        write_split(tmp_path / "data", split, pairs[rows], vectors[rows])
    return replace(
        tiny_config,
        llm_model_name=str(llm),
        embedding_model_name=str(embedder),
        embedding_dim=24,
        summary_data_path=str(tmp_path / "data"),
        text_drift_head="re_embed",
        eval_nll_samples=8,
    )


def spelled(texts: list[str], tokenizer, vocab: int) -> Predictions:
    """Predictions that are sure of each token of the texts, then of the end of the turn."""
    answers = [[*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for text in texts]
    top = torch.full((len(texts), max(map(len, answers)), 2), float("-inf"))
    ids = torch.zeros(top.shape, dtype=torch.long)
    for row, answer in enumerate(answers):
        top[row, : len(answer), 0] = 0.0
        top[row, : len(answer), 1] = -50.0  # the runner-up of a model that is sure
        ids[row, : len(answer), 0] = torch.tensor(answer)
        ids[row, : len(answer), 1] = vocab - 1  # beyond the tokenizer
    return Predictions(torch.zeros(()), top, ids)


def test_re_embed_of_a_sure_model_is_the_embedding_of_what_it_says(qwen_pair: tuple[Path, Path]) -> None:
    embedder = load_embedder(str(qwen_pair[1]), "cpu").float()  # in bfloat16, where the CPU has it, by default
    texts = [text for pair in sentences(4, 2) for text in pair]
    head = ReEmbed(embedder, make_tokenizer())
    with torch.no_grad():
        meanings = head(spelled(texts, make_tokenizer(), len(make_tokenizer()) + 3))
        alone = head(spelled(texts[:1], make_tokenizer(), len(make_tokenizer())))
    torch.testing.assert_close(meanings, torch.from_numpy(encode(embedder, texts, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone[0], meanings[0], rtol=1e-4, atol=1e-5)


def test_re_embed_of_a_bert_keeps_its_special_tokens() -> None:
    embedder = load_embedder("all-minilm-l6-v2", "cpu").float()
    head = ReEmbed(embedder, embedder.tokenizer)
    texts = ["a parser reads the file", "an old letter"]
    ids = [embedder.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    top = torch.full((2, 8, 1), float("-inf"))
    tokens = torch.zeros(2, 8, 1, dtype=torch.long)
    for row, answer in enumerate(ids):
        top[row, : len(answer) + 1] = 0.0
        tokens[row, : len(answer), 0] = torch.tensor(answer)
    with torch.no_grad():
        meanings = head(Predictions(torch.zeros(()), top, tokens))
    torch.testing.assert_close(meanings, torch.from_numpy(encode(embedder, texts, 2)), rtol=1e-4, atol=1e-5)


def test_re_embed_refuses_two_tokenizers(tiny_config: SummaryTrainingConfig) -> None:
    with pytest.raises(InputError, match=r"needs an embedder with the LLM's tokenizer, but \d+ of \d+ tokens"):
        build_components(replace(tiny_config, text_drift_head="re_embed"), torch.device("cpu"))


@pytest.mark.parametrize("head", ["readout", "re_embed"])
def test_the_drift_gradient_reaches_the_adapter(qwen_config: SummaryTrainingConfig, head: str) -> None:
    """Against finite differences, through LLM, prediction and head, along the gradient and along a random direction."""
    config = replace(qwen_config, text_drift_head=head, drift_top_k=1000, dropout_rate=0.0)
    config = replace(config, text_drift_target_similarity=1.0)
    components = build_components(config, torch.device("cpu"))
    batch = components.train.collate(components.train.bucket(range(6), 6)[0])
    components.embedder.float()
    weight = components.model.adapter.linear.weight
    with torch.no_grad():
        weight.div_(weight.square().mean().sqrt())  # the warm start's own size is large, and its slope small

    def loss() -> torch.Tensor:
        return compute_losses(components, batch, config)["drift"]

    loss().backward()
    slope = weight.grad.clone()
    assert slope.norm() > 1e-3
    for direction in (slope / slope.norm(), torch.nn.functional.normalize(normal(*slope.shape, seed=4), dim=(0, 1))):
        size = 0.02 * weight.norm().item()
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                weight.add_(sign * size * direction)
                values.append(loss().item())
                weight.sub_(sign * size * direction)
        expected = (slope * direction).sum().item()
        assert (values[0] - values[1]) / (2 * size) == pytest.approx(expected, rel=0.05, abs=2e-3 * slope.norm().item())


@pytest.mark.parametrize("head", ["readout", "re_embed"])
def test_above_the_target_the_whole_chain_has_neither_loss_nor_gradient(qwen_config, head: str) -> None:
    config = replace(qwen_config, text_drift_head=head, text_drift_target_similarity=-1.0)
    components: TrainingComponents = build_components(config, torch.device("cpu"))
    parts = compute_losses(components, components.train.collate([0]), config)
    parts["drift"].backward()
    assert parts["drift"] == 0
    assert not components.model.adapter.linear.weight.grad.any()


def test_a_run_with_re_embed_says_more_of_what_the_embedder_hears(qwen_config: SummaryTrainingConfig) -> None:
    config = replace(qwen_config, max_epochs=6, text_drift_weight=10.0, learning_rate=5e-3, early_stopping_patience=6)
    seen = []

    class Keep:
        def log(self, row) -> None:
            seen.append(row)

        def close(self) -> None:
            pass

    train(config, [Keep()])
    values = [row.values["predicted_similarity"] for row in seen if row.kind == "step"]
    assert sum(values[-5:]) > sum(values[:5])

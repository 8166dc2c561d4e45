"""Closed-form fits are computed once per data and LLM, and read back as they were."""

from dataclasses import replace

import pytest
import torch
from torch.utils import _pytree

from elmlib import fits
from elmlib.config import SummaryTrainingConfig
from elmlib.data import load_split
from elmlib.fits import Fits, fit, load_fits
from elmlib.model import make_adapter
from elmlib.pretrained import load_llm


def flat(found: Fits) -> list:
    return _pytree.tree_leaves([found.mean, found.std, found.idf, found.to_tokens, found.to_embedding])


@pytest.fixture
def given(tiny_config: SummaryTrainingConfig) -> tuple:
    """Both splits, the token embeddings, an adapter."""
    llm, tokenizer = load_llm(tiny_config.llm_model_name, torch.float32, "cpu")
    table = llm.get_input_embeddings().weight.detach()
    return (
        *(load_split(tiny_config, name, tokenizer) for name in ("train", "val")),
        table,
        make_adapter(tiny_config, table),
    )


def test_fits_come_back_from_the_cache_as_they_were_computed(given, tmp_path, monkeypatch):
    monkeypatch.setenv("ELMLIB_CACHE", str(tmp_path))
    computed = fit(*given)
    for found in (load_fits(*given), load_fits(*given)):
        for one, other in zip(flat(computed), flat(found), strict=True):
            assert torch.equal(one, other) if torch.is_tensor(one) else one == other


def test_they_are_computed_once_for_each_data_and_llm(given, tmp_path, monkeypatch):
    monkeypatch.setenv("ELMLIB_CACHE", str(tmp_path))
    calls = []
    monkeypatch.setattr(fits, "fit", lambda *args: calls.append(args) or fit(*args))
    train, val, table, adapter = given
    other_answers = replace(val, answers=[[*answer, 5] for answer in val.answers])
    for number, changed in enumerate(
        [
            (train, val, table),
            (train.take(range(50)), val, table),
            (train, other_answers, table),
            (train, val, 2 * table),
        ]
    ):
        for _ in range(2):
            load_fits(*changed, adapter)
        assert len(calls) == number + 1

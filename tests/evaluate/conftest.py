"""Checkpoints on disk of the tiny models, for whatever loads them."""

import functools
import json

import numpy as np
import pytest

from bam_jax.data import store
from bam_jax.data.tokenizer import Tokenizer
from bam_jax.evaluate import scorer
from tests.evaluate.folders import LENGTH, write_checkpoint
from tests.model import oracle


@pytest.fixture(scope='session')
def start(models):
  """The function (name, seed) -> parameters of a model, float32."""

  @functools.cache
  def make(name: str, seed: int = 1) -> dict:
    params = oracle.random_params(models[name], np.random.default_rng(seed))
    return oracle.map_leaves(lambda x: x.astype(np.float32), params)

  return make


@pytest.fixture(scope='session')
def saved(models, start, dataset, tmp_path_factory):
  """The function name -> the folder of a checkpoint; mixtures' tokenizer is in other bytes."""
  folder = tmp_path_factory.mktemp('saved')

  @functools.cache
  def make(name: str) -> str:
    tokenizer, facts = dataset.tokenizer(), {}
    if models[name].ffn_experts:
      facts = dict(sources=('general', 'code', 'law', 'math'), method=name)
      words = json.loads(tokenizer.save(folder).read_bytes())
      tokenizer = Tokenizer(json.dumps(words).encode(), tokenizer.file_name)
    return str(write_checkpoint(folder / name, models[name], start(name), tokenizer, **facts))

  return make


@pytest.fixture(scope='session')
def documents(dataset: store.Dataset) -> list[np.ndarray]:
  """Held-out documents of 10 to 60 words: some fit a window, and some take several."""
  return [d for name in ('code', 'law') for d in dataset.documents(name, 'valid')]


@pytest.fixture(scope='session')
def pieces(documents) -> list[scorer.Window]:
  """Windows of all the documents, overlapping."""
  return [w for tokens in documents for w in scorer.cut(tokens, LENGTH, 10)]

"""A GGUF file of a model of transformers has the model's logits, as its converter lays it out."""

import numpy as np
import pytest

from bam_jax import checkpoint
from bam_jax.hf import gguf
from tests.hf import folders, gguf_files
from tests.parity import test_families as families

transformers = pytest.importorskip('transformers')

QWEN2 = {'use_sliding_window': False, 'tie_word_embeddings': True}
CASES = dict.fromkeys(('llama', 'llama_llama3', 'llama_yarn', 'llama_linear'), {})
CASES |= {'qwen2': QWEN2}


@pytest.mark.parametrize('case', CASES)
def test_its_logits_are_the_models(tmp_path, monkeypatch, case):
  kind, options = families.CASES[case]
  changed = options | CASES[case] | {'max_shard_size': '1GB'}
  monkeypatch.setitem(families.CASES, case, (kind, changed))
  model = families.make_folder(case, tmp_path / 'hf')
  facts = folders.read_json(tmp_path / 'hf' / 'config.json')
  tensors = families.load_file(tmp_path / 'hf' / 'model.safetensors')
  tensors, metadata = gguf_files.renamed(facts, tensors), gguf_files.metadata(facts)
  gguf_files.write(tmp_path / 'it.gguf', facts['model_type'], metadata, tensors)
  for source, output in (('it.gguf', 'ours'), ('hf', 'theirs')):
    done = families.run(
      'import-hf', f'--input={tmp_path / source}', f'--output={tmp_path / output}'
    )
    assert done.returncode == 0, done.stderr
  batch = families.make_batch()
  got, want = families.ours(tmp_path / 'ours', batch)[0], families.theirs(model, batch)[0]
  assert families.distance(got, want) < families.TOLERANCE
  # And it is in every bit what the folder becomes.
  one, other = (checkpoint.read_meta(tmp_path / name) for name in ('ours', 'theirs'))
  assert one.model == other.model and one.sequence_length == other.sequence_length
  got, want = (folders.read_checkpoint(tmp_path / name) for name in ('ours', 'theirs'))
  for path, array in want.items():
    np.testing.assert_array_equal(got[path], array, err_msg=path, strict=True)


def test_texts_are_cut_as_transformers_cuts_them():
  from transformers.convert_slow_tokenizer import TikTokenConverter

  assert gguf._CUTS['llama-bpe'][0]['pattern']['Regex'] == TikTokenConverter('').pattern
  theirs = transformers.Qwen2Tokenizer(vocab={'a': 0}, merges=[])._tokenizer
  ours = type(theirs).from_str(gguf._bpe(['a'], [1], [], 'qwen2').decode())
  text = "It's 2024's cafe\u0301,\n\n  \t x_1 3.14159 \u4e2d\u6587 \u0661\u0662 don\u2019t"
  assert ours.normalizer.normalize_str(text) == theirs.normalizer.normalize_str(text)
  cut = ours.pre_tokenizer.pre_tokenize_str(text)
  assert cut == theirs.pre_tokenizer.pre_tokenize_str(text)

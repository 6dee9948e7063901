"""A folder of transformers becomes a checkpoint, exactly, or there is a sentence and no output."""

import hashlib
import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from bam_jax import checkpoint
from bam_jax.errors import UserError
from bam_jax.hf import importing
from tests.hf import folders
from tests.hf.folders import CONFIG, MODEL, cohere_tensors

Q_PROJ = 'model.layers.1.self_attn.q_proj.weight'


def convert(source, output, dtype='float32', **options):
  return importing.convert(
    source, output, dtype=dtype, command='the command', progress=lambda done, total: None, **options
  )


def check_refused(source, named, **options) -> None:
  """One sentence, and nothing where the output would be, nor beside it."""
  output = source.parent / 'out' / 'model'
  with pytest.raises(UserError, match=named) as caught:
    convert(source, output, **options)
  assert '\n' not in str(caught.value)
  assert not output.parent.exists() or not any(output.parent.iterdir())


def test_every_value_is_where_it_belongs(tmp_path):
  tensors = cohere_tensors()
  names = sorted(tensors)
  halves = [{name: tensors[name] for name in part} for part in (names[::2], names[1::2])]
  source = folders.write_hf(tmp_path / 'hf', CONFIG, *halves)
  seen = []
  importing.convert(
    source, tmp_path / 'out', dtype='float32', command='the command',
    progress=lambda done, total: seen.append((done, total)),
  )  # fmt: skip
  ours, layer = folders.read_checkpoint(tmp_path / 'out'), 'model.layers.2.self_attn.'
  assert ours['blocks/attention/query'].shape == (3, 24, 6, 4)
  query = tensors[layer + 'q_proj.weight'].reshape(6, 4, 24).transpose(2, 0, 1)
  np.testing.assert_array_equal(ours['blocks/attention/query'][2], query)
  out = tensors[layer + 'o_proj.weight'].reshape(24, 6, 4).transpose(1, 2, 0)
  np.testing.assert_array_equal(ours['blocks/attention/out'][2], out)
  np.testing.assert_array_equal(ours['embed/table'], tensors['model.embed_tokens.weight'])
  assert all(array.dtype == np.float32 for array in ours.values())
  total = sum(array.nbytes for array in tensors.values())
  assert seen[-1] == (total, total) and len(seen) == len(tensors)


def test_meta_says_where_it_is_from(tmp_path):
  tensors = cohere_tensors()
  source = folders.write_hf(tmp_path / 'hf', CONFIG, tensors)
  returned = convert(source, tmp_path / 'out')
  meta = checkpoint.read_meta(tmp_path / 'out')
  assert meta == returned
  assert (meta.model, meta.sequence_length, meta.run) == (MODEL, 8192, 'hf')
  assert (meta.step, meta.method, meta.sources) == (0, None, ())
  assert (meta.bos_token, meta.eos_token) == ('<|bos|>', '<|eos|>')
  # The tokenizer's hash is what `prepare` records of the data that it encodes.
  assert meta.tokenizer_hash == folders.sha256(source / 'tokenizer.json')
  file = checkpoint.find_tokenizer(tmp_path / 'out')
  assert file.parent == tmp_path / 'out' and folders.sha256(file) == meta.tokenizer_hash
  (origin,) = meta.manifest.sources
  assert origin.path == str(source) and meta.manifest.command == 'the command'
  sha = hashlib.sha256
  hashes = {
    name: sha(b''.join(sha(row.tobytes()).digest() for row in x)).hexdigest()
    for name, x in tensors.items()
  }
  assert origin.array_hashes == hashes
  made = {one.target: (one.how, one.source) for one in meta.manifest.made}
  assert made.keys() == folders.read_checkpoint(tmp_path / 'out').keys()
  assert made['blocks/ffn/up'] == ('transpose', 'model.layers.*.mlp.up_proj.weight')
  assert made['final_norm/scale'] == ('copy', 'model.norm.weight')


@pytest.mark.parametrize('stored', [ml_dtypes.bfloat16, np.float16, np.float32])
def test_dtypes(tmp_path, stored):
  tensors = {name: array.astype(stored) for name, array in cohere_tensors().items()}
  source = folders.write_hf(tmp_path / 'hf', CONFIG, tensors)
  for dtype in ('float32', 'bfloat16'):
    convert(source, tmp_path / dtype, dtype)
    ours = folders.read_checkpoint(tmp_path / dtype)
    up = tensors['model.layers.0.mlp.up_proj.weight'].astype(np.float32)
    wanted = up.T.astype(jnp.dtype(dtype))  # float32 holds all of them
    assert ours['blocks/ffn/up'].dtype == wanted.dtype
    assert ours['blocks/ffn/up'][0].tobytes() == wanted.tobytes()


def test_a_tied_head_may_be_listed_beside_the_table(tmp_path):
  tensors = cohere_tensors()
  table = tensors['model.embed_tokens.weight']
  source = folders.write_hf(tmp_path / 'hf', CONFIG, tensors | {'lm_head.weight': table.copy()})
  convert(source, tmp_path / 'model')
  assert 'unembed/kernel' not in folders.read_checkpoint(tmp_path / 'model')
  other = folders.write_hf(tmp_path / 'other', CONFIG, tensors | {'lm_head.weight': table + 1})
  check_refused(other, 'lm_head.weight other than model.embed_tokens.weight')


def test_a_head_of_its_own(tmp_path):
  facts = CONFIG | {'tie_word_embeddings': False}
  tensors = cohere_tensors(facts)
  convert(folders.write_hf(tmp_path / 'hf', facts, tensors), tmp_path / 'model')
  ours = folders.read_checkpoint(tmp_path / 'model')
  np.testing.assert_array_equal(ours['unembed/kernel'], tensors['lm_head.weight'].T)


@pytest.mark.parametrize(
  'change, named',
  [
    (lambda x: x.pop(Q_PROJ), f'lacks {Q_PROJ}, unlike'),
    (lambda x: (x.pop(Q_PROJ), x.pop('model.norm.weight')), f'lacks {Q_PROJ} and 1 more'),
    (
      lambda x: x.update({Q_PROJ.replace('weight', 'bias'): np.zeros(24, 'f')}),
      'has .*q_proj.bias',
    ),
    (lambda x: x.update({'model.layers.3.mlp.up_proj.weight': np.zeros(1, 'f')}), 'has .*layers.3'),
    (lambda x: x.update({'lm_head.weight': np.zeros((3, 24), 'f')}), 'lm_head.weight of shape'),
    (lambda x: x.update({Q_PROJ: x[Q_PROJ][:-1].copy()}), rf'{Q_PROJ} of shape \(23, 24\)'),
    (lambda x: x.update({Q_PROJ: x[Q_PROJ].reshape(24, 6, 4)}), r'of shape \(24, 6, 4\)'),
    (lambda x: x[Q_PROJ].__setitem__((23, 7), np.nan), f'{Q_PROJ} with values that are NaN'),
    (lambda x: x['model.norm.weight'].__setitem__(0, -np.inf), 'model.norm.weight with values'),
  ],
)
def test_tensors_that_do_not_fit(tmp_path, change, named):
  tensors = cohere_tensors()
  change(tensors)
  check_refused(folders.write_hf(tmp_path / 'hf', CONFIG, tensors), named)


def test_values_past_the_dtype(tmp_path):
  tensors = cohere_tensors()
  tensors[Q_PROJ][0, 0] = np.finfo(np.float32).max  # rounds to infinity
  source = folders.write_hf(tmp_path / 'hf', CONFIG, tensors)
  check_refused(source, f'{Q_PROJ} with values', dtype='bfloat16')
  convert(source, tmp_path / 'model')


@pytest.mark.parametrize(
  'text, named',
  [
    (None, 'config.json cannot be read: No such file'),
    ('{', 'config.json cannot be read'),
    ('[]', 'no JSON object'),
    ('{"hidden_size": 24, "hidden_size": 25}', "'hidden_size' twice"),
    (json.dumps(CONFIG | {'architectures': ['MistralForCausalLM']}), 'MistralForCausalLM'),
    (json.dumps(CONFIG | {'num_hidden_layers': 4}), 'lacks model.layers.3'),
    (json.dumps(CONFIG | {'max_position_embeddings': 0}), 'max_position_embeddings=0'),
  ],
)
def test_configs_that_do_not_fit(tmp_path, text, named):
  source = folders.write_hf(tmp_path / 'hf', CONFIG, cohere_tensors())
  (source / 'config.json').unlink()
  if text is not None:
    (source / 'config.json').write_text(text)
  check_refused(source, named)


def test_a_folder_that_is_not_there(tmp_path):
  check_refused(tmp_path / 'nowhere', 'nowhere/config.json cannot be read: No such file')


def test_tokenizers(tmp_path):
  source = folders.write_hf(tmp_path / 'hf', CONFIG, cohere_tensors())
  check_refused(source, "no token '<none>': mend --bos_token", bos_token='<none>')
  meta = convert(source, tmp_path / 'given', bos_token='<|eos|>', eos_token='<|bos|>')
  assert (meta.bos_token, meta.eos_token) == ('<|eos|>', '<|bos|>')
  elsewhere = tmp_path / 'words.json'
  (source / 'tokenizer.json').rename(elsewhere)
  check_refused(source, 'holds no tokenizer.json')
  meta = convert(source, tmp_path / 'model', tokenizer=elsewhere)
  assert folders.sha256(tmp_path / 'model' / 'tokenizer.json') == meta.tokenizer_hash
  small = folders.write_hf(
    tmp_path / 'small', CONFIG | {'vocab_size': 260}, cohere_tensors(CONFIG | {'vocab_size': 260})
  )
  check_refused(small, 'has 266 tokens and the model .* has rows for 260')


def test_an_output_that_is_there(tmp_path):
  source = folders.write_hf(tmp_path / 'hf', CONFIG, cohere_tensors())
  (tmp_path / 'out').mkdir()
  with pytest.raises(UserError, match='out exists'):
    convert(source, tmp_path / 'out')
  assert not any((tmp_path / 'out').iterdir())

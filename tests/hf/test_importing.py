"""A folder of transformers becomes a checkpoint, exactly, or there is a sentence and no output."""

import hashlib

import numpy as np
import pytest

from bam_jax import checkpoint, config
from bam_jax.checkpoint import arrays, manifest
from bam_jax.convert import writing
from bam_jax.errors import UserError
from bam_jax.hf import exporting, importing
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


def test_every_value_is_where_it_belongs_and_meta_says_where_it_is_from(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  tensors = cohere_tensors()
  names = sorted(tensors)
  halves = [{name: tensors[name] for name in part} for part in (names[::2], names[1::2])]
  source, seen = folders.write_hf(tmp_path / 'hf', CONFIG, *halves), []
  returned = importing.convert(
    source, 'out', dtype='float32', command='the command',
    progress=lambda done, total: seen.append((done, total)),
  )  # fmt: skip
  ours, layer = folders.read_checkpoint(tmp_path / 'out'), 'model.layers.2.self_attn.'
  query = tensors[layer + 'q_proj.weight'].reshape(6, 4, 24).transpose(2, 0, 1)
  np.testing.assert_array_equal(ours['blocks/attention/query'][2], query)
  out = tensors[layer + 'o_proj.weight'].reshape(24, 6, 4).transpose(1, 2, 0)
  np.testing.assert_array_equal(ours['blocks/attention/out'][2], out)
  np.testing.assert_array_equal(ours['embed/table'], tensors['model.embed_tokens.weight'])
  total = sum(array.nbytes for array in tensors.values())
  assert seen[-1] == (total, total) and len(seen) == len(tensors)

  meta = checkpoint.read_meta(tmp_path / 'out')
  assert meta == returned
  assert (meta.model, meta.sequence_length, meta.run) == (MODEL, 8192, 'hf')
  assert (meta.step, meta.method, meta.sources) == (0, None, ())
  assert (meta.bos_token, meta.eos_token) == ('<|bos|>', '<|eos|>')
  # The tokenizer's hash is what `prepare` records of the data that it encodes.
  file = checkpoint.find_tokenizer(tmp_path / 'out')
  assert file.parent == tmp_path / 'out'
  assert file.read_bytes() == (source / 'tokenizer.json').read_bytes()
  sha = hashlib.sha256
  assert meta.tokenizer_hash == sha(file.read_bytes()).hexdigest()
  (origin,) = meta.manifest.sources
  assert origin.path == str(source) and meta.manifest.command == 'the command'
  assert origin.array_hashes == {
    name: sha(b''.join(sha(row.tobytes()).digest() for row in x)).hexdigest()
    for name, x in tensors.items()
  }
  made = {one.target: (one.how, one.source) for one in meta.manifest.made}
  assert made.keys() == ours.keys()
  assert made['blocks/ffn/up'] == ('transpose', 'model.layers.*.mlp.up_proj.weight')
  assert made['final_norm/scale'] == ('copy', 'model.norm.weight')


def test_a_tied_head_may_be_listed_beside_the_table(tmp_path):
  tensors, head = cohere_tensors(), 'lm_head.weight'
  table = tensors['model.embed_tokens.weight']
  source = folders.write_hf(tmp_path / 'hf', CONFIG, tensors | {head: table.copy()})
  convert(source, tmp_path / 'model')
  assert 'unembed/kernel' not in folders.read_checkpoint(tmp_path / 'model')
  table[3, 5] = np.nan  # in both alike
  alike = folders.write_hf(tmp_path / 'alike', CONFIG, tensors | {head: table.copy()})
  check_refused(alike, r'nan at model.embed_tokens.weight\[3, 5\]')


def test_values_past_the_dtype(tmp_path):
  tensors = cohere_tensors()
  tensors[Q_PROJ][2, 1] = np.finfo(np.float32).max  # rounds to infinity
  source = folders.write_hf(tmp_path / 'hf', CONFIG, tensors)
  check_refused(source, rf'inf at {Q_PROJ}\[2, 1\]', dtype='bfloat16')
  convert(source, tmp_path / 'model')


def test_tokenizers(tmp_path):
  source = folders.write_hf(tmp_path / 'hf', CONFIG, cohere_tensors())
  check_refused(source, "no token '<none>'.*--bos_token", bos_token='<none>')
  elsewhere = tmp_path / 'words.json'
  (source / 'tokenizer.json').rename(elsewhere)
  words = dict(tokenizer=elsewhere, bos_token='<|eos|>', eos_token='<|bos|>')
  meta = convert(source, tmp_path / 'model', **words)
  assert (meta.bos_token, meta.eos_token) == ('<|eos|>', '<|bos|>')
  assert (tmp_path / 'model' / 'tokenizer.json').read_bytes() == elsewhere.read_bytes()
  facts = CONFIG | {'vocab_size': 260}
  small = folders.write_hf(tmp_path / 'small', facts, cohere_tensors(facts))
  check_refused(small, 'has 266 tokens, but the model .* has 260')


def test_folders_are_mixed_where_they_are(tmp_path):
  """What `convert upcycle` makes of folders is what it makes of their imports."""
  opened = []
  for number, name in enumerate(('one', 'two', 'three')):
    facts = CONFIG | {'tie_word_embeddings': False, 'rope_theta': 5.0 + number}
    folder = folders.write_hf(tmp_path / name, facts, cohere_tensors(facts, number))
    imported = tmp_path / f'imported_{name}'
    convert(str(folder), imported)
    opened.append((importing.open_any(str(folder)), importing.open_any(str(imported))))
  for which, name in enumerate(('from_folders', 'from_imports')):
    pair = [both[which] for both in opened]
    how = config.Upcycle(tuple(one.path for one in pair), 'bam_kv_experts', num_experts=4)
    writing.to_checkpoint(tmp_path / name, pair, how, 3, 'bam', 'float32', '', lambda *_: None)
  left, right = (checkpoint.read_meta(tmp_path / n) for n in ('from_folders', 'from_imports'))
  assert left.model == right.model and len(left.model.attention_experts.ropes) == 4
  left, right = (folders.read_checkpoint(tmp_path / n) for n in ('from_folders', 'from_imports'))
  for path, array in right.items():
    np.testing.assert_array_equal(left[path], array, err_msg=path, strict=True)


def test_sources_that_are_not_quite_alike(tmp_path, monkeypatch):
  """A tied one of another rotation and length beside an untied one, by the three flags."""
  monkeypatch.setattr(arrays, 'CHUNK_BYTES', 2000)
  facts = [CONFIG, CONFIG | {'tie_word_embeddings': False, 'rope_theta': 5.0}]
  opened = [
    importing.open_any(str(folders.write_hf(tmp_path / f'{n}', one, cohere_tensors(one, n))))
    for n, one in enumerate(facts)
  ]
  how = config.Upcycle(tuple(one.path for one in opened), 'btx')
  make = lambda adapted: writing.to_checkpoint(
    tmp_path / 'mix', adapted, how, 3, 'bam', 'float32', '', lambda *_: None
  )
  with pytest.raises(UserError, match='tied_embeddings: True -> False.*--untie copies the table'):
    make(importing.adapt(opened, True, False, 0))
  with pytest.raises(UserError, match='rope_theta: .* convert upcycle --rope=first'):
    make(importing.adapt(opened, False, True, 0))
  meta = make(importing.adapt(opened, True, True, 99))
  assert meta.model.rope_theta == 8e6 and meta.sequence_length == 99
  table, head = (opened[n].reader.read(p) for n, p in enumerate(('embed/table', 'unembed/kernel')))
  got = folders.read_checkpoint(tmp_path / 'mix')['unembed/kernel']
  np.testing.assert_array_equal(got, (table.T + head) / 2)
  # A source's hashes are of what was mixed, its copy of the table too.
  hashes, copy = meta.manifest.sources[0].array_hashes, manifest.Hash()
  copy.update(table.T)
  assert hashes['unembed/kernel'] == copy.hexdigest()


def test_a_specialist_that_went_through_transformers_mixes_with_its_seed(tmp_path):
  """Its tokenizer.json is another file then, which gives every text the same ids."""
  model = folders.make_model()
  for number, name in enumerate(('seed', 'code')):
    folders.write_checkpoint(tmp_path / name, model, folders.draw(model, number), run=name)
  how = dict(dtype=None, max_shard_size='1GB', progress=lambda *_: None)
  exporting.convert(tmp_path / 'code', str(tmp_path / 'hf'), **how)
  convert(str(tmp_path / 'hf'), tmp_path / 'again')
  opened = [importing.open_any(str(tmp_path / name)) for name in ('seed', 'again')]
  assert opened[0].meta.tokenizer_hash != opened[1].meta.tokenizer_hash
  upcycle = config.Upcycle(tuple(one.path for one in opened), 'bam_kv_experts')
  how = dict(seed=3, name='', dtype='float32', command='', progress=lambda *_: None)
  meta = writing.to_checkpoint(tmp_path / 'mix', opened, upcycle, **how)
  assert meta.sources == ('seed', 'hf')

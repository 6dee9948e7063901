"""A checkpoint becomes a folder of transformers and comes back from it to the bit.

That the folder's models compute what ours do is shown in tests/parity, with transformers.
"""

import io
import re
import shutil
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import processors

from bam_jax import config
from bam_jax.data.tokenizer import Tokenizer
from bam_jax.errors import UserError
from bam_jax.hf import exporting, files, importing
from tests.hf import folders
from tests.hf.folders import MODELS, draw, make_model


def convert(
  source, output, dtype=None, max_shard_size='1GB', progress=lambda done, total: None, **options
):
  return exporting.convert(
    source, output, dtype=dtype, max_shard_size=max_shard_size, progress=progress, **options
  )


def back(source, output):
  progress = lambda done, total: None
  return importing.convert(source, output, dtype='float32', command='', progress=progress)


def bits(values: dict[str, np.ndarray]) -> dict:
  return {path: (x.dtype, x.shape, x.tobytes()) for path, x in values.items()}


def files_of(folder) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize('name', MODELS)
def test_there_and_back_and_there_again(tmp_path, name):
  model, seen = make_model(name), []
  values = draw(model)
  origin = {'method': 'btx', 'sources': ('seed', 'code')} if model != model.dense() else {}
  folders.write_checkpoint(tmp_path / 'a', model, values, **origin)
  progress = lambda done, total: seen.append((done, total))
  convert(tmp_path / 'a', tmp_path / 'hf', None, '20KB', progress)
  assert seen[-1][0] == seen[-1][1] == sum(x.nbytes for x in values.values())
  meta = back(tmp_path / 'hf', tmp_path / 'b')
  assert bits(folders.read_checkpoint(tmp_path / 'b')) == bits(values)
  assert meta.model == model and meta.sequence_length == 64
  if not origin:  # a seed, which may be read where it is
    reader = importing.open_any(str(tmp_path / 'hf')).reader
    for path, array in values.items():
      one = array[1] if path.startswith('blocks/') else array
      where = (1,) if path.startswith('blocks/') else ()
      np.testing.assert_array_equal(reader.read(path, where), one, err_msg=path)
  assert (meta.method, meta.sources) == (origin.get('method'), origin.get('sources', ()))
  assert (meta.bos_token, meta.eos_token) == ('<|bos|>', '<|eos|>')
  convert(tmp_path / 'b', tmp_path / 'again', max_shard_size='20KB')
  first, second = files_of(tmp_path / 'hf'), files_of(tmp_path / 'again')
  assert first.pop('README.md') != second.pop('README.md')  # it says where the model is from
  assert first == second


@pytest.mark.parametrize(
  'stored, asked', [('float32', 'bfloat16'), ('bfloat16', None), ('bfloat16', 'float32')]
)
def test_dtypes(tmp_path, stored, asked):
  model = make_model('routed')
  values = {path: x.astype(jnp.dtype(stored)) for path, x in draw(model).items()}
  folders.write_checkpoint(tmp_path / 'a', model, values)
  facts = convert(tmp_path / 'a', tmp_path / 'hf', asked)
  reader = files.Reader(tmp_path / 'hf')
  up = reader.read('model.layers.0.mlp.experts.1.up_proj.weight')
  expected = values['blocks/ffn/up'][0, 1].T.astype(jnp.dtype(asked or stored))
  assert up.dtype == expected.dtype and up.tobytes() == expected.tobytes()
  assert reader.specs['model.layers.0.mlp.router.weight'].dtype == stored
  assert reader.specs['model.layers.0.mlp.router.e_score_correction_bias'].dtype == stored
  config_json = folders.read_json(tmp_path / 'hf' / 'config.json')
  assert config_json['dtype'] == facts['dtype'] == (asked or stored)


def with_tokenizer(folder, content: bytes, name='tokenizer.json') -> Tokenizer:
  """A dense checkpoint with another tokenizer."""
  model = make_model(vocab_size=600)
  tokenizer = Tokenizer(content, name)
  folders.write_checkpoint(
    folder, model, draw(model), tokenizer_hash=tokenizer.hash, bos_token=tokenizer.bos_token,
    eos_token=tokenizer.eos_token,
  )  # fmt: skip
  (folder / 'tokenizer.json').unlink()
  tokenizer.save(folder)
  return tokenizer


def template(text: str) -> processors.TemplateProcessing:
  specials = [('<|bos|>', 0), ('<|eos|>', 1)]
  return processors.TemplateProcessing(single=text, special_tokens=specials)


AFTER = template('$A <|bos|>')  # of a tokenizer with one token as BOS and EOS


@pytest.mark.parametrize('rule, kept', [
  (None, False),
  (template('<|bos|> $A'), True),
  (template('<|bos|> $A <|eos|>'), False),
  (processors.Sequence([processors.ByteLevel(), template('$A <|eos|>')]), False),
  (AFTER, False),
])  # fmt: skip
def test_a_text_begins_as_our_documents_do_and_does_not_end(tmp_path, rule, kept):
  """Whatever the tokenizer adds by itself, a prompt is what `generate` feeds the model."""
  backend = tokenizers.Tokenizer.from_file(str(folders.make_tokenizer().save(tmp_path)))
  if rule is not None:
    backend.post_processor = rule
  content = backend.to_str().encode()
  if rule is AFTER:
    content = content.replace(b'<|bos|>', b'<|endoftext|>').replace(b'<|eos|>', b'<|other|>')
  ours = with_tokenizer(tmp_path / 'a', content)
  convert(tmp_path / 'a', tmp_path / 'hf')
  file, text = tmp_path / 'hf' / 'tokenizer.json', ' the cat: def f(7)'
  theirs = tokenizers.Tokenizer.from_file(str(file))
  encoded, alone = theirs.encode(text), theirs.encode(text, add_special_tokens=False)
  assert encoded.ids == [ours.bos_id, *ours.encode(text)] and alone.ids == ours.encode(text)
  assert Tokenizer.load(tmp_path / 'hf').encode(text) == ours.encode(text)
  assert (file.read_bytes() == content) == kept
  if rule is None or 'ByteLevel' in repr(rule):  # which only moves offsets
    before = backend.encode(text, add_special_tokens=False)
    assert encoded.offsets[1:] == before.offsets


def test_a_sentencepiece_model_is_copied(tmp_path):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(['the cat sat on the mat'] * 20), model_writer=model, vocab_size=15,
    minloglevel=2,
  )  # fmt: skip
  tokenizer = with_tokenizer(tmp_path / 'a', model.getvalue(), 'tokenizer.model')
  convert(tmp_path / 'a', tmp_path / 'hf')
  assert (tmp_path / 'hf' / 'tokenizer.model').read_bytes() == model.getvalue()
  assert not (tmp_path / 'hf' / 'tokenizer_config.json').exists()
  facts = folders.read_json(tmp_path / 'hf' / 'config.json')
  assert (facts['bos_token_id'], facts['eos_token_id']) == (tokenizer.bos_id, tokenizer.eos_id)
  card = (tmp_path / 'hf' / 'README.md').read_text()
  assert f'A document begins with {tokenizer.bos_token}' in card


@pytest.mark.parametrize('template, kept', [('{{ bos_token }}x', True), ('{{ eos_token }}', False)])
@pytest.mark.parametrize('apart', [True, False])
def test_a_chat_template_with_other_tokens_is_left_out(tmp_path, template, kept, apart):
  source, model = tmp_path / 'hf', make_model()
  facts = {'bos_token': {'content': '<|bos|>'}, 'eos_token': '<|other|>', 'an_option': 5}
  facts['pad_token'] = {'content': '!'}
  folders.write_checkpoint(tmp_path / 'a', model, draw(model))
  if apart:
    (tmp_path / 'a' / 'chat_template.jinja').write_text(template)
  else:
    facts['chat_template'] = template
  folders.write_json(tmp_path / 'a' / 'tokenizer_config.json', facts)
  convert(tmp_path / 'a', source)
  written = folders.read_json(source / 'tokenizer_config.json')
  assert written['an_option'] == 5 and written['eos_token'] == '<|eos|>'
  pad_id = folders.read_json(source / 'config.json')['pad_token_id']
  assert written['pad_token'] == '!' and folders.make_tokenizer().encode('!') == [pad_id]
  file = source / 'chat_template.jinja'
  assert (file.exists() if apart else 'chat_template' in written) == kept


def test_the_model_card(tmp_path):
  model = make_model('shared_kv')
  sources = ('seed', 'code', 'law')
  how = dict(method='bam_shared_kv', sources=sources)
  folders.write_checkpoint(tmp_path / 'a', model, draw(model), **how)
  convert(tmp_path / 'a', tmp_path / 'hf')
  text = (tmp_path / 'hf' / 'README.md').read_text()
  for part in (
    '# tiny\n', 'BamForCausalLM', 'step 7', '`bam_shared_kv`', 'seed, code, law',
    '3 attention experts, soft', '4 FFN experts, top-1', 'trust_remote_code=True',
  ):  # fmt: skip
    assert part in text, part
  folders.write_checkpoint(tmp_path / 'b', make_model(), draw(make_model()))
  convert(tmp_path / 'b', tmp_path / 'dense')
  text = (tmp_path / 'dense' / 'README.md').read_text()
  assert 'CohereForCausalLM' in text and 'trust_remote_code' not in text
  assert not (tmp_path / 'dense' / 'modeling_bam.py').exists()


def test_the_code_of_a_mixture_needs_nothing_of_ours():
  allowed = {'torch', 'transformers', 'configuration_bam'} | sys.stdlib_module_names
  for name in exporting.CODE:
    code = Path(exporting.__file__).with_name(name).read_text()
    imported = set(re.findall(r'^ *(?:from|import) \.?(\w+)', code, re.MULTILINE))
    assert imported and imported <= allowed, name


def check_refused(source, output, named) -> None:
  with pytest.raises(UserError, match=named) as caught:
    convert(source, output)
  assert '\n' not in str(caught.value)
  assert not output.exists() and not list(output.parent.glob(f'{output.name}.*'))


def test_what_cannot_be_exported(tmp_path):
  model, output = make_model(), tmp_path / 'hf'
  values = draw(model)
  check_refused(tmp_path, output, 'holds no checkpoint')
  good = folders.write_checkpoint(tmp_path / 'good', model, values)
  (tmp_path / 'there').mkdir()
  with pytest.raises(UserError, match='there exists'):
    convert(good, tmp_path / 'there')
  assert not any((tmp_path / 'there').iterdir())
  with pytest.raises(UserError, match='export to a local folder'):
    convert(good, 'gs://bucket/folder')
  less = {path: x for path, x in values.items() if path != 'final_norm/scale'}
  folders.write_checkpoint(tmp_path / 'less', model, less)
  check_refused(tmp_path / 'less', output, 'final_norm/scale of shape None where')
  values['blocks/ffn/up'][2, 23, 19] = np.nan
  folders.write_checkpoint(tmp_path / 'nan', model, values)
  check_refused(tmp_path / 'nan', output, r'has nan at blocks/ffn/up\[2, 23, 19\]')
  ranked = make_model(ffn_experts=config.FFNExperts(2), embedding_rank=3)
  folders.write_checkpoint(tmp_path / 'ranked', ranked, draw(ranked))
  check_refused(tmp_path / 'ranked', output, 'No class of transformers has embedding_rank=3: mix')
  (good / 'tokenizer.json').unlink()
  check_refused(good, output, 'lacks its tokenizer')
  shutil.rmtree(good / 'meta')
  check_refused(good, output, 'holds no checkpoint')


def test_only_our_class_has_a_bias_of_experts(tmp_path):
  model = make_model(**folders.LLAMA, ffn_experts=config.FFNExperts(3, top_k=2, expert_bias=True))
  values, bam, qwen = draw(model), 'BamForCausalLM', 'Qwen2MoeForCausalLM'
  folders.write_checkpoint(tmp_path / 'biased', model, values)
  assert convert(tmp_path / 'biased', tmp_path / 'bam')['architecture'] == bam
  with pytest.raises(UserError, match='expert_bias is not zero'):
    convert(tmp_path / 'biased', tmp_path / 'hf', architecture=qwen)
  values['blocks/ffn/expert_bias'][:] = 0
  folders.write_checkpoint(tmp_path / 'zero', model, values)
  assert convert(tmp_path / 'zero', tmp_path / 'hf')['architecture'] == qwen
  assert 'trust_remote_code' not in (tmp_path / 'hf' / 'README.md').read_text()
  read = files.Reader(tmp_path / 'hf').read
  assert not read('model.layers.2.mlp.shared_expert.up_proj.weight').any()
  down = read('model.layers.2.mlp.experts.1.down_proj.weight')
  assert down.tobytes() == np.ascontiguousarray(values['blocks/ffn/down'][2, 1].T).tobytes()

"""A chat template goes through a mixture, and transformers applies it as before."""

import pytest

from bam_jax import config
from bam_jax.convert import writing
from bam_jax.hf import exporting, importing
from tests.hf import folders
from tests.hf.folders import CONFIG, cohere_tensors

transformers = pytest.importorskip('transformers')
TEMPLATE = (
  '{{ bos_token }}{% for one in messages %}<{{ one.role }}>{{ one.content }}{{ eos_token }}'
  '{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}'
)
CHAT = [{'role': 'user', 'content': 'the cat?'}, {'role': 'assistant', 'content': ' the mat'}]
EOS = {'__type': 'AddedToken', 'content': '<|eos|>', 'special': True, 'normalized': False}
FACTS = {
  'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': '<|bos|>', 'eos_token': EOS,
  'auto_map': {'AutoTokenizer': ['a.B', None]},
}  # fmt: skip


@pytest.mark.parametrize('in_config', [False, True])
def test_it_is_applied_as_before(tmp_path, in_config):
  opened = []
  for number, name in enumerate(('chat', 'other')):
    folder = folders.write_hf(tmp_path / name, CONFIG, cohere_tensors(seed=number))
    facts = FACTS | {'model_max_length': 7}
    if in_config:
      facts['chat_template'] = TEMPLATE.replace('<assistant>', name)
    else:
      (folder / 'chat_template.jinja').write_text(TEMPLATE.replace('<assistant>', name))
    folders.write_json(folder / 'tokenizer_config.json', facts)
    opened.append(importing.open_any(str(folder)))
  how = config.Upcycle(tuple(one.path for one in opened), 'bam_kv_experts')
  writing.to_checkpoint(tmp_path / 'mix', opened, how, 3, '', 'float32', '', lambda *_: None)
  options = dict(dtype=None, max_shard_size='1GB', progress=lambda *_: None)
  exporting.convert(tmp_path / 'mix', str(tmp_path / 'hf'), **options)
  texts = []
  for folder in ('chat', 'hf'):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / folder)
    tokenized = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)['input_ids']
    text = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    texts.append((text, tokenized))
  assert texts[0] == texts[1] and texts[0][0].endswith(' the mat<|eos|>chat')
  written = folders.read_json(tmp_path / 'hf' / 'tokenizer_config.json')
  assert 'auto_map' not in written and written['model_max_length'] == 8192

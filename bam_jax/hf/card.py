"""The README.md of an exported folder, for people who know nothing of bam_jax."""

import os

from bam_jax import checkpoint, config
from bam_jax.data.tokenizer import HUGGING_FACE_FILE, Tokenizer
from bam_jax.model import arithmetic

_METHODS = {
  'bam_kv_experts': 'BAM with KV experts: attention experts with keys and values of their own',
  'bam_shared_kv': 'BAM with shared KV: attention experts on one averaged key and value',
  'btx': 'Branch-Train-MiX: FFN experts; attention is averaged',
  'sparse': 'sparse upcycling: FFN experts, copies of one dense model',
  'average': 'the average of dense models',
}
_LOAD = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained('FOLDER')
model = AutoModelForCausalLM.from_pretrained('FOLDER', dtype='auto'{trust})
inputs = tokenizer('Once upon a time', return_tensors='pt', return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
```
"""
_CODE = """
The model is `modeling_bam.py`, in this folder; `trust_remote_code=True` lets transformers run it.
It drops no tokens, whatever room experts had for them in training, and adds no balancing loss when
it is fine-tuned.
"""
_SENTENCEPIECE = """
The tokenizer is a SentencePiece model, `tokenizer.model`, which AutoTokenizer does not read from
here: load it with the package sentencepiece. A document begins with {bos} and ends with {eos}.
"""


def text(meta: checkpoint.Meta, config_json: dict, tokenizer: Tokenizer) -> str:
  """The model card: what the model is, where it comes from, how to load it."""
  model, counts = meta.model, arithmetic.parameters(meta.model)
  mixture = model != model.dense()
  tags = ['bam_jax', *(['mixture-of-experts'] if mixture else [])]
  front = ['---', 'library_name: transformers', 'pipeline_tag: text-generation', 'tags:']
  front += [*(f'- {tag}' for tag in tags), '---', '']
  lines = [
    f'# {meta.run}',
    '',
    f'`{config_json["architectures"][0]}`, {counts.total:,} parameters, of which a token meets '
    f'{counts.active:,}; exported by bam_jax from step {meta.step}.',
    '',
    *_experts(model),
  ]
  if meta.method:
    lines.append(f'- Method: {_METHODS[meta.method]}.')
  if meta.sources:
    lines.append(f'- Sources, in the order of the experts: {", ".join(meta.sources)}.')
  for source in meta.manifest.sources if meta.manifest else ():
    name = source.run or os.path.basename(source.path)  # whole paths are nobody's business
    step = '' if source.step is None else f', step {source.step}'
    digest = f', content hash `{source.hash}`' if source.hash else ''
    lines.append(f'- Made from `{name}`{step}{digest}.')
  lines += [
    f'- Trained on {meta.sequence_length:,} tokens at once.',
    f'- Tokenizer: {tokenizer.vocab_size:,} tokens, SHA-256 of its file `{meta.tokenizer_hash}`.',
    f'- Made with {", ".join(f"{name} {version}" for name, version in meta.versions.items())}.',
    '',
    _LOAD.format(trust=', trust_remote_code=True' if mixture else ''),
  ]
  if mixture:
    lines.append(_CODE)
  if tokenizer.file_name != HUGGING_FACE_FILE:
    lines.append(_SENTENCEPIECE.format(bos=tokenizer.bos_token, eos=tokenizer.eos_token))
  return '\n'.join([*front, *lines])


def _experts(model: config.Model) -> list[str]:
  attention, ffn = model.attention_experts, model.ffn_experts
  lines = []
  if attention:
    routing = f'top-{attention.top_k}' if attention.top_k else 'soft'
    keys = 'shared' if attention.shared_kv else 'their own'
    lines.append(f'- {attention.num_experts} attention experts, {routing}, keys and values {keys}.')
  if ffn:
    lines.append(f'- {ffn.num_experts} FFN experts, top-{ffn.top_k}.')
  return lines

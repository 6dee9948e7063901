"""The README.md of an exported folder, for readers who do not know bam_jax."""

from bam_jax import checkpoint
from bam_jax.data.tokenizer import HUGGING_FACE_FILE, Tokenizer
from bam_jax.hf.families import BAM
from bam_jax.model import arithmetic

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [{tags}]
---

# {name}

{facts}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained('FOLDER'{trust})
model = AutoModelForCausalLM.from_pretrained('FOLDER', dtype='auto'{trust})
inputs = tokenizer('Once upon a time', return_tensors='pt', return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
```
"""
_CODE = """
The code is `modeling_bam.py`, in this folder; `trust_remote_code=True` lets transformers run it. It
drops no tokens, whatever the capacity of experts was in training, and adds no balancing loss.
"""
_SENTENCEPIECE = """
AutoTokenizer does not read the SentencePiece model `tokenizer.model`: load it with the package
sentencepiece. A document begins with {0.bos_token} and ends with {0.eos_token}.
"""


def text(meta: checkpoint.Meta, architecture: str, tokenizer: Tokenizer) -> str:
  """The model card: what the model is, where it comes from, how to load it."""
  counts = arithmetic.parameters(meta.model)
  facts = [
    f'`{architecture}`, {counts.total:,} parameters, {counts.active:,} of them active for a token.',
    f'Exported by bam_jax: step {meta.step}, trained on {meta.sequence_length:,} tokens at once.',
  ]
  if attention := meta.model.attention_experts:
    routing = f'top-{attention.top_k}' if attention.top_k else 'soft'
    keys = 'shared' if attention.shared_kv else 'their own'
    facts.append(f'{attention.num_experts} attention experts, {routing}, keys and values {keys}.')
  if ffn := meta.model.ffn_experts:
    facts.append(f'{ffn.num_experts} FFN experts, top-{ffn.top_k}.')
  if meta.method:
    experts = ', '.join(meta.sources)
    facts.append(f'Method: `{meta.method}`. Sources, in the order of the experts: {experts}.')
  coded = architecture == BAM.architecture
  card = _CARD.format(
    tags='bam_jax, mixture-of-experts' if attention or ffn else 'bam_jax',
    name=meta.run,
    facts='\n'.join(f'- {fact}' for fact in facts),
    trust=', trust_remote_code=True' if coded else '',
  )
  if tokenizer.file_name != HUGGING_FACE_FILE:
    card += _SENTENCEPIECE.format(tokenizer)
  return card + _CODE if coded else card

"""GGUF files: every type of tensor, tokenizers, and a sentence for what cannot be imported.

That an imported file computes what transformers does is shown in tests/parity.
"""

import io

import gguf as library
import numpy as np
import pytest
import sentencepiece
from gguf import GGMLQuantizationType as Type

from bam_jax import checkpoint, config
from bam_jax.convert import writing
from bam_jax.hf import gguf, importing
from tests.hf import folders, gguf_files
from tests.hf.test_importing import check_refused, convert

FACTS = {
  'architectures': ['LlamaForCausalLM'], 'model_type': 'llama', 'vocab_size': 270,
  'hidden_size': 24, 'intermediate_size': 20, 'num_hidden_layers': 2, 'num_attention_heads': 6,
  'num_key_value_heads': 2, 'max_position_embeddings': 64, 'rms_norm_eps': 1e-5,
}  # fmt: skip


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(seed)
  found = folders.cohere_tensors(FACTS, seed)
  for layer in range(2):
    found[f'model.layers.{layer}.post_attention_layernorm.weight'] = rng.normal(size=24)
  found['lm_head.weight'] = rng.normal(size=(270, 24))
  return {name: array.astype(np.float32) for name, array in found.items()}


def write(path, changes: dict = {}, seed: int = 0, more: dict = {}, types=None):  # noqa: B006
  """A Llama's file, changed: metadata and tensors by name, None to leave one out."""
  values = gguf_files.renamed(FACTS, tensors(seed)) | more
  values = {name: array for name, array in values.items() if array is not None}
  kind = changes.get('general.architecture', 'llama')
  facts = {k: v for k, v in changes.items() if k != 'general.architecture'}
  return gguf_files.write(path, kind, gguf_files.metadata(FACTS) | facts, values, types)


def test_every_type_is_what_the_package_unpacks(tmp_path, monkeypatch):
  monkeypatch.setattr(gguf, 'STRIP', 3)
  rng = np.random.default_rng(0)
  packed, types = {}, {name: Type[name] for name in gguf.TYPES}
  for name, type_ in types.items():
    values, (block, size) = rng.normal(size=(8, 512)).astype('f'), library.GGML_QUANT_SIZES[type_]
    try:
      packed[name] = library.quantize(values, type_)
    except NotImplementedError:  # of these the package only unpacks; scales are finite in float16
      packed[name] = rng.integers(0, 60, (8, 512 // block * size), np.uint8)
  write(tmp_path / 'it.gguf', more=packed, types=types)
  reader = gguf.Reader(tmp_path / 'it.gguf')
  for name, type_ in types.items():
    want = library.dequantize(packed[name], type_)
    assert np.isfinite(want).all() and reader.specs[name].shape == want.shape == (8, 512)
    np.testing.assert_array_equal(reader.read(name), want, strict=True)
    np.testing.assert_array_equal(reader.read(name, slice(2, 7)), want[2:7], strict=True)


def test_files_are_mixed_where_they_are_beside_folders(tmp_path):
  """What `convert upcycle` makes of a file is what it makes of the folder with the same values."""
  opened = []
  for seed in range(2):
    folder = folders.write_hf(tmp_path / f'hf{seed}', FACTS, tensors(seed))
    file = write(tmp_path / f'it{seed}.gguf', seed=seed)
    opened.append((importing.open_any(str(file)), importing.open_any(str(folder))))
  (one, one_too), (_, other) = opened
  assert one.meta.run == 'it0' and one.tokenizer().difference(other.tokenizer()) == ''
  made = []
  for number, pair in enumerate(((one, other), (one_too, other))):
    how = config.Upcycle(tuple(each.path for each in pair), 'bam_kv_experts')
    output = tmp_path / f'mix{number}'
    writing.to_checkpoint(output, pair, how, 3, 'bam', 'float32', '', lambda *_: None)
    made.append(folders.read_checkpoint(output))
    assert checkpoint.read_meta(output).model.tied_embeddings is False
  for path, array in made[1].items():
    np.testing.assert_array_equal(made[0][path], array, err_msg=path, strict=True)


TEXTS = [
  'the cat sat',
  '  two  spaces\nand a line',
  'na\u00efve \u4e2d\u6587 \U0001f600',
  '',
  ' x 3.14',
]


def test_tokenizers_are_rebuilt(tmp_path):
  ours = folders.make_tokenizer()
  rebuilt = gguf.tokenizer(gguf.Reader(write(tmp_path / 'bytes.gguf')), None, None)
  assert rebuilt.difference(ours) == '' and rebuilt.encode_batch(TEXTS) == ours.encode_batch(TEXTS)
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(['the cat sat on the mat', 'an extra cat', 'two  spaces'] * 20),
    model_writer=model, vocab_size=290, model_type='bpe', byte_fallback=True, minloglevel=2,
    normalization_rule_name='identity', remove_extra_whitespaces=False, hard_vocab_limit=False,
  )  # fmt: skip
  theirs = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
  numbers = range(theirs.GetPieceSize())
  asked = {2: theirs.IsUnknown, 3: theirs.IsControl, 6: theirs.IsByte}
  facts = {
    'model': 'llama', 'tokens': [theirs.IdToPiece(n) for n in numbers], 'merges': None,
    'scores': [theirs.GetScore(n) for n in numbers], 'pre': None,
    'token_type': [next((t for t, is_it in asked.items() if is_it(n)), 1) for n in numbers],
  }  # fmt: skip
  facts = {f'tokenizer.ggml.{key}': value for key, value in facts.items()}
  rebuilt = gguf.tokenizer(gguf.Reader(write(tmp_path / 'pieces.gguf', facts)), None, None)
  assert rebuilt.encode_batch(TEXTS) == [theirs.EncodeAsIds(text) for text in TEXTS]
  assert [rebuilt.decode(ids) for ids in rebuilt.encode_batch(TEXTS)] == TEXTS
  assert (rebuilt.bos_token, rebuilt.eos_token) == ('<s>', '</s>')
  facts['tokenizer.ggml.scores'] = [-1000.0] * len(numbers)  # of a model without a .model file
  file = write(tmp_path / 'no_scores.gguf', facts)
  check_refused(file, "of model 'llama' and pre None, .*: import with --tokenizer=FILE")
  words = {'tokenizer.ggml.pre': 'tekken'}
  check_refused(write(tmp_path / 'other.gguf', words), "model 'gpt2' and pre 'tekken'")
  meta = convert(str(tmp_path / 'other.gguf'), tmp_path / 'ours', tokenizer=ours.save(tmp_path))
  assert meta.tokenizer_hash == ours.hash


EXPERTS = np.zeros((2, 20, 24), 'f')
FACTOR = np.asarray([1, 7], 'f')


@pytest.mark.parametrize(
  'changes, more, named',
  [
    ({'general.architecture': 'phi3'}, {}, "'phi3': only llama and qwen2 can be imported"),
    ({'llama.context_length': None}, {}, 'llama.context_length=None is missing'),
    ({'llama.expert_count': 8}, {}, 'llama.expert_count=8 is a mixture: a seed must be dense'),
    ({'llama.attention.sliding_window': 9}, {}, 'llama.attention.sliding_window=9 is not'),
    ({'llama.rope.dimension_count': 2}, {}, 'dimension_count=2 differs from the 4 channels'),
    ({'llama.rope.scaling.type': 'longrope'}, {}, "rope_type='longrope' changes"),
    ({'llama.rope.scaling.type': 'yarn'}, {}, 'it.gguf: factor is missing'),
    ({'split.count': 3}, {}, 'is split: join its files'),
    (
      {},
      {'blk.0.ffn_gate_exps.weight': EXPERTS},
      'has model.layers.0.ffn_gate_exps.weight of shape',
    ),
    ({}, {'rope_freqs.weight': FACTOR}, 'rope_freqs.weight is not a scaling of Llama 3 with'),
    ({}, {'blk.1.ffn_up.weight': None}, 'lacks model.layers.1.mlp.up_proj.weight'),
    ({}, {'blk.1.more.weight': FACTOR}, 'has model.layers.1.more.weight of shape'),
    ({}, {'output.weight': np.zeros((270, 24))}, 'output.weight in F64: only F32, F16'),
  ],
  ids=lambda value: value if isinstance(value, str) else ','.join(value),
)
def test_what_cannot_be_imported(tmp_path, changes, more, named):
  check_refused(write(tmp_path / 'it.gguf', changes, more=more), named)


def test_a_file_that_is_cut_short(tmp_path):
  file = write(tmp_path / 'it.gguf')
  content = file.read_bytes()
  for size in (0, 3, 20, 500, 5000, len(content) // 2, len(content) - 1):
    file.write_bytes(content[:size])
    check_refused(file, 'it.gguf cannot be read .*: it is damaged')

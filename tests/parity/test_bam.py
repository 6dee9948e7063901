"""Exported models, loaded by transformers, compute what ours do, generate, and can be trained."""

import numpy as np
import pytest

from bam_jax import checkpoint
from bam_jax.hf import exporting, importing
from tests.hf import folders
from tests.parity.test_families import by_our_paths, check_same, distance, make_batch, ours, theirs

# torch's build is several GB on some platforms; `make test-parity` installs it.
torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

# Sizes that a tiny model feels; expert biases have no gradient.
FELT = dict(rope_theta=30.0, norm_epsilon=1e-2, logit_scale=0.4)
BIAS = 'blocks/ffn/expert_bias'
# Dense models of the paper's block have a class of transformers: test_families.
CASES = [name for name in folders.MODELS if name not in ('dense', 'no_qk_norm', 'untied', 'neox')]
some = pytest.mark.parametrize('exported', ['prefix', 'post', 'head_rms_shared'], indirect=True)


def load(folder, **options):
  return transformers.AutoModelForCausalLM.from_pretrained(
    folder, trust_remote_code=True, **options
  )


@pytest.fixture(scope='module', params=CASES)
def exported(request, tmp_path_factory):
  """A model of theirs, its folder, and the folder of ours, for every variant."""
  folder = tmp_path_factory.mktemp(request.param)
  model = folders.make_model(request.param, **FELT)
  folders.write_checkpoint(folder / 'ours', model, folders.draw(model))
  still = lambda done, total: None
  to = str(folder / 'hf')
  exporting.convert(folder / 'ours', to, dtype=None, max_shard_size='50KB', progress=still)
  return load(folder / 'hf').eval(), folder / 'hf', folder / 'ours'


def tokens(batch=None) -> 'torch.Tensor':
  return torch.tensor((batch or make_batch())['tokens'], dtype=torch.long)


def test_logits_and_gradients_are_ours(exported):
  model, _, folder = exported
  assert type(model).__name__ == 'BamForCausalLM'
  batch = make_batch(padding=5)  # of one row
  got, expected = ours(folder, batch), theirs(model, batch)
  real = batch['segments'] > 0
  got, expected = ((logits[real], value, gradients) for logits, value, gradients in (got, expected))
  buffers = {name: np.zeros(buffer.shape) for name, buffer in model.named_buffers()}
  expected[2].update({name: x for name, x in buffers.items() if 'correction_bias' in name})
  check_same(
    got, [expected], checkpoint.read_meta(folder).model, type(model).__name__, exclude=[BIAS]
  )


def generate(model, inputs, **options):
  return model.generate(
    inputs, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=1, **options
  )


def test_generation_is_the_argmax_of_our_logits_with_and_without_a_cache(exported):
  model, _, folder = exported
  got = generate(model, tokens()[:, :3], use_cache=True)
  assert torch.equal(got, generate(model, tokens()[:, :3], use_cache=False))
  got = got.numpy().astype(np.int32)
  logits_BTV, _, _ = ours(folder, make_batch() | {'tokens': got})
  np.testing.assert_array_equal(got[:, 3:], logits_BTV.argmax(-1)[:, 2:-1])


def test_padding_on_the_left_changes_nothing(exported):
  model, _, _ = exported
  inputs = tokens()
  padded = torch.cat([torch.full((2, 4), 9), inputs], dim=1)
  mask = torch.cat([torch.zeros(2, 4), torch.ones(2, 12)], dim=1).long()
  assert torch.equal(generate(model, padded, attention_mask=mask)[:, 4:], generate(model, inputs))


@some
def test_beams_reorder_the_cache(exported):
  model, _, _ = exported
  cached = generate(model, tokens(), num_beams=3, use_cache=True)
  assert cached.shape == (2, 21)
  assert torch.equal(cached, generate(model, tokens(), num_beams=3, use_cache=False))
  static = generate(model, tokens(), cache_implementation='static', disable_compile=True)
  assert torch.equal(static, generate(model, tokens()))


def test_in_pieces_with_a_cache_and_by_another_kernel(exported):
  model, folder, _ = exported
  inputs = tokens()
  with torch.no_grad():
    whole = model(inputs).logits
    first = model(inputs[:, :5], use_cache=True)
    # Its name before transformers 5.24, and since.
    name = 'cache' if 'cache' in first else 'past_key_values'
    second = model(inputs[:, 5:], logits_to_keep=3, **{name: first[name]})
    eager = load(folder, attn_implementation='eager')(inputs).logits
  assert distance(first.logits, whole[:, :5]) < 1e-5
  assert distance(second.logits, whole[:, -3:]) < 1e-5
  assert distance(eager, whole) < 1e-5


@some
def test_labels_give_the_loss(exported):
  model, _, _ = exported
  inputs = tokens()
  labels = inputs.clone()
  labels[0, :4] = -100
  output = model(inputs, labels=labels)
  picked = output.logits[:, :-1].log_softmax(-1).gather(-1, inputs[:, 1:, None])[..., 0]
  counted = labels[:, 1:] != -100
  assert distance(output.loss.detach(), -picked[counted].mean().detach()) < 1e-5


@some
def test_recomputing_activations_changes_no_gradient(exported):
  _, folder, _ = exported
  gradients = []
  for recompute in (False, True):
    model = load(folder).train()
    if recompute:
      model.gradient_checkpointing_enable()
    model(tokens(), labels=tokens(), use_cache=recompute).loss.backward()
    gradients.append({name: p.grad for name, p in model.named_parameters()})
  for name, gradient in gradients[0].items():
    assert torch.isfinite(gradient).all()
    assert torch.equal(gradient, gradients[1][name]), name


@some
def test_what_was_tuned_there_comes_back(exported, tmp_path):
  _, source, before = exported
  model = load(source)
  optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
  model(tokens(), labels=tokens()).loss.backward()
  optimizer.step()
  model.save_pretrained(tmp_path / 'hf')
  transformers.AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / 'hf')
  to = dict(dtype='float32', command='', progress=lambda done, total: None)
  meta = importing.convert(str(tmp_path / 'hf'), tmp_path / 'ours', **to)
  assert meta.model == checkpoint.read_meta(before).model
  back, stored = (folders.read_checkpoint(folder) for folder in (tmp_path / 'ours', before))
  tuned = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
  for path, array in by_our_paths(tuned, meta.model, 'BamForCausalLM').items():
    assert back[path].tobytes() == array.tobytes(), path
    assert path == BIAS or back[path].tobytes() != stored[path].tobytes(), path


@some
def test_the_tokenizer_is_ours(exported):
  model, folder, _ = exported
  tokenizer, mine = transformers.AutoTokenizer.from_pretrained(folder), folders.make_tokenizer()
  for text in ('the cat: def f(7)', '', ' wörds\n\n\tand  spaces ', 'a<|eosb|>'):
    assert tokenizer(text).input_ids == [mine.bos_id, *mine.encode(text)]
    assert tokenizer.decode(mine.encode(text)) == text
  assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (mine.bos_id, mine.eos_id)
  assert (model.config.bos_token_id, model.config.eos_token_id) == (mine.bos_id, mine.eos_id)
  assert model.generation_config.eos_token_id == mine.eos_id
  batch = tokenizer(['the cat', 'the cat sat on'], padding=True, return_tensors='pt')
  assert batch.attention_mask[0, 0] == 0 and batch.attention_mask[:, -1].all(), 'padded left'


@some
def test_half_precision(exported):
  model, folder, _ = exported
  half = load(folder, dtype=torch.bfloat16).eval()
  for name, parameter in half.named_parameters():
    wanted = torch.float32 if 'router' in name else torch.bfloat16
    assert parameter.dtype == wanted, name
  with torch.no_grad():
    logits = half(tokens()).logits
  assert logits.dtype == torch.bfloat16 and torch.isfinite(logits).all()


@some
def test_a_new_model_of_the_same_shape(exported):
  _, folder, _ = exported
  shape = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
  model = transformers.AutoModelForCausalLM.from_config(shape, trust_remote_code=True)
  output = model(tokens(), labels=tokens(), output_hidden_states=True)
  assert torch.isfinite(output.loss)
  assert len(output.hidden_states) == shape.num_hidden_layers + 1
  tied = model.lm_head.weight is model.model.embed_tokens.weight
  assert tied == shape.tie_word_embeddings

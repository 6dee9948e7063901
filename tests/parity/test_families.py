"""Imported from a class of transformers, a model has the same logits and the same gradients.

Random tiny models of every family are written as folders by transformers and imported by the
command, so that names, layouts, files and the keys of config.json are its own. Exported again they
have the same bytes.
"""

import copy
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util

from bam_jax import checkpoint, config
from bam_jax.hf import config_json, exporting, names
from bam_jax.model import transformer
from bam_jax.train import loss
from tests.hf import folders

# torch's build is several GB on some platforms; `make test-parity` installs it.
torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
load_file = pytest.importorskip('safetensors.numpy').load_file

ROOT = Path(__file__).parent.parent.parent
TOLERANCE = 1e-5  # of the largest magnitude in each array that is compared; both are float32
SIZES = dict(
  vocab_size=270,
  hidden_size=24,
  intermediate_size=20,
  num_hidden_layers=4,
  num_attention_heads=6,
  num_key_value_heads=2,
  max_position_embeddings=64,
  pad_token_id=None,  # torch gives the row of a padding token no gradient
  bos_token_id=0,
  eos_token_id=1,
)
# Epsilons, thetas, scales and windows that a tiny model feels.
THETA = dict(rope_parameters={'rope_type': 'default', 'rope_theta': 30.0})
LLAMA3 = {
  'rope_type': 'llama3', 'rope_theta': 30.0, 'factor': 4.0, 'low_freq_factor': 1.0,
  'high_freq_factor': 4.0, 'original_max_position_embeddings': 16,
}  # fmt: skip
YARN = {
  'rope_type': 'yarn', 'rope_theta': 30.0, 'factor': 4.0, 'original_max_position_embeddings': 16,
}  # fmt: skip
LINEAR = {'rope_type': 'linear', 'rope_theta': 30.0, 'factor': 3.0}
RMS = dict(rms_norm_eps=1e-2) | THETA
NEOX = dict(
  layer_norm_eps=1e-2,
  num_key_value_heads=None,
  rope_parameters=THETA['rope_parameters'] | {'partial_rotary_factor': 0.5},
)
COHERE = dict(logit_scale=0.4, layer_norm_eps=1e-2) | THETA
SLIDING = ['sliding_attention', 'full_attention'] * 2
WINDOWS = dict(sliding_window=5, layer_types=SLIDING)
CASES = {
  'gqa': ('Cohere', COHERE),
  'gqa_qk_norm': ('Cohere', COHERE | dict(use_qk_norm=True)),
  'mha_qk_norm': ('Cohere', COHERE | dict(num_key_value_heads=6, use_qk_norm=True)),
  'head_dim': ('Cohere', COHERE | dict(num_key_value_heads=3, head_dim=10, logit_scale=2.5)),
  'untied': ('Cohere', COHERE | dict(tie_word_embeddings=False)),
  'bfloat16': ('Cohere', COHERE | dict(use_qk_norm=True, dtype='bfloat16')),
  'sharded': ('Cohere', COHERE | dict(max_shard_size='9KB')),
  'cohere2': ('Cohere2', COHERE | WINDOWS),
  'llama': ('Llama', RMS | dict(head_dim=10, attention_bias=True, max_shard_size='9KB')),
  'llama_llama3': ('Llama', RMS | dict(rope_parameters=LLAMA3, tie_word_embeddings=True)),
  'llama_yarn': ('Llama', RMS | dict(rope_parameters=YARN)),
  'llama_linear': ('Llama', RMS | dict(rope_parameters=LINEAR)),
  'mistral': ('Mistral', RMS | dict(sliding_window=5)),
  'qwen2': (
    'Qwen2', RMS | dict(use_sliding_window=True, sliding_window=5, max_window_layers=2)
  ),
  'qwen3': ('Qwen3', RMS | dict(head_dim=8)),
  'smollm3': ('SmolLM3', RMS | dict(no_rope_layers=[1, 0, 1, 1])),
  'olmo2': ('Olmo2', RMS),
  'olmo3': (
    'Olmo3',
    RMS | WINDOWS | dict(rope_parameters={
      'full_attention': YARN | {'rope_theta': 30.0},
      'sliding_attention': {'rope_type': 'default', 'rope_theta': 30.0},
    }),
  ),
  'phi3': (
    'Phi3',
    RMS | dict(rope_parameters=THETA['rope_parameters'] | {'partial_rotary_factor': 0.5}),
  ),
  'llama_mlp_bias': ('Llama', RMS | dict(attention_bias=True, mlp_bias=True)),
  'neox': ('GPTNeoX', NEOX),
  'neox_sequential': ('GPTNeoX', NEOX | dict(use_parallel_residual=False)),
  'gemma2': ('Gemma2', RMS | WINDOWS | dict(
    head_dim=8, query_pre_attn_scalar=5, attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
  )),
  'gemma3': ('Gemma3', RMS | WINDOWS | dict(
    head_dim=8, query_pre_attn_scalar=5, rope_parameters={
      'full_attention': LINEAR, 'sliding_attention': {'rope_type': 'default', 'rope_theta': 7.0},
    },
  )),
  'granite': (
    'Granite',
    RMS | dict(
      embedding_multiplier=1.5, residual_multiplier=0.6, attention_multiplier=0.3,
      logits_scaling=2.0,
    ),
  ),
}  # fmt: skip


def distance(got, want) -> float:
  """The largest difference, relative to the largest magnitude of what is wanted."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert got.shape == want.shape
  return np.abs(got - want).max() / np.abs(want).max()


def randomize(model) -> None:
  """Makes every parameter of a model of transformers matter: no zeros, no ones."""
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      if 'norm' in name:
        parameter.copy_(('Gemma' not in type(model).__name__) + 0.3 * noise)  # Gemma adds 1
      elif 'embed' in name:
        parameter.copy_(noise)
      else:
        parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)


def make_folder(case: str, folder: Path):
  """A random model of theirs in float32, saved in a folder with a tokenizer."""
  kind, options = CASES[case][0], SIZES | CASES[case][1]
  dtype, size = options.pop('dtype', 'float32'), options.pop('max_shard_size', '5GB')
  configs = {'Gemma3': 'Gemma3TextConfig'}
  made = getattr(transformers, configs.get(kind, f'{kind}Config'))
  model_config = made(**options, attn_implementation='eager')
  model = getattr(transformers, f'{kind}ForCausalLM')(model_config).eval()
  randomize(model)
  model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=size)
  folders.make_tokenizer().save(folder)
  # Read again, since `to` has rounded more than parameters.
  return type(model).from_pretrained(folder, dtype='float32', attn_implementation='eager').eval()


def run(*arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, '-m', 'bam_jax.convert', *arguments], cwd=ROOT, capture_output=True,
    text=True, timeout=300, env=os.environ | {'JAX_PLATFORMS': 'cpu'},
  )  # fmt: skip


@pytest.fixture(scope='module', params=CASES)
def imported(request, tmp_path_factory):
  """A model of theirs, its folder, and the folder of ours."""
  folder = tmp_path_factory.mktemp(request.param)
  model = make_folder(request.param, folder / 'hf')
  done = run('import-hf', f'--input={folder}/hf', f'--output={folder}/ours')
  assert done.returncode == 0, done.stderr
  return model, folder / 'hf', folder / 'ours'


def make_batch(padding: int = 0) -> dict[str, np.ndarray]:
  """Two rows of 12 tokens, the first so many of the first row padding."""
  rng = np.random.default_rng(0)
  shape = 2, 12
  real = np.ones(shape, np.int32)
  real[0, :padding] = 0
  return {
    'tokens': rng.integers(2, 260, shape).astype(np.int32),
    'targets': rng.integers(0, 260, shape).astype(np.int32),
    'segments': real,
    'positions': np.maximum(np.cumsum(real, 1) - 1, 0).astype(np.int32),
    'weights': real.astype(np.float32),
  }


def theirs(model, batch) -> tuple[np.ndarray, float, dict[str, np.ndarray]]:
  """Logits, the mean NLL, and its gradient by their names."""
  logits_BTV = model(
    torch.tensor(batch['tokens'], dtype=torch.long),
    attention_mask=torch.tensor(batch['segments'], dtype=torch.long),
  ).logits
  targets_BT = torch.tensor(batch['targets'], dtype=torch.long)
  targets_BT[batch['weights'] == 0] = -100
  value = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())
  model.zero_grad()
  value.backward()
  gradients = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
  if 'GPTNeoX' in type(model).__name__:  # whose head has another name on disk
    gradients['embed_out.weight'] = gradients.pop('lm_head.weight')
  return logits_BTV.detach().numpy(), value.item(), gradients


def ours(folder: Path, batch) -> tuple[np.ndarray, float, dict[str, np.ndarray]]:
  """Logits, the mean NLL, and its gradient by our paths, of a checkpoint."""
  run, params = compiled(folder)
  logits_BTV, value, gradients = jax.device_get(run(params, batch))
  return logits_BTV, value, folders.flat(gradients)


@functools.cache
def compiled(folder: Path):
  """A checkpoint as (params, batch) -> (logits, mean NLL, its gradient), and its params."""
  network = transformer.Network(checkpoint.read_meta(folder).model, config.Compute())
  nll = config.Loss(load_balance=0, router_z=0)
  objective = functools.partial(loss.objective, network, nll)

  @jax.jit
  def run(params, batch):
    hidden_BTD, _ = network.hidden(params, batch['tokens'], batch['segments'], batch['positions'])
    (value, _), gradients = jax.value_and_grad(objective, has_aux=True)(params, batch)
    return network.logits(params, hidden_BTD), value, gradients

  reader = checkpoint.open_params(folder, network.model)
  params = {path: reader.read(path).astype(np.float32) for path in reader.specs}
  return run, traverse_util.unflatten_dict(params, sep='/')


def by_our_paths(tensors: dict, model: config.Model, architecture: str) -> dict[str, np.ndarray]:
  """Tensors of theirs as arrays of ours."""
  table, _ = config_json.tensors(model, {'architectures': [architecture]})
  made = {path: np.zeros(tensor.shape, np.float32) for path, tensor in table.items()}
  for name, parts in names.pieces(table).items():
    for path, index, rows in parts:
      places = tensors[name].reshape(-1, *table[path].theirs[1:])  # experts may be an axis
      made[path][index] = names.to_ours(table[path], places[rows], np.float32)
  return made


def check_same(got, wants, model: config.Model, architecture: str, exclude=()) -> None:
  """Logits, loss and every gradient agree with one of the values wanted."""
  far = {}
  for want in wants:
    wanted = by_our_paths(want[2], model, architecture)
    assert got[2].keys() == wanted.keys()
    pairs = {'logits': (got[0], want[0]), 'loss': (got[1], want[1])}
    for path in wanted.keys() - set(exclude):
      matters = np.abs(wanted[path]).max() > 1e-4 or path.endswith('key_bias')
      assert matters, f'{path} does not matter'
      pairs[path] = got[2][path], wanted[path]
    for name, pair in pairs.items():
      far[name] = min(far.get(name, np.inf), distance(*pair))
  print(max(far.items(), key=lambda item: item[1]))  # pytest -s shows how near
  assert {name: value for name, value in far.items() if not value < TOLERANCE} == {}


def test_the_imported_model_is_theirs(imported):
  model, _, folder = imported
  batch = make_batch()
  # In float64 too, as far as their code goes: how far their float32 is from it depends on the
  # processor, and may be more than ours is.
  wants = [theirs(one, batch) for one in (model, copy.deepcopy(model).double())]
  ours_model = checkpoint.read_meta(folder).model
  check_same(ours(folder, batch), wants, ours_model, type(model).__name__)


def test_the_text_model_of_one_that_sees_images(tmp_path):
  words = SIZES | RMS | WINDOWS | dict(head_dim=8, query_pre_attn_scalar=5)
  tower = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
  model_config = transformers.Gemma3Config(
    text_config=words | dict(rope_parameters=None),
    vision_config=tower | dict(image_size=28, patch_size=14),
    mm_tokens_per_image=4,
    boi_token_index=266,
    eoi_token_index=267,
    image_token_index=268,
  )
  model = transformers.Gemma3ForConditionalGeneration(model_config).eval()
  randomize(model)
  model.save_pretrained(tmp_path / 'hf')
  folders.make_tokenizer().save(tmp_path / 'hf')
  done = run('import-hf', f'--input={tmp_path}/hf', f'--output={tmp_path}/ours')
  assert done.returncode == 0, done.stderr
  want = model(torch.tensor(make_batch()['tokens'], dtype=torch.long)).logits
  assert distance(ours(tmp_path / 'ours', make_batch())[0], want.detach()) < TOLERANCE


def test_the_exported_model_is_theirs_to_the_bit(imported, tmp_path):
  model, source, folder = imported
  still = lambda done, total: None
  to, architecture = str(tmp_path / 'hf'), type(model).__name__
  how = dict(dtype=None, max_shard_size='1GB', progress=still, architecture=architecture)
  exporting.convert(folder, to, **how)
  exported = load_file(tmp_path / 'hf' / 'model.safetensors')
  stored = {}
  for file in source.glob('*.safetensors'):
    stored |= load_file(file)
  assert exported.keys() == stored.keys()
  for name, array in stored.items():
    assert exported[name].tobytes() == array.astype(np.float32).tobytes(), name
  again = transformers.AutoModelForCausalLM.from_pretrained(to, attn_implementation='eager')
  tokens = torch.tensor(make_batch()['tokens'], dtype=torch.long)
  assert type(again) is type(model)
  assert torch.equal(again(tokens).logits, model(tokens).logits)

"""Tiny checkpoints of ours, and tiny folders as transformers writes them."""

import functools
import json
from pathlib import Path

import numpy as np
from flax import traverse_util
from safetensors.numpy import save_file

from bam_jax import checkpoint, config
from bam_jax.checkpoint import arrays, manifest
from bam_jax.data.tokenizer import Tokenizer
from bam_jax.files.folders import new_folder
from bam_jax.model import transformer
from bam_jax.prepare import training

# No two sizes that matter are equal, so that no transposition goes unseen.
CONFIG = {
  'architectures': ['CohereForCausalLM'],
  'attention_bias': False,
  'attention_dropout': 0.0,
  'bos_token_id': 5,
  'eos_token_id': 255001,
  'hidden_act': 'silu',
  'hidden_size': 24,
  'initializer_range': 0.02,
  'intermediate_size': 20,
  'layer_norm_eps': 1e-05,
  'logit_scale': 0.0625,
  'max_position_embeddings': 8192,
  'model_max_length': 131072,
  'model_type': 'cohere',
  'num_attention_heads': 6,
  'num_hidden_layers': 3,
  'num_key_value_heads': 2,
  'pad_token_id': 0,
  'pretraining_tp': 1,
  'rope_scaling': None,
  'rope_theta': 8000000.0,
  'tie_word_embeddings': True,
  'torch_dtype': 'float16',
  'transformers_version': '4.38.2',
  'use_cache': True,
  'use_qk_norm': True,
  'vocab_size': 270,
}
MODEL = config.Model(
  vocab_size=270, d_model=24, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=4, ffn_dim=20,
  rope_theta=8e6, norm_epsilon=1e-5, qk_norm='head_layernorm', logit_scale=0.0625,
)  # fmt: skip
_KV = config.AttentionExperts(3)
_MIXTURE = {'attention_experts': _KV, 'ffn_experts': config.FFNExperts(3, top_k=2)}
_SHARED = _MIXTURE | {'attention_experts': config.AttentionExperts(3, shared_kv=True)}
_RMS = {'block': 'sequential', 'norm': 'rmsnorm', 'rotary_layout': 'half'}
_WINDOWS = {'layer_types': ('sliding', 'full', 'sliding'), 'window': 5}
# Bounds between which some of a tiny head's pairs are, for a base of 30.
YARN = config.RopeScaling('yarn', 4.0, 64, beta_fast=4.0)
LLAMA3 = config.RopeScaling('llama3', 4.0, 64)
LINEAR = config.RopeScaling('linear', 3.0)
MODELS = {
  'dense': {},
  'no_qk_norm': {'qk_norm': 'none', 'num_kv_heads': 6},
  'untied': {'tied_embeddings': False},
  'btx': {'ffn_experts': config.FFNExperts(4, top_k=2)},
  'kv_experts': {'attention_experts': _KV, 'ffn_experts': config.FFNExperts(3)},
  'kv_experts_plain': {
    'attention_experts': _KV, 'ffn_experts': config.FFNExperts(3), 'qk_norm': 'none'
  },
  'shared_kv': {
    'attention_experts': config.AttentionExperts(3, shared_kv=True),
    'ffn_experts': config.FFNExperts(4, capacity_factor=4.0),
    'tied_embeddings': False,
  },
  'routed': {
    'attention_experts': config.AttentionExperts(3, top_k=2, renormalize=True),
    'ffn_experts': config.FFNExperts(4, top_k=3, renormalize=True, expert_bias=True),
  },
  'prefix': _MIXTURE | {
    'attention_experts': config.AttentionExperts(3, top_k=1), 'router_input': 'prefix',
  },
  'prefix_sliding': _SHARED | _RMS | {
    'layer_types': ('sliding',) * 3, 'window': 5, 'router_input': 'prefix', 'router_memory': 3,
    'ffn_experts': config.FFNExperts(4),
  },
  # Blocks of other families: every field, and fields that meet in one array or one layer.
  'sequential': _MIXTURE | _RMS | {'biases': 'attention', 'head_dim': 6, 'qk_norm': 'none'},
  'post': _MIXTURE | _RMS | {
    'norm_place': 'post', 'qk_norm': 'all_rms', 'rope_scaling': YARN, 'window_rope_theta': 20.0,
    **_WINDOWS,
  },
  'post_shared': _SHARED | {
    'block': 'sequential', 'norm_place': 'post', 'qk_norm': 'all_rms', 'biases': 'qkv',
  },
  'head_rms_shared': _SHARED | _RMS | _WINDOWS | {
    'qk_norm': 'head_rms', 'biases': 'attention', 'head_dim': 6, 'rotary_dim': 4,
    'nope_layers': (1,),
  },
  'scaled': _MIXTURE | _RMS | {
    'attention_experts': config.AttentionExperts(2, top_k=1), 'attention_scale': 0.3,
    'embedding_scale': 1.5, 'residual_scale': 0.6, 'qk_norm': 'head_rms', 'rope_scaling': LLAMA3,
  },
  'parallel_half': _MIXTURE | _WINDOWS | {
    'norm': 'rmsnorm', 'rotary_layout': 'half', 'rope_scaling': LINEAR, 'biases': 'qkv',
  },
  'sequential_btx': {
    'block': 'sequential', 'biases': 'attention', 'qk_norm': 'all_rms', 'rotary_dim': 2,
    'ffn_experts': config.FFNExperts(3, top_k=2),
  },
  'two_norms': _MIXTURE | {
    'block': 'parallel_two_norms', 'norm': 'layernorm_bias', 'biases': 'all', 'ffn': 'gelu',
    'qk_norm': 'none', 'logit_cap': 9.0,
  },
  'caps': _SHARED | _RMS | _WINDOWS | {
    'norm': 'rmsnorm_plus_one', 'norm_place': 'both', 'qk_norm': 'head_rms', 'ffn': 'geglu_tanh',
    'biases': 'all', 'attention_cap': 2.0, 'logit_cap': 9.0,
  },
  'neox': _RMS | {
    'block': 'parallel_two_norms', 'norm': 'layernorm_bias', 'biases': 'all', 'ffn': 'gelu',
    'qk_norm': 'none', 'num_kv_heads': 6, 'logit_scale': 1.0, 'rotary_dim': 2,
  },
  'ropes': _MIXTURE | {
    'attention_experts': config.AttentionExperts(
      3, ropes=(config.Rope(30.0), config.Rope(5.0), config.Rope(30.0, YARN))
    ),
  },
  'no_family': _RMS | {'norm': 'layernorm', 'norm_place': 'post', 'nope_layers': (0, 2)},
}  # fmt: skip

# Blocks of families, for `make_model`; a tiny model feels the sizes.
COHERE = dict(rope_theta=30.0, norm_epsilon=1e-2, qk_norm='none')
LLAMA = COHERE | _RMS | dict(logit_scale=1.0)
OLMO2 = LLAMA | dict(norm_place='post', qk_norm='all_rms')


def make_model(name: str = 'dense', **changes) -> config.Model:
  """One of MODELS, changed."""
  return config.Model(**vars(MODEL) | MODELS[name] | changes)


@functools.cache
def make_tokenizer() -> Tokenizer:
  """A byte-level tokenizer of at most 266 tokens."""
  return training.train(['the cat sat on the mat', 'def f(x): return the cat'], 266)


def draw(model: config.Model, seed: int = 0) -> dict[str, np.ndarray]:
  """Random arrays of a model by path, of magnitudes that a model with them feels."""
  rng = np.random.default_rng(seed)
  abstract = transformer.Network(model, config.Compute()).abstract()
  drawn = {}
  for path, leaf in traverse_util.flatten_dict(abstract, sep='/').items():
    noise = rng.normal(size=leaf.shape)
    if path.endswith('scale'):
      noise = (model.norm != 'rmsnorm_plus_one') + 0.3 * noise  # which adds 1
    elif path.endswith('expert_bias'):
      noise *= 0.2
    elif path != 'embed/table':
      noise *= 1.5 / model.d_model**0.5
    drawn[path] = noise.astype(np.float32)
  return drawn


def write_checkpoint(folder: Path, model: config.Model, values: dict, **meta) -> Path:
  """A checkpoint of ours with its tokenizer, as `convert` writes them."""
  tokenizer = make_tokenizer()
  with new_folder(folder) as beside:
    specs = {path: arrays.Spec(array.shape, array.dtype) for path, array in values.items()}
    with arrays.Writer(beside / 'params', specs) as writer:
      for path, spec in specs.items():
        for index in arrays.pieces(path, spec):
          writer.write(path, index, values[path][index])
    tokenizer.save(beside)
    facts = dict(
      format=checkpoint.FORMAT, model=model, sequence_length=64, tokenizer_hash=tokenizer.hash,
      tokenizer_path=str(folder), run='tiny', step=7, method=None, sources=(),
      versions=manifest.versions(), bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token,
    )  # fmt: skip
    checkpoint.write_meta(beside, checkpoint.Meta(**facts | meta))
  return folder


def read_checkpoint(folder: Path) -> dict[str, np.ndarray]:
  """All of a checkpoint's arrays by path."""
  reader = arrays.Reader(folder / 'params')
  return {path: reader.read(path) for path in reader.specs}


def cohere_tensors(facts: dict = CONFIG, seed: int = 0) -> dict[str, np.ndarray]:
  """Random tensors under the names and in the shapes of transformers' Cohere."""
  D, F, V = facts['hidden_size'], facts['intermediate_size'], facts['vocab_size']
  H, G = facts['num_attention_heads'], facts['num_key_value_heads']
  K = facts.get('head_dim') or D // H
  shapes = {'model.embed_tokens.weight': (V, D), 'model.norm.weight': (D,)}
  for layer in range(facts['num_hidden_layers']):
    prefix = f'model.layers.{layer}.'
    shapes |= {
      prefix + 'input_layernorm.weight': (D,),
      prefix + 'self_attn.q_proj.weight': (H * K, D),
      prefix + 'self_attn.k_proj.weight': (G * K, D),
      prefix + 'self_attn.v_proj.weight': (G * K, D),
      prefix + 'self_attn.o_proj.weight': (D, H * K),
      prefix + 'mlp.gate_proj.weight': (F, D),
      prefix + 'mlp.up_proj.weight': (F, D),
      prefix + 'mlp.down_proj.weight': (D, F),
    }
    if facts.get('use_qk_norm'):
      shapes[prefix + 'self_attn.q_norm.weight'] = H, K
      shapes[prefix + 'self_attn.k_norm.weight'] = G, K
  if not facts.get('tie_word_embeddings', True):
    shapes['lm_head.weight'] = V, D
  rng = np.random.default_rng(seed)
  return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write_hf(folder: Path, facts: dict, *shards: dict[str, np.ndarray]) -> Path:
  """A folder as transformers writes it: one file, or several and an index."""
  folder.mkdir()
  make_tokenizer().save(folder)
  write_json(folder / 'config.json', facts)
  if len(shards) == 1:
    save_file(shards[0], folder / 'model.safetensors', metadata={'format': 'pt'})
    return folder
  index = {}
  for number, shard in enumerate(shards, 1):
    file = f'model-{number:05}-of-{len(shards):05}.safetensors'
    save_file(shard, folder / file, metadata={'format': 'pt'})
    index |= dict.fromkeys(shard, file)
  write_json(folder / 'model.safetensors.index.json', {'metadata': {}, 'weight_map': index})
  return folder


def write_json(path: Path, facts) -> None:
  """Writes JSON."""
  path.write_text(json.dumps(facts), encoding='utf-8')


def read_json(path: Path):
  """Reads JSON."""
  return json.loads(path.read_text(encoding='utf-8'))


def flat(params: dict) -> dict[str, np.ndarray]:
  """Nested parameters by path."""
  return traverse_util.flatten_dict(params, sep='/')

"""Models beside those of conftest: what else a mesh or a cache could get wrong."""

import dataclasses
from collections.abc import Callable, Container, Iterable

import pytest

from bam_jax import config

# Name -> the model of conftest that it is like, and in what it differs. Six experts are three on
# each of two devices.
MODELS: dict[str, tuple[str, dict]] = {
  'six_experts': (
    'bam_kv_experts',
    dict(
      attention_experts=config.AttentionExperts(6),
      ffn_experts=config.FFNExperts(6, top_k=2, renormalize=True),
    ),
  ),
  'six_routed': (
    'routed_attention',
    dict(
      attention_experts=config.AttentionExperts(6, top_k=2, renormalize=True),
      ffn_experts=config.FFNExperts(6, top_k=3),
    ),
  ),
  'norms_of_heads': ('bam_kv_experts', dict(qk_norm='head_layernorm')),
  'norms_of_shared_heads': ('bam_shared_kv', dict(qk_norm='head_layernorm')),
  'sequential': (
    'bam_kv_experts',
    dict(
      block='sequential',
      norm='rmsnorm',
      rotary_layout='half',
      qk_norm='all_rms',
      biases='attention',
      norm_place='post',
      layer_types=('sliding', 'full'),
      window=5,
      rope_scaling=config.RopeScaling('yarn', 4.0, 32),
      residual_scale=0.7,
    ),
  ),
  'ropes_of_experts': (
    'bam_kv_experts',
    dict(
      attention_experts=config.AttentionExperts(
        4, ropes=tuple(config.Rope(theta) for theta in (1e4, 3.0, 10.0, 50.0))
      )
    ),
  ),
  'sequential_shared_kv': (
    'bam_shared_kv',
    dict(block='sequential', norm='rmsnorm', qk_norm='head_rms', biases='qkv', rotary_dim=4),
  ),
  'two_norms': (
    'bam_kv_experts',
    dict(
      block='parallel_two_norms',
      norm='layernorm_bias',
      rotary_layout='half',
      rotary_dim=4,
      biases='all',
      ffn='gelu',
    ),
  ),
  'two_norms_btx': (
    'btx',
    dict(
      block='parallel_two_norms',
      biases='all',
      ffn_experts=config.FFNExperts(4, capacity_factor=4.0),
    ),
  ),
  'caps': (
    'bam_shared_kv',
    dict(
      block='sequential',
      norm='rmsnorm_plus_one',
      norm_place='both',
      qk_norm='head_rms',
      ffn='geglu_tanh',
      layer_types=('sliding', 'full'),
      window=5,
      attention_cap=0.5,
      logit_cap=0.7,
    ),
  ),
  'dense_biases': ('dense', dict(biases='all', logit_cap=0.7)),
  'sequential_btx': ('btx', dict(block='sequential', nope_layers=(0,), embedding_scale=3.0)),
  'biased': ('btx', dict(ffn_experts=config.FFNExperts(4, expert_bias=True))),
  'prefix': (
    'bam_shared_kv',
    dict(
      router_input='prefix',
      router_memory=3,
      attention_experts=config.AttentionExperts(4, top_k=2, shared_kv=True),
      ffn_experts=config.FFNExperts(4, top_k=2),
    ),
  ),
  'embedding_experts': (
    'bam_shared_kv',
    dict(
      router_input='prefix',
      embedding_rank=2,
      embedding_scale=2.0,
      ffn_experts=config.FFNExperts(4, top_k=2, renormalize=True),
    ),
  ),
  'embedding_experts_untied': (
    'btx',
    dict(
      block='sequential',
      norm='layernorm_bias',
      tied_embeddings=False,
      embedding_rank=4,
      logit_scale=0.5,
    ),
  ),
  'attention_experts_alone': ('bam_kv_experts', dict(ffn_experts=None, logit_scale=0.5)),
  'room_for_all': ('bam_kv_experts', dict(ffn_experts=config.FFNExperts(4, capacity_factor=4.0))),
  'with_a_capacity': (
    'bam_kv_experts',
    dict(ffn_experts=config.FFNExperts(4, capacity_factor=1.0)),
  ),
}
LIKE_CONFTEST = 'dense', 'untied', 'btx', 'bam_kv_experts', 'bam_shared_kv', 'routed_attention'
ALL_BUT_DATA = (1, 2, 2, 2)
Shape = tuple[int, int, int, int]  # of a mesh


def cases(
  names: Iterable[str],
  shapes: Iterable[Shape],
  quick: Container[tuple[str, Shape]],
  fits: Callable[[str, Shape], bool],
) -> list:
  """Models on meshes that they fit; slow but for the quick.

  Every model of conftest on every mesh, those of `names` on one that cuts nearly all.
  """
  return [
    pytest.param(
      name,
      shape,
      marks=() if (name, shape) in quick else pytest.mark.slow,
      id=f'{name}-{"x".join(map(str, shape))}',
    )
    for name in (*LIKE_CONFTEST, *names)
    for shape in shapes
    if fits(name, shape)
    and (shape == ALL_BUT_DATA or name in LIKE_CONFTEST or (name, shape) in quick)
  ]


def named(models: dict[str, config.Model], name: str) -> config.Model:
  """A model of conftest, or of MODELS."""
  if name in models:
    return models[name]
  base, changes = MODELS[name]
  return dataclasses.replace(models[base], **changes)

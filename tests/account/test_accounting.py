"""Counts of any model: formulas against arrays, FLOPs against the program, caches and budgets."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bam_jax import config
from bam_jax.model import arithmetic, transformer
from bam_jax.parallel import sharding

sizes = st.integers(1, 7)


def experts(kind, least, **more):
  """A config of up to five experts, at least `least` for a token (0 is soft), or None."""
  of = lambda number: st.builds(kind, st.just(number), st.integers(least, number), **more)
  return st.none() | st.integers(1, 5).flatmap(of)


@st.composite
def models(draw):
  """Any model at all: blocks, biases, grouped queries, tied or not, dense, soft, routed, shared."""
  kv_heads = draw(st.integers(1, 3))
  blocks = [('parallel', 'pre'), ('parallel_two_norms', 'pre')]
  blocks += [('sequential', place) for place in ('pre', 'post', 'both')]
  block, norm_place = draw(st.sampled_from(blocks))
  ffn, rank = draw(experts(config.FFNExperts, 1)), draw(st.integers(0, 2))
  return config.Model(
    vocab_size=draw(st.integers(2, 50)),
    d_model=draw(sizes) + 8 * rank,
    embedding_rank=rank if ffn else 0,
    num_layers=draw(st.integers(1, 4)),
    num_heads=kv_heads * draw(st.integers(1, 3)),
    num_kv_heads=kv_heads,
    head_dim=2 * draw(st.integers(1, 4)),
    ffn_dim=draw(sizes),
    tied_embeddings=draw(st.booleans()),
    block=block,
    norm_place=norm_place,
    norm=draw(st.sampled_from(['layernorm', 'layernorm_bias', 'rmsnorm_plus_one'])),
    biases=draw(st.sampled_from(['none', 'qkv', 'attention', 'all'])),
    ffn=draw(st.sampled_from(['swiglu', 'gelu'])),
    qk_norm=draw(st.sampled_from(['none', 'head_layernorm', 'head_rms', 'all_rms'])),
    attention_experts=draw(experts(config.AttentionExperts, 0, shared_kv=st.booleans())),
    ffn_experts=ffn,
  )


def counted(model: config.Model) -> tuple[arithmetic.Parts, arithmetic.Parts]:
  """Parameters, and those that one token meets, by part: counted from the shapes of the arrays."""
  attention, ffn = model.attention_experts, model.ffn_experts
  total = dict.fromkeys(('embeddings', 'norms', 'attention', 'ffn', 'routers'), 0)
  active = dict(total)
  abstract = transformer.Network(model, config.Compute()).abstract()
  for key_path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
    *folders, name = sharding.path_of(key_path).split('/')
    part = {'embed': 'embeddings', 'unembed': 'embeddings'}.get(folders[-1], folders[-1])
    part = 'routers' if name in ('router', 'expert_bias') else part
    part = 'norms' if name.endswith('scale') or name == 'bias' else part
    met = 1.0
    if part == 'ffn' and ffn:
      met = ffn.top_k / ffn.num_experts
    elif name.startswith(('query', 'out')) and attention and attention.top_k:
      met = attention.top_k / attention.num_experts
    total[part] += leaf.size
    active[part] += round(leaf.size * met)
  return arithmetic.Parts(**total), arithmetic.Parts(**active)


@settings(max_examples=80, deadline=None)
@given(models())
def test_formulas_and_arrays_count_the_same(model):
  total, active = arithmetic.total_parts(model), arithmetic.active_parts(model)
  assert counted(model) == (total, active)
  assert arithmetic.parameters(model) == arithmetic.Parameters(total.total, active.total)
  for all_of_it, met in zip(dataclasses.astuple(total), dataclasses.astuple(active)):
    assert met <= all_of_it


def matmul_flops(jaxpr) -> int:
  """FLOPs of the matrix products of a program, 2 for a multiply and add."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      (contracted, _), _ = equation.params['dimension_numbers']
      left, right = (v.aval for v in equation.invars)
      shared = math.prod(left.shape[i] for i in contracted)
      total += 2 * shared * math.prod(equation.outvars[0].aval.shape)
    times = equation.params['length'] if equation.primitive.name == 'scan' else 1
    for inner in jax.tree.leaves(tuple(equation.params.values())):
      inner = getattr(inner, 'jaxpr', inner)
      total += times * matmul_flops(inner) if hasattr(inner, 'eqns') else 0
  return total


# Not routed attention: there the program computes every expert, and the formula counts the top-k.
@pytest.mark.parametrize(
  'name',
  ['dense', 'untied', 'gelu', 'btx', 'bam_kv_experts', 'bam_shared_kv', 'embedding_experts'],
)
def test_forward_flops_are_those_of_the_program(models, name):
  """Of what is traced, less what the formula names as no part of the model."""
  model = models[{'gelu': 'dense', 'embedding_experts': 'btx'}.get(name, name)]
  if name == 'gelu':
    model = dataclasses.replace(model, ffn='gelu', biases='all')
  if name == 'embedding_experts':
    model = dataclasses.replace(model, embedding_rank=4)
  if model.ffn_experts:  # full buffers and no empty rows
    options = dataclasses.replace(model.ffn_experts, capacity_factor=1.0)
    model = dataclasses.replace(model, ffn_experts=options)
  network = transformer.Network(model, config.Compute())
  B, T = 4, 16

  def forward(params, tokens, segments, positions):
    hidden, routing = network.hidden(params, tokens, segments, positions)
    return network.logits(params, hidden), routing

  integers = jax.ShapeDtypeStruct((B, T), jnp.int32)
  traced = jax.make_jaxpr(forward)(network.abstract(), integers, integers, integers)
  columns = [e.num_experts for e in (model.attention_experts, model.ffn_experts) if e]
  statistics = 2 * sum(columns)  # sums of gates
  combining = 2 * model.ffn_experts.top_k * model.d_model if model.ffn_experts else 0
  beside = model.num_layers * (statistics + combining)
  # The program's scores are a full square, the model's a triangle.
  expected = arithmetic.forward_flops(model, 2 * T) + beside
  assert matmul_flops(traced.jaxpr) == B * T * expected

"""Parameters and FLOPs of the paper's own models, to the last one. Tables 7, 9 and 10."""

import dataclasses

import pytest

from bam_jax import config
from bam_jax.model import arithmetic

SMALL = config.Model(
  vocab_size=256_000, d_model=1024, num_layers=6, num_heads=8, num_kv_heads=8, head_dim=128,
  ffn_dim=2048, tied_embeddings=False,
)  # fmt: skip
LARGE = config.Model(
  vocab_size=256_000, d_model=2304, num_layers=18, num_heads=18, num_kv_heads=6, head_dim=128,
  ffn_dim=9216,
)  # fmt: skip


def mixture(attention: dict | None, **ffn) -> config.Model:
  experts = None if attention is None else config.AttentionExperts(**attention)
  return dataclasses.replace(SMALL, attention_experts=experts, ffn_experts=config.FFNExperts(**ffn))


BAM_KV = mixture(dict(num_experts=4), num_experts=4)
BAM_SHARED = mixture(dict(num_experts=4, shared_kv=True), num_experts=4)
BTX_4 = mixture(None, num_experts=4)
BTX_6 = mixture(None, num_experts=6, top_k=3)

# Where the paper's table contradicts its own arithmetic, the arithmetic.
COUNTS = {
  'dense small': (SMALL, 587_209_728, 587_209_728),
  'dense large': (LARGE, 1_991_289_600, 1_991_289_600),
  'BAM, KV experts': (BAM_KV, 776_002_560, 662_756_352),
  'BAM, shared KV': (BAM_SHARED, 738_253_824, 625_007_616),
  'BTX, 4 experts, top-1': (BTX_4, 700_480_512, 587_234_304),
  'BTX, 6 experts, top-3': (BTX_6, 775_990_272, 662_744_064),
}


@pytest.mark.parametrize('model, total, active', COUNTS.values(), ids=COUNTS)
def test_parameters(model, total, active):
  assert arithmetic.parameters(model) == arithmetic.Parameters(total, active)


def test_a_routed_attention_expert_that_is_not_visited_is_not_active():
  routed = mixture(dict(num_experts=4, top_k=1), num_experts=4)
  unvisited = 3 * 2 * SMALL.num_layers * SMALL.d_model**2  # query and output of three experts
  # Keys and values are met by every token, as what is attended to.
  assert arithmetic.parameters(routed) == arithmetic.Parameters(
    776_002_560, 662_756_352 - unvisited
  )


HEAD = 2 * SMALL.d_model * SMALL.vocab_size
DENSE_ATTENTION, BAM_ATTENTION = 8_912_896, 35_651_584  # table 7, context 256
FFN = 12_582_912  # 3 d d_ff of the fused width, "about 12.6M"
ROUTER = 2 * SMALL.d_model * 4

FLOPS = {
  'dense': (SMALL, DENSE_ATTENTION + FFN),
  'BTX': (BTX_4, DENSE_ATTENTION + FFN + ROUTER),
  'BTX, top-3': (BTX_6, DENSE_ATTENTION + 3 * FFN + ROUTER * 6 / 4),
  'BAM': (BAM_KV, BAM_ATTENTION + FFN + 2 * ROUTER),
  # Three of the four keys' and values' projections are saved.
  'BAM, shared KV': (BAM_SHARED, BAM_ATTENTION - 3 * 4 * 1024**2 + FFN + 2 * ROUTER),
}


@pytest.mark.parametrize('model, of_a_layer', FLOPS.values(), ids=FLOPS)
def test_forward_flops(model, of_a_layer):
  assert arithmetic.forward_flops(model, 256) == 6 * of_a_layer + HEAD
  assert arithmetic.training_flops(model, 256) == 3 * arithmetic.forward_flops(model, 256)


def test_flops_of_grouped_queries_and_context():
  # 18 heads on 6 keys and values: their projections are a third of the queries'.
  query = 2 * 2304 * 18 * 128
  layer = 2 * query + 2 * query / 3 + 6 * 2304 * 9216
  head = 2 * 2304 * 256_000
  for context in (0, 2048):
    seen = 2 * context * 18 * 128
    assert arithmetic.forward_flops(LARGE, context) == 18 * (layer + seen) + head


def test_flops_of_routed_attention():
  routed = lambda k: arithmetic.forward_flops(
    mixture(dict(num_experts=4, top_k=k), num_experts=4), 256
  )
  each = 6 * (4 * 1024**2 + 2 * 256 * 1024)  # queries, output, scores and sum
  assert routed(2) - routed(1) == routed(4) - routed(3) == each
  assert routed(4) == arithmetic.forward_flops(BAM_KV, 256)

"""Mixtures of FFN experts alone become transformers' own classes, which compute what ours do."""

import dataclasses

import numpy as np
import pytest

from bam_jax import config
from bam_jax.errors import UserError
from bam_jax.hf import exporting
from tests.hf import folders
from tests.parity.test_families import TOLERANCE, distance, make_batch, ours

# torch's build is several GB on some platforms; `make test-parity` installs it.
torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

PAPER, RENORMALISED, ALL = (
  config.FFNExperts(3, top_k=2),
  config.FFNExperts(3, top_k=2, renormalize=True),
  config.FFNExperts(2, top_k=2),  # gates of all experts have the sum 1
)
COHERE = dict(rope_theta=30.0, norm_epsilon=1e-2, qk_norm='none')
LLAMA = COHERE | dict(block='sequential', norm='rmsnorm', rotary_layout='half', logit_scale=1.0)
ALL_WINDOWS = dict(layer_types=('sliding',) * 3, window=5)
WINDOWS = dict(layer_types=('sliding', 'full', 'sliding'), window=5)
COHERE2 = COHERE | WINDOWS | dict(nope_layers=(1,))
OLMO2 = LLAMA | dict(norm_place='post', qk_norm='all_rms')
GRANITE = dict(embedding_scale=1.5, residual_scale=0.6, attention_scale=0.3, logit_scale=0.5)
# The blocks of a mixture, its experts, and what it becomes.
CASES = {
  'llama': (LLAMA, PAPER, 'Qwen2Moe'),
  'llama_renormalised': (LLAMA | dict(head_dim=10), RENORMALISED, 'Mixtral'),
  'llama3': (LLAMA | dict(rope_scaling=folders.LLAMA3), ALL, 'Mixtral'),
  'mistral': (LLAMA | ALL_WINDOWS, RENORMALISED, 'Mixtral'),
  'qwen2': (LLAMA | WINDOWS | dict(biases='qkv'), RENORMALISED, 'Qwen2Moe'),
  'qwen3': (
    LLAMA | dict(qk_norm='head_rms', head_dim=10, tied_embeddings=False), PAPER, 'Qwen3Moe'
  ),
  'olmo2': (OLMO2 | dict(rope_scaling=folders.YARN), PAPER, 'FlexOlmo'),
  'olmo2_renormalised': (OLMO2, RENORMALISED, 'FlexOlmo'),
  'granite': (LLAMA | GRANITE | dict(biases='attention'), RENORMALISED, 'GraniteMoe'),
  'cohere': (COHERE, RENORMALISED, 'Cohere2Moe'),
  'cohere2': (COHERE2, RENORMALISED, 'Cohere2Moe'),
}  # fmt: skip


def write(folder, blocks, experts, **changes) -> None:
  """A random checkpoint of ours."""
  model = folders.make_model(**blocks, ffn_experts=experts)
  folders.write_checkpoint(folder, model, folders.draw(model) | changes)


def export(folder, to, architecture=None) -> str:
  how = dict(dtype=None, max_shard_size='20KB', progress=lambda done, total: None)
  return exporting.convert(folder, str(to), **how, architecture=architecture)['architecture']


@pytest.mark.parametrize('case', CASES)
def test_a_class_of_transformers_computes_the_mixture(case, tmp_path):
  *blocks, architecture = CASES[case]
  write(tmp_path / 'ours', *blocks)
  assert export(tmp_path / 'ours', tmp_path / 'hf') == f'{architecture}ForCausalLM'
  model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'hf', output_loading_info=True
  )
  assert type(model).__name__ == f'{architecture}ForCausalLM'
  assert not any(loaded.values()), loaded
  batch = make_batch()
  tokens = torch.tensor(batch['tokens'], dtype=torch.long)
  with torch.no_grad():
    logits = model.eval()(tokens).logits.numpy()
  far = distance(ours(tmp_path / 'ours', batch)[0], logits)
  print(case, far)  # pytest -s shows how near
  assert far < TOLERANCE


@pytest.mark.parametrize(
  'blocks, architecture, named',
  [
    (LLAMA, 'Mixtral', 'FFN gates are not .* Mixtral.* by their sum: export as Qwen2MoeForC'),
    (LLAMA, 'Qwen3Moe', 'not Qwen3MoeForCausalLM: export as Qwen2MoeForCausalLM or Bam'),
    (COHERE2, 'Cohere2Moe', 'by their sum: export as BamForCausalLM'),
    (OLMO2, 'Llama', 'not LlamaForCausalLM: export as FlexOlmoForCausalLM or Bam'),
  ],
)
def test_a_class_with_other_gates_or_blocks_is_refused(blocks, architecture, named, tmp_path):
  write(tmp_path / 'ours', blocks, PAPER)
  with pytest.raises(UserError, match=named):
    export(tmp_path / 'ours', tmp_path / 'hf', f'{architecture}ForCausalLM')
  bam = 'BamForCausalLM'
  assert export(tmp_path / 'ours', tmp_path / 'hf', bam) == bam


def test_only_our_class_has_a_bias_of_experts(tmp_path):
  experts, bias = dataclasses.replace(PAPER, expert_bias=True), 'blocks/ffn/expert_bias'
  write(tmp_path / 'biased', LLAMA, experts)
  assert export(tmp_path / 'biased', tmp_path / 'bam') == 'BamForCausalLM'
  with pytest.raises(UserError, match='expert_bias is not zero'):
    export(tmp_path / 'biased', tmp_path / 'hf', 'Qwen2MoeForCausalLM')
  write(tmp_path / 'zero', LLAMA, experts, **{bias: np.zeros((3, 3), np.float32)})
  assert export(tmp_path / 'zero', tmp_path / 'hf') == 'Qwen2MoeForCausalLM'

"""Mixtures of FFN experts alone become transformers' own classes, which compute what ours do."""

import pytest

from bam_jax import config
from bam_jax.hf import exporting
from tests.hf import folders

# torch's build is several GB on some platforms; `make test-parity` installs it.
torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

from tests.parity.test_families import check_same, load_file, make_batch, ours, theirs  # noqa: E402

PAPER, RENORMALISED, ALL = (
  config.FFNExperts(3, top_k=2),
  config.FFNExperts(3, top_k=2, renormalize=True),
  config.FFNExperts(2, top_k=2),  # gates of all experts have the sum 1
)
COHERE, LLAMA, OLMO2 = folders.COHERE, folders.LLAMA, folders.OLMO2
ALL_WINDOWS = dict(layer_types=('sliding',) * 3, window=5)
WINDOWS = dict(layer_types=('sliding', 'full', 'sliding'), window=5)
COHERE2 = COHERE | WINDOWS | dict(nope_layers=(1,))
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


@pytest.mark.parametrize('case', CASES)
def test_a_class_of_transformers_computes_the_mixture(case, tmp_path):
  blocks, experts, architecture = CASES[case]
  ours_model = folders.make_model(**blocks, ffn_experts=experts)
  folders.write_checkpoint(tmp_path / 'ours', ours_model, folders.draw(ours_model))
  how = dict(dtype=None, max_shard_size='20KB', progress=lambda done, total: None)
  exporting.convert(tmp_path / 'ours', str(tmp_path / 'hf'), **how)
  model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'hf', output_loading_info=True
  )
  assert type(model).__name__ == f'{architecture}ForCausalLM'
  assert not any(loaded.values()), loaded
  batch = make_batch()
  want, got = theirs(model.eval(), batch), ours(tmp_path / 'ours', batch)
  # Experts that are one tensor in memory have files of their own: gradients are saved like values.
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.copy_(parameter.grad)
  model.save_pretrained(tmp_path / 'gradients')
  gradients = load_file(tmp_path / 'gradients' / 'model.safetensors')
  check_same(got, [(*want[:2], gradients)], ours_model, type(model).__name__)

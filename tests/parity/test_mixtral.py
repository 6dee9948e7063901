"""Top-2 with renormalised gates is Mixtral's convention: the two layers of experts agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bam_jax import config
from bam_jax.model import ffn
from bam_jax.model.kernels import grouped
from bam_jax.model.rope import Tokens
from bam_jax.parallel.collectives import Layout

# torch's build is several GB on some platforms; `make test-parity` installs it.
torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
from transformers.models.mixtral import modeling_mixtral  # noqa: E402

from tests.parity.test_families import TOLERANCE, distance  # noqa: E402

D, F, E, B, T = 16, 24, 5, 3, 14


def theirs(x_BTD, cotangent_BTD):
  """Their block's parameters, its output, and the gradients, all under our names and layouts."""
  options = transformers.MixtralConfig(
    hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=2,
    experts_implementation='eager',
  )  # fmt: skip
  block = modeling_mixtral.MixtralSparseMoeBlock(options).eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for parameter in block.parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      parameter.copy_(noise / parameter.shape[-1] ** 0.5)
  x = torch.tensor(x_BTD, requires_grad=True)
  output = block(x)
  (output * torch.tensor(cotangent_BTD)).sum().backward()

  def named(gate_up_E2FD, down_EDF, router_ED):
    gate_EFD, up_EFD = gate_up_E2FD[:, :F], gate_up_E2FD[:, F:]
    arrays = dict(gate=gate_EFD.mT, up=up_EFD.mT, down=down_EDF.mT, router=router_ED.T)
    return {name: array.detach().numpy().copy() for name, array in arrays.items()}

  parameters = block.experts.gate_up_proj, block.experts.down_proj, block.gate.weight
  gradients = named(*(parameter.grad for parameter in parameters))
  return named(*parameters), output.detach().numpy(), gradients | {'x': x.grad.numpy()}


# Every way in which experts compute, with room for all the tokens.
@pytest.mark.parametrize(
  'capacity_factor, kernel', [(0.0, 'blocked'), (0.0, 'ragged'), (float(E), 'none')], ids=str
)
def test_the_layer_of_experts_is_theirs(capacity_factor, kernel, monkeypatch):
  rng = np.random.default_rng(0)
  x_BTD, cotangent_BTD = rng.normal(size=(2, B, T, D)).astype(np.float32)
  params, their_output_BTD, their_gradients = theirs(x_BTD, cotangent_BTD)
  experts = config.FFNExperts(E, top_k=2, renormalize=True, capacity_factor=capacity_factor)
  model = config.Model(
    vocab_size=2, d_model=D, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2, ffn_dim=F,
    ffn_experts=experts,
  )  # fmt: skip
  swiglu, platform = grouped.swiglu, 'tpu' if kernel == 'ragged' else 'cpu'
  monkeypatch.setattr(grouped, 'BLOCK_ROWS', {'cpu': 4})
  monkeypatch.setattr(grouped, 'swiglu', lambda *arguments: swiglu(*arguments[:-1], platform))
  build = lambda: ffn.MixtureOfFFN(model, Layout(), rngs=nnx.Rngs(params=jax.random.key(0)))
  graph, _ = nnx.split(nnx.eval_shape(build))
  tokens = Tokens(jnp.ones((B, T), jnp.int32), None, None)

  @jax.jit
  def run(params, x_BTD):
    def value(params, x_BTD):
      output_BTD, choices = nnx.merge(graph, params)(x_BTD, tokens)
      return jnp.sum(output_BTD * cotangent_BTD), (output_BTD, choices)

    (_, (output_BTD, choices)), gradients = jax.value_and_grad(value, (0, 1), has_aux=True)(
      params, x_BTD
    )
    return output_BTD, choices, {**gradients[0], 'x': gradients[1]}

  output_BTD, choices, gradients = jax.device_get(run(params, x_BTD))
  assert choices.dropped == 0 and choices.chosen_BTE.any((0, 1)).all(), 'every expert is visited'
  far = {'output': distance(output_BTD, their_output_BTD)}
  assert gradients.keys() == their_gradients.keys()
  far |= {name: distance(gradients[name], gradient) for name, gradient in their_gradients.items()}
  print(capacity_factor, kernel, max(far.items(), key=lambda item: item[1]))
  assert {name: value for name, value in far.items() if not value < TOLERANCE} == {}

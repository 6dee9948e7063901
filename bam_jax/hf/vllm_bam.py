"""BamForCausalLM for vLLM, from the folders that export-hf writes; arXiv 2408.08274.

All attention experts are one attention: its heads are those of all experts, the output of each head
is multiplied with its expert's gate, and one projection sums them. So there is one paged attention
for each layer, whose cache has the key-value heads of all experts, and devices of a tensor-parallel
group share heads as in any model. Order of the query heads: (expert, group, member), or with shared
keys and values (group, expert, member), so that those of a key-value head are neighbours.

Shapes: T tokens, D model, n heads on this device, K head, E experts, R rotated pairs.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from vllm import distributed
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
  ParallelLMHead,
  VocabParallelEmbedding,
)
from vllm.model_executor.models.llama import LlamaMLP
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

from bam_jax.hf.modeling_bam import BamBlock, BamLayerNorm, BamRouter, block_norm, rotate, rotations

# What is computed here, of the fields that choose between formulas.
_COMPUTED = {
  'block': ('parallel', 'sequential'),
  'norm': ('layernorm', 'rmsnorm'),
  'norm_place': ('pre', 'post'),
  'qk_norm': ('none', 'head_layernorm', 'head_rms', 'all_rms'),
  'biases': ('none', 'qkv', 'attention'),
  'hidden_act': ('silu',),
  'ffn': ('swiglu',),
  'router_input': ('token',),
  'router_memory': (0,),
  'attention_cap': (0.0,),
  'logit_cap': (0.0,),
}
_EXPERT = re.compile(r'(.*\.self_attn\.)experts\.(\d+)\.(.*)')


def check(config, quantized: bool, devices: int) -> None:
  """ValueError, of one sentence, for a model or a setting that is not computed here."""
  for name, computed in _COMPUTED.items():
    value, known = getattr(config, name), ', '.join(map(str, computed))
    if value not in computed:
      raise ValueError(f'{name}={value!r} is not computed in vLLM, only {known}: use transformers.')
  if quantized:
    raise ValueError('BamForCausalLM is not quantized in vLLM: leave out quantization.')
  heads = config.num_key_value_heads * (config.shared_kv or config.num_attention_experts or 1)
  if heads % devices and devices % heads:
    wrong = f'tensor_parallel_size={devices} does not fit the {heads} key-value heads'
    raise ValueError(f'{wrong} of all attention experts: it must be a divisor or a multiple.')


def merged(config, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator:
  """The tensors of a folder, those of attention experts as one, in the order of the heads.

  Query and key scales have a row for every head, whatever `qk_norm` is, and are flat.
  """
  waiting: dict[str, dict] = defaultdict(dict)
  heads = {'q_norm.weight': config.num_attention_heads, 'k_norm.weight': config.num_key_value_heads}
  groups = config.num_key_value_heads if config.shared_kv else 1
  for name, tensor in weights:
    if count := heads.get('.'.join(name.rsplit('.', 2)[-2:])):
      tensor = tensor.reshape(-1, config.head_dim).expand(count, -1).flatten()
    match = _EXPERT.fullmatch(name)
    if not match:
      yield name, tensor
      continue
    layer, expert, rest = match.groups()
    experts = waiting[layer + rest]
    experts[int(expert)] = tensor
    if len(experts) < config.num_attention_experts:
      continue
    parts = [experts[e] for e in sorted(waiting.pop(layer + rest))]
    if rest == 'o_proj.bias':
      yield f'{layer}out_bias', torch.stack(parts)
    else:
      rows = [part.T if rest == 'o_proj.weight' else part for part in parts]
      whole = torch.stack([part.unflatten(0, (groups, -1)) for part in rows], 1).flatten(0, 2)
      yield layer + rest, whole.T if rest == 'o_proj.weight' else whole


class BamHeadNorm(BamLayerNorm):
  """The qk-norm of this device's heads: each alone, or for 'all_rms' those of an expert together.

  `owner` (n,) is the expert of each head, `start` the number of the first among those of all
  devices, and `heads` how many of an expert's all devices have.
  """

  def __init__(self, config, owner: torch.Tensor, heads: int, start: int):
    K = config.head_dim
    super().__init__((len(owner) * K,), config, config.qk_norm == 'head_layernorm')
    self.register_buffer('owner', owner, persistent=False)
    self.heads, self.experts = heads, config.num_attention_experts or 1
    self.together = config.qk_norm == 'all_rms'
    rows = slice(start * K, (start + len(owner)) * K)
    self.weight.weight_loader = lambda weight, loaded: weight.data.copy_(loaded[rows])

  def forward(self, x_TnK: torch.Tensor) -> torch.Tensor:
    y = x_TnK.float()
    if self.centred:
      y = y - y.mean(-1, keepdim=True)
    square_Tn = y.pow(2).mean(-1)
    if self.together:
      sums_TE = square_Tn.new_zeros(len(y), self.experts).index_add(1, self.owner, square_Tn)
      sums_TE = distributed.tensor_model_parallel_all_reduce(sums_TE)
      square_Tn = sums_TE[:, self.owner] / self.heads
    y = y * torch.rsqrt(square_Tn + self.epsilon)[..., None]
    return (y * self.weight.float().view(x_TnK.shape[1:])).to(x_TnK.dtype)


class BamAttention(nn.Module):
  """All attention experts of a layer, or its dense attention."""

  def __init__(self, vllm_config: VllmConfig, layer: int, prefix: str):
    super().__init__()
    config = vllm_config.model_config.hf_config
    D, self.head_dim, E = config.hidden_size, config.head_dim, config.num_attention_experts or 1
    H, G = config.num_attention_heads, config.num_key_value_heads
    shared, self.layout = config.shared_kv, config.rotary_layout
    self.rotates = layer not in config.nope_layers
    mixed, biased = config.num_attention_experts > 0, config.biases == 'attention'
    self.qkv_proj = qkv = linear.QKVParallelLinear(
      D, self.head_dim, E * H, G if shared else E * G,
      bias=config.biases != 'none', prefix=f'{prefix}.qkv_proj',
    )  # fmt: skip
    width = E * H * self.head_dim
    self.o_proj = linear.RowParallelLinear(
      width, D, bias=biased and not mixed, prefix=f'{prefix}.o_proj'
    )
    if mixed:
      top_k, renormalize = config.num_attention_experts_per_tok, config.norm_topk_attention
      self.router = BamRouter(D, E, top_k, renormalize).float()
    # A gate is that of its expert's bias too.
    self.out_bias = nn.Parameter(torch.zeros(E, D)) if biased and mixed else None

    n, kv, copies = qkv.num_heads, qkv.num_kv_heads, qkv.num_kv_head_replicas
    rank = distributed.get_tensor_model_parallel_rank()
    start, kv_start = rank * n, rank // copies * kv
    queries, keys = torch.arange(start, start + n), torch.arange(kv_start, kv_start + kv)
    owner = queries // (H // G) % E if shared else queries // H
    kv_owner = torch.zeros_like(keys) if shared else keys // G
    self.register_buffer('owner', owner, persistent=False)
    self.register_buffer('kv_owner', kv_owner, persistent=False)
    self.q_norm = self.k_norm = nn.Identity()
    if config.qk_norm != 'none':
      self.q_norm = BamHeadNorm(config, owner, H, start)
      self.k_norm = BamHeadNorm(config, kv_owner, G * copies, kv_start)
    slides = config.layer_types[layer] == 'sliding_attention'
    self.attn = Attention(
      n, self.head_dim, config.attention_scale or self.head_dim**-0.5, num_kv_heads=kv,
      cache_config=vllm_config.cache_config, prefix=f'{prefix}.attn',
      per_layer_sliding_window=config.sliding_window if slides else None,
    )  # fmt: skip
    self.widths = [n * self.head_dim, kv * self.head_dim, kv * self.head_dim]

  def forward(self, y_TD: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """The output (T, D); `turns` (2, T, 1 or E, R) are the cosine and sine of the positions."""
    query, key, value = self.qkv_proj(y_TD)[0].split(self.widths, dim=-1)
    query = self.q_norm(query.unflatten(-1, (-1, self.head_dim)))
    key = self.k_norm(key.unflatten(-1, (-1, self.head_dim)))
    if self.rotates:
      one = turns.shape[2] == 1
      query = rotate(query, *(turns if one else turns[:, :, self.owner]), self.layout)
      key = rotate(key, *(turns if one else turns[:, :, self.kv_owner]), self.layout)
    heads = self.attn(query.flatten(1), key.flatten(1), value)
    if not hasattr(self, 'router'):
      return self.o_proj(heads)[0]
    gates_TE = self.router(y_TD).to(y_TD.dtype)
    heads = heads.unflatten(-1, (-1, self.head_dim)) * gates_TE[:, self.owner, None]
    output = self.o_proj(heads.flatten(1))[0]
    return output if self.out_bias is None else output + gates_TE @ self.out_bias


class BamSparseMLP(nn.Module):
  """FFN experts, by vLLM's kernels; gates are a softmax over all, as in the paper."""

  def __init__(self, config, prefix: str):
    super().__init__()
    D, E, top_k = config.hidden_size, config.num_experts, config.num_experts_per_tok
    self.router = BamRouter(D, E, top_k, config.norm_topk_prob, config.use_expert_bias).float()
    self.experts = FusedMoEFactory(
      num_experts=E, top_k=top_k, hidden_size=D, intermediate_size=config.intermediate_size,
      renormalize=config.norm_topk_prob, router_logits_dtype=torch.float32,
      custom_routing_function=self.choose if config.use_expert_bias else None,
      prefix=f'{prefix}.experts',
    )  # fmt: skip

  def choose(self, hidden_states, gating_output, topk, renormalize):
    """Gates and numbers (T, topk) of the experts chosen with the bias, which is not in gates."""
    gates_TE = gating_output.float().softmax(-1)
    chosen = (gates_TE + self.router.e_score_correction_bias).topk(topk).indices
    gates = gates_TE.gather(-1, chosen)
    return gates / gates.sum(-1, keepdim=True) if renormalize else gates, chosen.int()

  def forward(self, y_TD: torch.Tensor) -> torch.Tensor:
    return self.experts(y_TD, nn.functional.linear(y_TD.float(), self.router.weight))


class BamLayer(BamBlock):
  """A block and its parts."""

  def __init__(self, vllm_config: VllmConfig, layer: int, prefix: str):
    config = vllm_config.model_config.hf_config
    super().__init__(config)
    self.kind, sizes = config.layer_types[layer], (config.hidden_size, config.intermediate_size)
    self.self_attn = BamAttention(vllm_config, layer, f'{prefix}.self_attn')
    if config.num_experts:
      self.mlp = BamSparseMLP(config, f'{prefix}.mlp')
    else:
      self.mlp = LlamaMLP(*sizes, config.hidden_act, prefix=f'{prefix}.mlp')

  def forward(self, x_TD: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    return self.residual(x_TD, lambda y_TD: self.self_attn(y_TD, turns), self.mlp)


@support_torch_compile
class BamModel(nn.Module):
  """Embedding, blocks and the final norm."""

  def __init__(self, *, vllm_config: VllmConfig, prefix: str = ''):
    super().__init__()
    config = vllm_config.model_config.hf_config
    D, self.scale = config.hidden_size, config.embedding_scale
    self.embed_tokens = VocabParallelEmbedding(config.vocab_size, D)
    layers = range(config.num_hidden_layers)
    self.layers = nn.ModuleList(BamLayer(vllm_config, n, f'{prefix}.layers.{n}') for n in layers)
    self.norm = block_norm(config)
    positions = torch.arange(vllm_config.model_config.max_model_len)[None]
    for kind in set(config.layer_types):  # (2, positions, 1 or E, R)
      self.register_buffer(kind, rotations(config, kind, positions)[:, 0, :, :, 0], False)

  def forward(
    self, input_ids: torch.Tensor | None, positions: torch.Tensor,
    inputs_embeds: torch.Tensor | None = None,
  ) -> torch.Tensor:  # fmt: skip
    x_TD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
    x_TD = x_TD * self.scale
    for layer in self.layers:
      x_TD = layer(x_TD, getattr(self, layer.kind)[:, positions])
    return self.norm(x_TD)


class BamForCausalLM(nn.Module):
  """The model with next-token logits."""

  stacked = {f'.{one}_proj': ('.qkv_proj', one) for one in 'qkv'}
  stacked |= {f'.mlp.{one}_proj': ('.mlp.gate_up_proj', n) for n, one in enumerate(('gate', 'up'))}
  hf_to_vllm_mapper = WeightsMapper(orig_to_new_stacked=stacked)

  def __init__(self, *, vllm_config: VllmConfig, prefix: str = ''):
    super().__init__()
    self.config = config = vllm_config.model_config.hf_config
    devices = distributed.get_tensor_model_parallel_world_size()
    check(config, vllm_config.quant_config is not None, devices)
    self.model = BamModel(vllm_config=vllm_config, prefix='model')
    self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, prefix='lm_head')
    if config.tie_word_embeddings:
      self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
    self.logits_processor = LogitsProcessor(config.vocab_size, scale=config.logit_scale)

  def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
    return self.model.embed_tokens(input_ids)

  def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None):
    """The last hidden states (T, D); without pipeline stages there are no tensors between them."""
    return self.model(input_ids, positions, inputs_embeds)

  def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
    return self.logits_processor(self.lm_head, hidden_states)

  def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
    loader = AutoWeightsLoader(self)
    return loader.load_weights(merged(self.config, weights), mapper=self.hf_to_vllm_mapper)

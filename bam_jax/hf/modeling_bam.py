"""BAM for transformers: mixtures of attention and FFN experts; arXiv 2408.08274.

The blocks are Cohere's, `y = norm(x); x + attention(y) + ffn(y)`, with either part dense or a
mixture. Every token passes through all attention experts, whose outputs are weighted with the gates
of the query's token, and through its top-k FFN experts. No balancing loss is added in training: add
one to fine-tune the routers.

Shapes: B batch, T queries, S keys, D model, H query heads, G key-value heads, K head, E experts.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CohereForCausalLM, CohereModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.cohere import modeling_cohere

from .configuration_bam import BamConfig


class BamRouter(nn.Linear):
  """Gates (B, T, E) of the experts: a softmax over all of them, 0 for those not chosen."""

  def __init__(self, hidden_size, num_experts, top_k, renormalize, expert_bias=False):
    super().__init__(hidden_size, num_experts, bias=False)
    self.top_k, self.renormalize = top_k, renormalize
    # It affects the choice of experts, not their gates.
    bias = torch.zeros(num_experts) if expert_bias else None
    self.register_buffer('e_score_correction_bias', bias)

  def forward(self, y_BTD: torch.Tensor) -> torch.Tensor:
    gates = F.linear(y_BTD.float(), self.weight.float()).softmax(-1)
    if not self.top_k:
      return gates
    scores = gates.detach()
    if self.e_score_correction_bias is not None:
      scores = scores + self.e_score_correction_bias.float()
    # Stable, so that ties go to the expert with the lower index.
    chosen = scores.sort(dim=-1, descending=True, stable=True).indices[..., : self.top_k]
    gates = torch.zeros_like(gates).scatter(-1, chosen, gates.gather(-1, chosen))
    return gates / gates.sum(-1, keepdim=True) if self.renormalize else gates


class BamProjections(nn.Module):
  """Projections of attention: those of queries and outputs, those of keys and values, or both."""

  def __init__(self, config: BamConfig, query_output: bool, key_value: bool):
    super().__init__()
    D, H, G = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    K, eps, use_norm = config.head_dim, config.layer_norm_eps, config.use_qk_norm
    if query_output:
      self.q_proj, self.o_proj = nn.Linear(D, H * K, bias=False), nn.Linear(H * K, D, bias=False)
      self.q_norm = modeling_cohere.CohereLayerNorm((H, K), eps) if use_norm else nn.Identity()
    if key_value:
      self.k_proj, self.v_proj = nn.Linear(D, G * K, bias=False), nn.Linear(D, G * K, bias=False)
      self.k_norm = modeling_cohere.CohereLayerNorm((G, K), eps) if use_norm else nn.Identity()


class BamAttention(BamProjections):
  """The sum of several attention experts, weighted with the gates of the query's token.

  Experts have their own queries and outputs and, without `shared_kv`, keys and values. The heads of
  all experts are side by side, in one kernel call and one cache entry.
  """

  def __init__(self, config: BamConfig, layer_idx: int):
    E, shared_kv = config.num_attention_experts, config.shared_kv
    super().__init__(config, query_output=False, key_value=shared_kv)
    self.config, self.layer_idx, self.is_causal = config, layer_idx, True
    self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
    self.experts = nn.ModuleList(BamProjections(config, True, not shared_kv) for _ in range(E))
    top_k, renormalize = config.num_attention_experts_per_tok, config.norm_topk_attention
    self.router = BamRouter(config.hidden_size, E, top_k, renormalize)

  def forward(
    self, hidden_states, position_embeddings, attention_mask, past_key_values=None, cache=None,
    **kwargs,
  ):  # fmt: skip
    """The output (B, T, D) for `hidden_states` (B, T, D), and weights if the kernel has them."""
    y, E, K = hidden_states, len(self.experts), self.config.head_dim
    kv_owners = [self] if self.config.shared_kv else self.experts
    split = lambda x: x.unflatten(-1, (-1, K))
    query = torch.cat([owner.q_norm(split(owner.q_proj(y))) for owner in self.experts], dim=2)
    key = torch.cat([owner.k_norm(split(owner.k_proj(y))) for owner in kv_owners], dim=2)
    value = torch.cat([split(owner.v_proj(y)) for owner in kv_owners], dim=2)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    query, key = modeling_cohere.apply_rotary_pos_emb(query, key, *position_embeddings)
    cache = past_key_values if cache is None else cache  # its name before transformers 5.24, since
    if cache is not None:
      key, value = cache.update(key, value, self.layer_idx)
    if self.config.shared_kv:
      key, value = key.repeat(1, E, 1, 1), value.repeat(1, E, 1, 1)

    kernel = self.config._attn_implementation
    eager = modeling_cohere.eager_attention_forward
    attend = eager if kernel == 'eager' else ALL_ATTENTION_FUNCTIONS[kernel]
    heads, weights = attend(self, query, key, value, attention_mask, scaling=K**-0.5, **kwargs)
    heads = heads.unflatten(2, (E, -1))  # (B, T, E, H, K)
    gates = self.router(y).to(y.dtype)[..., None, None]  # (B, T, E, 1, 1)
    gated = (gates * heads).flatten(3).unbind(2)
    return sum(expert.o_proj(x) for expert, x in zip(self.experts, gated)), weights


class BamSparseMLP(nn.Module):
  """The sum of the top-k FFN experts of each token, weighted with their gates."""

  def __init__(self, config: BamConfig):
    super().__init__()
    E, top_k, renormalize = config.num_experts, config.num_experts_per_tok, config.norm_topk_prob
    self.router = BamRouter(config.hidden_size, E, top_k, renormalize, config.use_expert_bias)
    self.experts = nn.ModuleList(modeling_cohere.CohereMLP(config) for _ in range(E))

  def forward(self, y_BTD: torch.Tensor) -> torch.Tensor:
    gates = self.router(y_BTD).to(y_BTD.dtype).flatten(0, 1)
    tokens = y_BTD.flatten(0, 1)
    output = torch.zeros_like(tokens)
    for e, expert in enumerate(self.experts):
      rows = gates[:, e].nonzero()[:, 0]
      output = output.index_add(0, rows, gates[rows, e, None] * expert(tokens[rows]))
    return output.view_as(y_BTD)


class BamModel(CohereModel):
  """Embedding, blocks and the final norm; Cohere's, except for the experts."""

  config_class = BamConfig

  def __init__(self, config: BamConfig):
    super().__init__(config)
    for layer_idx, layer in enumerate(self.layers):
      if config.num_attention_experts:
        layer.self_attn = BamAttention(config, layer_idx)
      if config.num_experts:
        layer.mlp = BamSparseMLP(config)
    self._keep_in_fp32_modules_strict = {'router'}
    self.post_init()


class BamForCausalLM(CohereForCausalLM):
  """The model with next-token logits."""

  config_class = BamConfig

  def __init__(self, config: BamConfig):
    super().__init__(config)
    self.model = BamModel(config)
    self._keep_in_fp32_modules_strict = {'router'}
    self.post_init()

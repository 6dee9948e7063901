"""BAM for transformers: mixtures of attention and FFN experts; arXiv 2408.08274.

Either part of a block is dense or a mixture. Every token passes through all attention experts,
whose outputs are weighted with the gates of the query's token, and through its top-k FFN experts.
No balancing loss is added in training: add one to fine-tune the routers.

Shapes: B batch, T queries, S keys, D model, H query heads, G key-value heads, K head, E experts,
R rotated pairs.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CohereForCausalLM, CoherePreTrainedModel, DynamicCache, GenerationMixin
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_bam import BamConfig


class BamLayerNorm(nn.Module):
  """LayerNorm or RMSNorm of each of the groups of channels that a scale is for."""

  def __init__(self, shape: tuple[int, ...], config: BamConfig, centred: bool, biased=False):
    super().__init__()
    self.offset = float(config.norm == 'rmsnorm_plus_one')
    self.weight, self.centred = nn.Parameter(torch.full(shape, 1 - self.offset)), centred
    self.bias = nn.Parameter(torch.zeros(shape)) if biased else None
    self.epsilon = config.layer_norm_eps

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    y = x.float().unflatten(-1, (-1, *self.weight.shape))
    norm = F.layer_norm if self.centred else F.rms_norm
    y = norm(y, y.shape[-1:], eps=self.epsilon) * (self.offset + self.weight.float())
    return (y if self.bias is None else y + self.bias.float()).view_as(x).to(x.dtype)


def block_norm(config: BamConfig) -> BamLayerNorm:
  """A norm of the residual stream."""
  centred, biased = config.norm.startswith('layernorm'), config.norm == 'layernorm_bias'
  return BamLayerNorm((config.hidden_size,), config, centred, biased)


class BamRouter(nn.Linear):
  """Gates (B, T, E) of the experts: a softmax over all of them, 0 for those not chosen."""

  def __init__(self, hidden_size, num_experts, top_k, renormalize, expert_bias=False):
    super().__init__(hidden_size, num_experts, bias=False)
    self.top_k, self.renormalize = top_k, renormalize
    # It affects the choice of experts, not their gates.
    bias = torch.zeros(num_experts) if expert_bias else None
    self.register_buffer('e_score_correction_bias', bias)

  def forward(self, y_BTD: torch.Tensor, prefix: 'Prefix | None' = None, number: int = 0):
    logits = F.linear(y_BTD.float(), self.weight.float())
    gates = (prefix.mean(logits, number) if prefix else logits).softmax(-1)
    if not self.top_k:
      return gates
    scores = gates.detach()
    if self.e_score_correction_bias is not None:
      scores = scores + self.e_score_correction_bias.float()
    # Stable, so that ties go to the expert with the lower index.
    chosen = scores.sort(dim=-1, descending=True, stable=True).indices[..., : self.top_k]
    gates = torch.zeros_like(gates).scatter(-1, chosen, gates.gather(-1, chosen))
    return gates / gates.sum(-1, keepdim=True) if self.renormalize else gates


class RouterSums(DynamicLayer):
  """The entry of a cache, after its layers', with sums of routers' logits: BRE, and tokens: B11."""

  def crop(self, tokens_to_remove: int) -> None:
    """A sum does not tell what its last tokens added."""
    if tokens_to_remove:
      raise NotImplementedError("router_input='prefix' cannot take tokens back out of its cache.")


class Prefix:
  """The means that routers read: of the logits of all tokens up to each, without padding."""

  def __init__(self, config: BamConfig, real_BT: torch.Tensor, cache):
    layers = cache.layers if cache is not None else []
    held = [layer for layer in layers if isinstance(layer, RouterSums)]
    self.held = held[0] if held else RouterSums()
    shape = 2 * config.num_hidden_layers, max(config.num_attention_experts, config.num_experts)
    if not held:
      self.held.keys = torch.zeros(len(real_BT), *shape, device=real_BT.device)
      self.held.values = torch.zeros(len(real_BT), 1, 1, device=real_BT.device)
      self.held.is_initialized = True
    self.real_BT1 = real_BT.float().unsqueeze(-1)
    self.tokens_BT1, self.memory = self.real_BT1.cumsum(1), config.router_memory
    self.count_BT1 = self.held.values + self.tokens_BT1
    self.sums = self.held.keys.clone()
    if self.memory:  # weights of earlier tokens in each one's sum
      ages_BTT = self.tokens_BT1 - self.tokens_BT1.mT
      self.weights_BTT = self.kept(ages_BTT.clamp(min=0)).tril() * self.real_BT1.mT

  def kept(self, ages: torch.Tensor) -> torch.Tensor:
    """The weights of tokens so long ago."""
    return (1 - 1 / self.memory) ** ages

  def mean(self, logits_BTE: torch.Tensor, number: int) -> torch.Tensor:
    """What the router of this number reads, in place of each token's logits."""
    E = logits_BTE.shape[-1]
    before_B1E, count_BT1 = self.held.keys[:, number, None, :E], self.count_BT1.clamp(min=1)
    if self.memory:
      sums_BTE = self.weights_BTT @ logits_BTE + self.kept(self.tokens_BT1) * before_B1E
      count_BT1 = self.memory * (1 - self.kept(count_BT1))
    else:
      sums_BTE = before_B1E + (logits_BTE * self.real_BT1).cumsum(1)
    self.sums[:, number, :E] = sums_BTE[:, -1].detach()
    return sums_BTE / count_BT1

  def keep(self, cache) -> None:
    """Adds these tokens to a cache."""
    self.held.keys, self.held.values = self.sums, self.count_BT1[:, -1:]
    if not any(layer is self.held for layer in cache.layers):
      cache.layers.append(self.held)


def real_tokens(mask: torch.Tensor | None, x_BTD: torch.Tensor, seen: int) -> torch.Tensor:
  """Which tokens (B, T) are not padding, from a mask (B, S), or (B, 1, T, S) of what each sees."""
  B, T, _ = x_BTD.shape
  if mask is None:
    return torch.ones(B, T, dtype=torch.bool, device=x_BTD.device)
  if mask.dim() == 2:
    return mask[:, -T:].bool()
  itself = mask[:, 0].diagonal(seen, -2, -1)[:, :T]
  return (itself if itself.dtype == torch.bool else itself == 0).expand(B, T)


def rotations(config: BamConfig, layer_type: str, positions_BT: torch.Tensor) -> torch.Tensor:
  """Cosine and sine (2, B, T, E, 1, R) for layers of a type; E is 1 if experts share them."""
  ropes, scaled = config.attention_expert_ropes or [config.rope_parameters], copy.copy(config)
  if layer_type == 'sliding_attention' and config.window_rope_theta:
    ropes = [{'rope_type': 'default', 'rope_theta': config.window_rope_theta}]
  scaled.head_dim, turned = config.rotary_dim or config.head_dim, []
  for rope in ropes:
    scaled.rope_parameters = {'factor': 1.0, **rope}
    kind = rope['rope_type'].replace('default', 'linear')  # with a factor of 1
    frequency, factor = ROPE_INIT_FUNCTIONS[kind](scaled, positions_BT.device)
    angles = positions_BT[..., None, None].float() * frequency
    turned.append(factor * torch.stack([angles.cos(), angles.sin()]))
  return torch.stack(turned, dim=3)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: str) -> torch.Tensor:
  """Queries or keys (B, T, E, heads, K), the first 2R channels of each head rotated, in float32."""
  turned, rest = x[..., : 2 * cos.shape[-1]].float(), x[..., 2 * cos.shape[-1] :]
  shape, pair = ((2, -1), -2) if layout == 'half' else ((-1, 2), -1)
  one, two = turned.unflatten(-1, shape).unbind(pair)
  turned = torch.stack([one * cos - two * sin, one * sin + two * cos], pair).flatten(-2)
  return torch.cat([turned.to(x.dtype), rest], dim=-1)


class BamProjections(nn.Module):
  """Projections of attention: those of queries and outputs, those of keys and values, or both."""

  def __init__(self, config: BamConfig, query_output: bool, key_value: bool):
    super().__init__()
    D, K, qk_norm = config.hidden_size, config.head_dim, config.qk_norm
    H, G = config.num_attention_heads, config.num_key_value_heads
    linear = lambda width: nn.Linear(D, width, bias=config.biases != 'none')

    def norm(heads: int) -> nn.Module:
      if qk_norm == 'none':
        return nn.Identity()
      shape = {'head_layernorm': (heads, K), 'head_rms': (K,), 'all_rms': (heads * K,)}[qk_norm]
      return BamLayerNorm(shape, config, centred=qk_norm == 'head_layernorm')

    if query_output:
      self.q_proj, self.q_norm = linear(H * K), norm(H)
      self.o_proj = nn.Linear(H * K, D, bias=config.biases in ('attention', 'all'))
    if key_value:
      self.k_proj, self.v_proj, self.k_norm = linear(G * K), linear(G * K), norm(G)


class BamAttention(BamProjections):
  """Attention, or the sum of several attention experts, weighted with the query's token's gates.

  Experts have their own queries and outputs and, without `shared_kv`, keys and values. The heads of
  all experts are side by side, in one kernel call and one cache entry.
  """

  def __init__(self, config: BamConfig, layer_idx: int):
    E, shared_kv = config.num_attention_experts, config.shared_kv
    super().__init__(config, query_output=not E, key_value=not E or shared_kv)
    self.config, self.layer_idx, self.is_causal = config, layer_idx, True
    self.rotates = layer_idx not in config.nope_layers
    slides = config.layer_types[layer_idx] == 'sliding_attention'
    self.sliding_window = config.sliding_window if slides else None
    self.scaling = config.attention_scale or config.head_dim**-0.5
    readers = config.num_attention_heads * (E if E and shared_kv else 1)
    self.num_key_value_groups = readers // config.num_key_value_heads
    if E:
      self.experts = nn.ModuleList(BamProjections(config, True, not shared_kv) for _ in range(E))
      top_k, renormalize = config.num_attention_experts_per_tok, config.norm_topk_attention
      self.router = BamRouter(config.hidden_size, E, top_k, renormalize)

  def forward(
    self, y: torch.Tensor, position_embeddings, attention_mask, cache=None, prefix=None, **kwargs
  ):
    """The output (B, T, D) for `y` (B, T, D), and weights if the kernel has them."""
    config, K, E = self.config, self.config.head_dim, self.config.num_attention_experts
    owners, shared = self.experts if E else [self], E and config.shared_kv
    kv_owners = [self] if shared else owners
    split = lambda x: x.unflatten(-1, (-1, K))
    # (B, T, E, H or G, K), with E = 1 for what experts share
    query = torch.stack([split(one.q_norm(one.q_proj(y))) for one in owners], dim=2)
    key = torch.stack([split(one.k_norm(one.k_proj(y))) for one in kv_owners], dim=2)
    value = torch.stack([split(one.v_proj(y)) for one in kv_owners], dim=2)
    if self.rotates:
      query, key = (rotate(x, *position_embeddings, config.rotary_layout) for x in (query, key))
    if shared:  # all experts' queries of a key-value head are neighbours
      query = query.unflatten(3, (config.num_key_value_heads, -1)).transpose(2, 3)
    query, key, value = (x.flatten(2, -2).transpose(1, 2) for x in (query, key, value))
    if cache is not None:
      key, value = cache.update(key, value, self.layer_idx)

    kernel = config._attn_implementation
    attend = eager_attention_forward if kernel == 'eager' else ALL_ATTENTION_FUNCTIONS[kernel]
    options = dict(scaling=self.scaling, sliding_window=self.sliding_window)
    if config.attention_cap:
      options['softcap'] = config.attention_cap
    heads, weights = attend(self, query, key, value, attention_mask, **options, **kwargs)
    if not E:
      return self.o_proj(heads.flatten(2)), weights
    if shared:
      heads = heads.unflatten(2, (config.num_key_value_heads, E, -1)).transpose(2, 3)
    heads = heads.reshape(*y.shape[:2], E, -1)
    gates = self.router(y, prefix, 2 * self.layer_idx).to(y.dtype).unsqueeze(-1)  # (B, T, E, 1)
    # After the projection, so that a gate is that of the bias too.
    outputs = [gates[:, :, e] * expert.o_proj(heads[:, :, e]) for e, expert in enumerate(owners)]
    return sum(outputs), weights


class BamMLP(nn.Module):
  """A dense FFN, or an expert."""

  def __init__(self, config: BamConfig):
    super().__init__()
    D, hidden, biased = config.hidden_size, config.intermediate_size, config.biases == 'all'
    self.kind = config.ffn
    if self.kind != 'gelu':
      self.gate_proj = nn.Linear(D, hidden, bias=biased)
    self.up_proj = nn.Linear(D, hidden, bias=biased)
    self.down_proj = nn.Linear(hidden, D, bias=biased)

  def forward(self, y: torch.Tensor, prefix=None) -> torch.Tensor:
    up = self.up_proj(y)
    if self.kind == 'gelu':
      return self.down_proj(F.gelu(up))
    gate = self.gate_proj(y)
    gate = F.silu(gate) if self.kind == 'swiglu' else F.gelu(gate, approximate='tanh')
    return self.down_proj(gate * up)


class BamSparseMLP(nn.Module):
  """The sum of the top-k FFN experts of each token, weighted with their gates."""

  def __init__(self, config: BamConfig, layer_idx: int):
    super().__init__()
    self.layer_idx = layer_idx
    E, top_k, renormalize = config.num_experts, config.num_experts_per_tok, config.norm_topk_prob
    self.router = BamRouter(config.hidden_size, E, top_k, renormalize, config.use_expert_bias)
    self.experts = nn.ModuleList(BamMLP(config) for _ in range(E))

  def forward(self, y_BTD: torch.Tensor, prefix: Prefix | None = None) -> torch.Tensor:
    gates = self.router(y_BTD, prefix, 2 * self.layer_idx + 1).to(y_BTD.dtype).flatten(0, 1)
    tokens = y_BTD.flatten(0, 1)
    output = torch.zeros_like(tokens)
    for e, expert in enumerate(self.experts):
      rows = gates[:, e].nonzero()[:, 0]
      output = output.index_add(0, rows, gates[rows, e, None] * expert(tokens[rows]))
    return output.view_as(y_BTD)


class BamBlock(nn.Module):
  """A block's norms, and attention and FFN between them: side by side, or one after the other."""

  def __init__(self, config: BamConfig):
    super().__init__()
    self.sequential, self.scale = config.block == 'sequential', config.residual_scale
    # On the inputs and on the outputs of the two parts: names of modules, '' for none.
    before, after = ['', ''], ['', '']
    if config.norm_place != 'post':
      second = 'post_attention' if config.norm_place == 'pre' else 'pre_feedforward'
      before = ['input_layernorm', '' if config.block == 'parallel' else f'{second}_layernorm']
    if config.norm_place != 'pre':
      after = ['post_attention_layernorm', 'post_feedforward_layernorm']
    for name in filter(None, before + after):
      setattr(self, name, block_norm(config))
    self.before, self.after = before, after

  def residual(self, x: torch.Tensor, attention, ffn) -> torch.Tensor:
    """The residual stream after the block, whose parts are functions."""
    norm = lambda name, x: getattr(self, name)(x) if name else x
    y = norm(self.before[0], x)
    attended = attention(y)
    if not self.sequential:
      y = norm(self.before[1], x) if self.before[1] else y
      return x + self.scale * (attended + ffn(y))
    x = x + self.scale * norm(self.after[0], attended)
    return x + self.scale * norm(self.after[1], ffn(norm(self.before[1], x)))


class BamLayer(GradientCheckpointingLayer, BamBlock):
  """A block and its parts."""

  def __init__(self, config: BamConfig, layer_idx: int):
    super().__init__(config)
    self.self_attn = BamAttention(config, layer_idx)
    self.mlp = BamSparseMLP(config, layer_idx) if config.num_experts else BamMLP(config)

  def forward(self, x: torch.Tensor, prefix: Prefix | None = None, **kwargs) -> torch.Tensor:
    """The residual stream (B, T, D) after the layer."""
    attention = lambda y: self.self_attn(y, prefix=prefix, **kwargs)[0]
    return self.residual(x, attention, lambda y: self.mlp(y, prefix))


class BamPreTrainedModel(CoherePreTrainedModel):
  """What transformers knows of the classes below; the kernels that they can use are Cohere's."""

  config_class = BamConfig
  _no_split_modules = ['BamLayer']
  _keep_in_fp32_modules_strict = {'router'}
  _can_compile_fullgraph = False  # how many tokens an expert has depends on their values
  _can_record_outputs = {'hidden_states': BamLayer, 'attentions': BamAttention}


class BamModel(BamPreTrainedModel):
  """Embedding, blocks and the final norm."""

  def __init__(self, config: BamConfig):
    super().__init__(config)
    self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
    self.layers = nn.ModuleList(BamLayer(config, n) for n in range(config.num_hidden_layers))
    self.norm = block_norm(config)
    if config.attention_cap and config._attn_implementation == 'sdpa':
      config._attn_implementation = 'eager'  # sdpa has no cap
    self.gradient_checkpointing = False
    self.post_init()

  @merge_with_config_defaults
  @capture_outputs
  def forward(
    self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, cache=None,
    inputs_embeds=None, use_cache=None, **kwargs,
  ):  # fmt: skip
    """The last hidden states (B, T, D), and the cache."""
    config = self.config
    x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
    cache = past_key_values if cache is None else cache  # its name before transformers 5.24, since
    if use_cache and cache is None:
      cache = DynamicCache(config=config)
    seen = cache.get_seq_length() if cache is not None else 0
    if position_ids is None:
      position_ids = (torch.arange(x.shape[1], device=x.device) + seen)[None]
    masks = attention_mask  # which `generate` may have made of it, by the types of layers
    if not isinstance(masks, dict):
      masks = create_masks_for_generate(config, x, attention_mask, cache, position_ids)
    prefix = None
    if config.router_input == 'prefix':
      mask = next(iter(masks.values())) if isinstance(attention_mask, dict) else attention_mask
      prefix = Prefix(config, real_tokens(mask, x, seen), cache)
    turns = {kind: rotations(config, kind, position_ids) for kind in masks}
    x = x * config.embedding_scale
    for layer, kind in zip(self.layers, config.layer_types):
      options = dict(position_embeddings=turns[kind], position_ids=position_ids, cache=cache)
      options['prefix'] = prefix
      x = layer(x, attention_mask=masks[kind], **options, **kwargs)
    if prefix and cache is not None:
      prefix.keep(cache)
    return BaseModelOutputWithPast(self.norm(x), cache)


class BamHead(nn.Linear):
  """Logits, scaled and capped."""

  def __init__(self, config: BamConfig):
    super().__init__(config.hidden_size, config.vocab_size, bias=False)
    self.scale, self.cap = config.logit_scale, config.logit_cap

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    logits = self.scale * super().forward(x)
    return self.cap * torch.tanh(logits / self.cap) if self.cap else logits


class BamForCausalLM(BamPreTrainedModel, GenerationMixin):
  """The model with next-token logits."""

  _tied_weights_keys = {'lm_head.weight': 'model.embed_tokens.weight'}
  forward = CohereForCausalLM.forward

  def __init__(self, config: BamConfig):
    super().__init__(config)
    self.model = BamModel(config)
    self.lm_head, self.logit_scale = BamHead(config), 1.0
    self.post_init()

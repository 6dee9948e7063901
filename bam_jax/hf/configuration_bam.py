"""The configuration of a BAM model for transformers: Cohere's, and the experts'."""

from transformers import CohereConfig

EXPERTS = dict(
  num_attention_experts=4,  # 0: a dense attention
  num_attention_experts_per_tok=0,  # attention experts for each token; 0: all of them
  norm_topk_attention=False,  # divide the gates of the chosen attention experts by their sum
  shared_kv=False,  # one key and one value projection for all attention experts
  num_experts=4,  # FFN experts; 0: a dense FFN
  num_experts_per_tok=1,  # FFN experts for each token
  norm_topk_prob=False,  # divide the gates of the chosen FFN experts by their sum
  use_expert_bias=False,  # a bias for each FFN expert, which affects their choice, not their gates
  capacity_factor=0.0,  # of the FFN experts in training; no token is dropped here
  upcycling_method=None,  # how the model was made from dense ones
  expert_sources=(),  # names of the dense models that the experts were
)


class BamConfig(CohereConfig):
  """What `BamForCausalLM` is built from: the keys of CohereConfig and of EXPERTS."""

  model_type = 'bam'

  def __init__(self, **kwargs):
    for key, default in EXPERTS.items():
      setattr(self, key, kwargs.pop(key, default))
    super().__init__(**kwargs)

"""What vLLM calls, in each of its processes, so that it can serve BamForCausalLM.

Neither jax nor, until vLLM calls `register`, torch is imported here.
"""


def register() -> None:
  """Registers the model, its configuration, and the heads that its cache has room for."""
  from transformers import AutoConfig
  from vllm import ModelRegistry
  from vllm.transformers_utils import model_arch_config_convertor as architectures

  from bam_jax.hf.configuration_bam import BamConfig

  class Heads(architectures.ModelArchConfigConvertorBase):
    """The heads of all attention experts, which are one attention there."""

    def get_total_num_attention_heads(self) -> int:
      config = self.hf_config
      return config.num_attention_heads * (config.num_attention_experts or 1)

    def get_total_num_kv_heads(self) -> int:
      config = self.hf_config
      owners = 1 if config.shared_kv else config.num_attention_experts or 1
      return config.num_key_value_heads * owners

  AutoConfig.register('bam', BamConfig, exist_ok=True)
  architectures.MODEL_ARCH_CONFIG_CONVERTORS['bam'] = Heads
  # By name: vLLM imports the model in the processes that need it.
  ModelRegistry.register_model('BamForCausalLM', 'bam_jax.hf.vllm_bam:BamForCausalLM')

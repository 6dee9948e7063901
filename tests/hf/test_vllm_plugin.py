"""What vLLM loads of us is light, and is where its entry point says."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_the_entry_point_leads_to_the_plugin_and_imports_nothing_heavy():
  facts = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))
  value = facts['project']['entry-points']['vllm.general_plugins']['bam']
  module, function = value.split(':')
  heavy = {'jax', 'flax', 'torch', 'transformers', 'numpy', 'bam_jax.config', 'bam_jax.errors'}
  code = f'import sys, {module} as plugin; assert callable(plugin.{function})'
  code += f'; print({heavy} & set(sys.modules))'
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
  assert done.stdout == 'set()\n', done.stderr


def test_the_model_file_imports_no_jax():
  # Of ours it reads only what an exported folder has, whose code needs transformers alone.
  lines = (ROOT / 'bam_jax/hf/vllm_bam.py').read_text(encoding='utf-8').splitlines()
  ours = {line.split()[1] for line in lines if line.startswith('from bam_jax')}
  assert ours == {'bam_jax.hf.modeling_bam'}


def test_vllm_reads_every_field_or_refuses_other_values():
  paths = (ROOT / f'bam_jax/hf/{name}_bam.py' for name in ('vllm', 'configuration'))
  model, ours = (path.read_text(encoding='utf-8') for path in paths)
  fields = re.findall(r'^  (\w+):', ours, re.MULTILINE)
  unread = {one for one in fields if f'config.{one}' not in model and f"'{one}'" not in model}
  shared = {'rotary_dim', 'window_rope_theta', 'attention_expert_ropes', 'residual_scale'}
  assert len(fields) > 20 and unread == shared | {'capacity_factor'}  # in modeling_bam, in training

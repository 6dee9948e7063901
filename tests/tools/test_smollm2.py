"""The folder with a public model: from a small GGUF file, without a download."""

import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from tests.hf import test_gguf

ROOT = Path(__file__).parents[2]


def test_the_folder_has_what_the_file_has(tmp_path):
  file = test_gguf.write(tmp_path / 'model.gguf')
  line = [sys.executable, 'tools/smollm2.py', f'{tmp_path}/model', f'--gguf={file}']
  done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  made = load_file(tmp_path / 'model' / 'model.safetensors')
  tensors = test_gguf.tensors()
  assert made.keys() == tensors.keys()
  for name, array in tensors.items():
    np.testing.assert_array_equal(made[name], array)

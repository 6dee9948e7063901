"""transformers copies the code of a model that it trusts: to where nothing outlives the tests."""

import atexit
import os
import shutil
import tempfile

# Read when transformers is imported, hence before any test is.
os.environ['HF_MODULES_CACHE'] = tempfile.mkdtemp(prefix='bam_jax_modules_')
os.environ['HF_HUB_OFFLINE'] = '1'
atexit.register(shutil.rmtree, os.environ['HF_MODULES_CACHE'], ignore_errors=True)

"""Buckets for tests: the server, and what leads the clients of buckets to it."""

import subprocess
import sys
from pathlib import Path

SERVER = Path(__file__).with_name('server.py')


def serve(bucket: str) -> tuple[subprocess.Popen, dict[str, str]]:
  """A server with a bucket, and the variables that lead the clients of buckets to it."""
  server = subprocess.Popen([sys.executable, SERVER, bucket], stdout=subprocess.PIPE, text=True)
  url = server.stdout.readline().strip()
  return server, {
    'STORAGE_EMULATOR_HOST': url,
    'TENSORSTORE_GCS_HTTP_URL': url,
    'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'none',
    # It asks for the kind of a bucket by gRPC, which the server does not speak.
    'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',
  }

"""Stands in for `ssh` and `scp` under the real `gcloud`: an address is a worker's home.

ssh [OPTION…] USER@ADDRESS -- WORD…        scp [OPTION…] SOURCE… USER@ADDRESS:FOLDER
"""

import os
import shutil
import sys
from pathlib import Path

import cloud as clouds


def home_of_address(cloud: clouds.Cloud, address: str) -> tuple[int, Path]:
  for key, node in cloud.read()['nodes'].items():
    for worker, endpoint in enumerate(node['networkEndpoints']):
      if endpoint['ipAddress'] == address:
        if node['state'] != 'READY':
          break
        return worker, cloud.home(*key.split('/'), worker)
  print(f'ssh: connect to host {address} port 22: Connection refused', file=sys.stderr)
  sys.exit(255)


def main(program: str, words: list[str]) -> None:
  cloud = clouds.Cloud(os.environ['STAND_IN'])
  arguments = []
  while words:
    word = words.pop(0)
    if word == '--':
      arguments += words
      break
    if word in ('-i', '-o', '-p', '-P'):
      words.pop(0)
    elif not word.startswith('-'):
      arguments.append(word)
  if program == 'ssh':
    worker, home = home_of_address(cloud, arguments[0].partition('@')[2])
    os.chdir(home)
    os.execvpe(
      'bash', ['bash', '-c', ' '.join(arguments[1:])], clouds.worker_environment(home, worker)
    )
  *sources, destination = arguments
  address, _, folder = destination.partition('@')[2].partition(':')
  _, home = home_of_address(cloud, address)
  for source in sources:
    shutil.copy(source, home / folder / Path(source).name)


main(sys.argv[1], sys.argv[2:])

"""Google Cloud Storage on the loopback interface: buckets in memory, as strict as the service.

It speaks the part of the JSON API that gcsfs, google-cloud-storage and tensorstore use: objects
with generations and preconditions, listings in pages, whole, multipart and resumable uploads,
ranges, copies, and deletions in batches. An object appears whole or not at all.

    python tests/gcs/server.py BUCKET...      # prints its address, and serves until it is killed

A POST of a pattern to /hold lets nothing be written whose name it is found in, until the next POST;
GET /held counts the writers that wait.
"""

import base64
import contextlib
import email.parser
import hashlib
import itertools
import json
import re
import sys
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlsplit

PAGE = 100  # objects of a listing; the service gives 1,000
OBJECTS = re.compile(r'/storage/v1/b/([^/]+)/o')
OBJECT = re.compile(r'(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)')
COPY = re.compile(r'/storage/v1/b/([^/]+)/o/([^/]+)/(?:rewriteTo|copyTo)/b/([^/]+)/o/([^/]+)')
UPLOAD = re.compile(r'/upload/storage/v1/b/([^/]+)/o')
BUCKET = re.compile(r'/storage/v1/b/([^/]+)')


class Refused(Exception):
  """An answer that is an error: its HTTP status and a sentence."""


class Reply(NamedTuple):
  """An answer."""

  body: bytes | dict[str, Any] = b''
  status: int = 200
  headers: dict[str, str] = {}


@dataclass(frozen=True)
class Stored:
  """One generation of an object."""

  data: bytes
  generation: int
  content_type: str


class Store:
  """Buckets; every method is one change or one look, whole."""

  def __init__(self, buckets: list[str]):
    self._buckets: dict[str, dict[str, Stored]] = {name: {} for name in buckets}
    self._generations = itertools.count(1_700_000_000_000_000)
    self.session_names = (f'session-{n}' for n in itertools.count())
    self._lock = threading.Lock()
    self.sessions: dict[str, tuple[str, dict[str, str], bytearray]] = {}  # of resumable uploads
    self.pattern, self.held = '', 0

  def objects(self, bucket: str) -> dict[str, Stored]:
    """All of a bucket."""
    if bucket not in self._buckets:
      raise Refused(404, 'The specified bucket does not exist.')
    with self._lock:
      return dict(self._buckets[bucket])

  def get(self, bucket: str, name: str) -> Stored:
    """An object; Refused where there is none."""
    stored = self.objects(bucket).get(name)
    if stored is None:
      raise Refused(404, f'No such object: {bucket}/{name}')
    return stored

  def put(self, bucket: str, name: str, data: bytes, query: dict[str, str], kind: str) -> Stored:
    """Writes an object if what is there is as the query wants it."""
    self.objects(bucket)
    self._hold(name)
    with self._lock:
      _check(self._buckets[bucket].get(name), query)
      stored = Stored(data, next(self._generations), kind)
      self._buckets[bucket][name] = stored
      return stored

  def _hold(self, name: str) -> None:
    pattern = self.pattern
    if pattern and re.search(pattern, name):
      self.held += 1
      while self.pattern == pattern:
        time.sleep(0.01)
      self.held -= 1
      raise Refused(503, 'try again')  # who lives does so

  def delete(self, bucket: str, name: str, query: dict[str, str]) -> None:
    """Deletes an object if it is as the query wants it."""
    self.get(bucket, name)
    with self._lock:
      _check(self._buckets[bucket].get(name), query)
      self._buckets[bucket].pop(name, None)


def _check(stored: Stored | None, query: dict[str, str]) -> None:
  """Refused unless the preconditions of a request hold."""
  generation = stored.generation if stored else 0
  if query.get('ifGenerationMatch', str(generation)) != str(generation):
    raise Refused(412, 'At least one of the pre-conditions you specified did not hold.')
  if query.get('ifGenerationNotMatch') == str(generation):
    raise Refused(304, 'Not modified.')


class Handler(BaseHTTPRequestHandler):
  """Requests of one connection, which stays open."""

  protocol_version = 'HTTP/1.1'
  disable_nagle_algorithm = True
  store: Store

  def handle(self) -> None:
    """Serves until the other side has gone, which may be killed."""
    with contextlib.suppress(ConnectionError):
      super().handle()

  def _serve(self) -> None:
    length = int(self.headers.get('Content-Length') or 0)
    body = self._chunks() if 'chunked' in self.headers.get('Transfer-Encoding', '') else b''
    try:
      reply = self._answer(self.command, self.path, body or self.rfile.read(length), self.headers)
    except Refused as refused:
      status, sentence = refused.args
      error = {'code': status, 'message': sentence, 'errors': [{'message': sentence}]}
      reply = Reply({'error': error} if status != 304 else b'', status)
    content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
    self.send_response(reply.status)
    if isinstance(reply.body, dict):
      self.send_header('Content-Type', 'application/json; charset=UTF-8')
    for key, value in reply.headers.items():
      self.send_header(key, value)
    if reply.status not in (204, 304):
      self.send_header('Content-Length', str(len(content)))
    self.end_headers()
    if reply.status not in (204, 304):
      self.wfile.write(content)

  do_GET = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815

  def _chunks(self) -> bytes:
    data = b''
    while size := int(self.rfile.readline().split(b';')[0], 16):
      data += self.rfile.read(size)
      self.rfile.readline()
    self.rfile.readline()
    return data

  def _answer(self, method: str, url: str, body: bytes, headers: Any) -> Reply:
    path, query = urlsplit(url).path, dict(parse_qsl(urlsplit(url).query, keep_blank_values=True))

    def match(pattern: re.Pattern) -> list[str] | None:
      found = pattern.fullmatch(path)
      return found and [unquote(part) for part in found.groups()]

    if method == 'POST' and path == '/hold':
      self.store.pattern = body.decode()
      return Reply()
    if method == 'GET' and path == '/held':
      return Reply(str(self.store.held).encode())
    if method == 'POST' and path == '/batch/storage/v1':
      return self._batch(body, headers)
    if found := match(UPLOAD):
      return self._upload(*found, query, body, headers)
    if method == 'GET' and (found := match(OBJECTS)):
      return Reply(_list(self.store.objects(*found), *found, query))
    if method == 'GET' and (found := match(OBJECT)):
      return self._read(*found, query, headers)
    if method == 'DELETE' and (found := match(OBJECT)):
      self.store.delete(*found, query)
      return Reply(status=204)
    if method == 'POST' and (found := match(COPY)):
      source, target = found[:2], found[2:]
      stored = self.store.get(*source)
      stored = self.store.put(*target, stored.data, query, stored.content_type)
      return Reply({'done': True, 'resource': _resource(*target, stored)})
    if method == 'GET' and (found := match(BUCKET)):
      self.store.objects(*found)
      return Reply({'kind': 'storage#bucket', 'id': found[0], 'name': found[0]})
    raise Refused(501, f'not served: {method} {url}')

  def _read(self, bucket: str, name: str, query: dict[str, str], headers: Any) -> Reply:
    stored = self.store.get(bucket, name)
    _check(stored, query)
    if query.get('generation', str(stored.generation)) != str(stored.generation):
      raise Refused(404, f'No such object: {bucket}/{name}#{query["generation"]}')
    if query.get('alt') != 'media':
      return Reply(_resource(bucket, name, stored))
    facts = _resource(bucket, name, stored)
    about = {
      'Content-Type': stored.content_type, 'X-Goog-Generation': facts['generation'],
      'X-Goog-Metageneration': '1', 'X-Goog-Hash': f'md5={facts["md5Hash"]}',
      'X-Goog-Stored-Content-Length': facts['size'], 'ETag': facts['etag'],
    }  # fmt: skip
    whole = len(stored.data)
    asked = re.fullmatch(r'bytes=(\d*)-(\d*)', headers.get('Range') or '')
    if not asked or not any(asked.groups()):
      return Reply(stored.data, headers=about)
    first, last = asked.groups()
    if first:
      start, stop = int(first), min(int(last) + 1 if last else whole, whole)
    else:
      start, stop = max(whole - int(last), 0), whole
    if start >= whole:
      raise Refused(416, 'The requested range cannot be satisfied.')
    about['Content-Range'] = f'bytes {start}-{stop - 1}/{whole}'
    return Reply(stored.data[start:stop], 206, about)

  def _upload(self, bucket: str, query: dict[str, str], body: bytes, headers: Any) -> Reply:
    self.store.objects(bucket)
    session = query.get('upload_id')
    if session is not None:
      return self._resume(bucket, session, body, headers)
    kind = headers.get('Content-Type') or 'application/octet-stream'
    match query['uploadType']:
      case 'media':
        stored = self.store.put(bucket, query['name'], body, query, kind)
        return Reply(_resource(bucket, query['name'], stored))
      case 'multipart':
        facts, kind, data = _parts(kind, body)
        name = facts.get('name') or query['name']
        return Reply(_resource(bucket, name, self.store.put(bucket, name, data, query, kind)))
      case 'resumable':
        facts = json.loads(body) if body else {}
        query['name'] = facts.get('name') or query['name']
        session = next(self.store.session_names)
        self.store.sessions[session] = bucket, query, bytearray()
        where = f'http://{self.headers["Host"]}/upload/storage/v1/b/{quote(bucket, "")}/o'
        return Reply(headers={'Location': f'{where}?uploadType=resumable&upload_id={session}'})
    raise Refused(400, f'uploadType={query["uploadType"]}')

  def _resume(self, bucket: str, session: str, body: bytes, headers: Any) -> Reply:
    if session not in self.store.sessions:
      raise Refused(404, 'no such upload')
    _, query, data = self.store.sessions[session]
    asked = re.fullmatch(r'bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)', headers['Content-Range'])
    first, _, whole = asked.groups()
    if first is not None and int(first) != len(data):
      raise Refused(400, f'the upload is at {len(data)}')
    if whole == '*' or len(data) + len(body) < int(whole):
      if len(body) % 2**18:
        raise Refused(400, 'a part of an upload must be a multiple of 256 KiB')
      data += body
      return Reply(status=308, headers={'Range': f'bytes=0-{len(data) - 1}'} if data else {})
    name, kind = query['name'], 'application/octet-stream'
    stored = self.store.put(bucket, name, bytes(data) + body, query, kind)
    del self.store.sessions[session]
    return Reply(_resource(bucket, name, stored))

  def _batch(self, body: bytes, headers: Any) -> Reply:
    answers = []
    for part in _split(headers['Content-Type'], body):
      method, url, _ = part.get_payload().lstrip().split('\n', 1)[0].split(' ', 2)
      try:
        reply = self._answer(method, url, b'', {})
      except Refused as refused:
        reply = Reply({'error': {'code': refused.args[0]}}, refused.args[0])
      text = json.dumps(reply.body) if isinstance(reply.body, dict) else ''
      answers.append(
        f'--answers\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {reply.status} -\r\n'
        f'Content-Length: {len(text)}\r\n\r\n{text}\r\n'
      )
    content = ''.join(answers) + '--answers--\r\n'
    return Reply(content.encode(), headers={'Content-Type': 'multipart/mixed; boundary=answers'})

  def log_message(self, *_: Any) -> None:
    """Says nothing."""


def _split(content_type: str, body: bytes) -> list[Any]:
  """The parts of a multipart body."""
  head = f'Content-Type: {content_type}\n\n'.encode('latin-1')
  return email.parser.BytesParser().parsebytes(head + body).get_payload()


def _parts(content_type: str, body: bytes) -> tuple[dict[str, Any], str, bytes]:
  """The facts, the type and the bytes of a multipart upload, which may be any bytes."""
  boundary = re.search(r'boundary="?([^";]+)"?', content_type)[1].encode()
  blank = re.compile(rb'\r?\n\r?\n')
  _, _, facts = body.partition(b'--' + boundary)
  facts, _, rest = facts.partition(b'--' + boundary)
  head, data = blank.split(rest.rpartition(b'--' + boundary + b'--')[0], maxsplit=1)
  kind = re.search(rb'(?i)content-type: *([^\r\n]+)', head)
  data = data.removesuffix(b'\n').removesuffix(b'\r') if b'\r' in head else data[:-1]
  return json.loads(blank.split(facts, maxsplit=1)[1]), kind[1].decode(), data


def _list(objects: dict[str, Stored], bucket: str, query: dict[str, str]) -> dict[str, Any]:
  prefix, delimiter = query.get('prefix', ''), query.get('delimiter')
  found: dict[str, Stored | None] = {}  # None: a prefix, which ends where the delimiter does
  for name in sorted(objects):
    if not name.startswith(prefix) or name < query.get('startOffset', ''):
      continue
    if 'endOffset' in query and name >= query['endOffset']:
      continue
    inner, cut, _ = name.removeprefix(prefix).partition(delimiter) if delimiter else ('', '', '')
    if cut:
      found[prefix + inner + cut] = None
    else:
      found[name] = objects[name]
  names = [name for name in found if name > query.get('pageToken', '')]
  page = names[: min(int(query.get('maxResults', PAGE)), PAGE)]
  answer = {
    'kind': 'storage#objects',
    'items': [_resource(bucket, name, found[name]) for name in page if found[name]],
    'prefixes': [name for name in page if not found[name]],
  }
  return answer | ({'nextPageToken': page[-1]} if len(page) < len(names) else {})


def _resource(bucket: str, name: str, stored: Stored) -> dict[str, Any]:
  return {
    'kind': 'storage#object', 'id': f'{bucket}/{name}/{stored.generation}', 'bucket': bucket,
    'name': name, 'size': str(len(stored.data)), 'generation': str(stored.generation),
    'metageneration': '1', 'contentType': stored.content_type, 'storageClass': 'STANDARD',
    'etag': f'etag-{stored.generation}', 'timeCreated': '2026-11-24T10:00:00.000000Z',
    'md5Hash': base64.b64encode(hashlib.md5(stored.data).digest()).decode(),
    'updated': '2026-11-24T10:00:00.000000Z',
  }  # fmt: skip


def main() -> None:
  """Serves the buckets that the arguments name."""
  handler = type('Handler', (Handler,), {'store': Store(sys.argv[1:])})
  server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
  print(f'http://127.0.0.1:{server.server_port}', flush=True)
  server.serve_forever()


if __name__ == '__main__':
  main()

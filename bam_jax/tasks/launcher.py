"""Limits a process and runs a program in it; `sandbox` starts it.

    python -I -S -B launcher.py CPU_SECONDS MEMORY_BYTES FILE_BYTES STATUS PROGRAM

STATUS is the exit status when the program has run to its end.

Imports nothing of bam_jax, so that it starts in milliseconds.
"""

import ctypes
import os
import platform
import resource
import struct
import sys

# The architecture's number, and the system calls that fail with EPERM: those that start processes
# and threads, open sockets, reach other processes, or leave the process group or the limits.
CALLS = {
  # clone fork vfork clone3, socket socketpair io_uring_setup, kill tkill tgkill ptrace
  # rt_sigqueueinfo rt_tgsigqueueinfo pidfd_send_signal process_vm_writev, setsid setpgid,
  # prlimit64 setrlimit
  'x86_64': (
    0xC000003E,
    (56, 57, 58, 435, 41, 53, 425, 62, 200, 234, 101, 129, 297, 424, 311, 112, 109, 302, 160),
  ),
  'aarch64': (  # which has no fork and no vfork
    0xC00000B7,
    (220, 435, 198, 199, 425, 129, 130, 131, 117, 138, 240, 424, 271, 157, 154, 261, 164),
  ),
}


def limit(cpu_seconds: int, memory_bytes: int, file_bytes: int) -> None:
  """Limits this process for good; OSError when that is not possible."""
  for name, soft, hard in (
    (resource.RLIMIT_CPU, cpu_seconds, cpu_seconds + 1),
    (resource.RLIMIT_AS, memory_bytes, memory_bytes),
    (resource.RLIMIT_FSIZE, file_bytes, file_bytes),
    (resource.RLIMIT_CORE, 0, 0),
    (resource.RLIMIT_NPROC, 0, 0),  # has no effect for root; the filter of system calls has
  ):
    resource.setrlimit(name, (soft, hard))
  refuse_calls()


def refuse_calls() -> None:
  """Installs a seccomp filter that makes the kernel refuse CALLS.

  The filter is an array of struct sock_filter (code, jump if true, jump if false, operand), see
  linux/filter.h; offsets 4 and 0 of struct seccomp_data are the architecture and the call.
  """
  if sys.platform != 'linux' or platform.machine() not in CALLS:
    raise OSError(f'no filter of system calls for {sys.platform} {platform.machine()}')
  architecture, calls = CALLS[platform.machine()]
  load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
  allow, kill, refuse = 0x7FFF0000, 0x80000000, 0x00050001  # refuse: with EPERM
  steps = [(load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, kill), (load, 0, 0, 0)]
  steps += [(at_least, 0, 1, 0x40000000), (answer, 0, 0, kill)]  # the x32 ABI of x86-64
  for call in calls:
    steps += [(equal, 0, 1, call), (answer, 0, 0, refuse)]
  steps += [(answer, 0, 0, allow)]
  code = ctypes.create_string_buffer(b''.join(struct.pack('HBBI', *step) for step in steps))
  filters = ctypes.create_string_buffer(struct.pack('HL', len(steps), ctypes.addressof(code)))
  set_no_new_privileges, set_seccomp, mode_filter = 38, 22, 2
  prctl = ctypes.CDLL(None, use_errno=True).prctl
  zero, one = ctypes.c_ulong(0), ctypes.c_ulong(1)
  if prctl(set_no_new_privileges, one, zero, zero, zero) or prctl(
    set_seccomp, ctypes.c_ulong(mode_filter), filters, zero, zero
  ):
    raise OSError(ctypes.get_errno(), 'the kernel refuses a filter of system calls')


def main() -> None:
  """Runs the program of the command line; what it needs to know is in no global of this module."""
  *limits, passed, path = sys.argv[1:]
  with open(path, encoding='utf-8', errors='surrogatepass') as file:
    program = file.read()
  os.unlink(path)
  sys.argv[1:] = []
  try:
    limit(*map(int, limits))
  except OSError as error:
    sys.exit(f'limits: {error}')
  exec(compile(program, 'program.py', 'exec'), {'__name__': '__main__'})
  os._exit(int(passed))


if __name__ == '__main__':
  main()

"""Which system calls a program in the sandbox may make: memory of its own, reading files, clocks, and no more.

A list of what is allowed, so that a call that a later kernel brings is refused too. What is not listed answers ENOSYS,
as on a kernel without it, and libraries then do without. Above all there is no fork, clone or vfork: one process has
one address space, and a fork bomb stops at its first step, whoever the kernel takes the program's owner for
(RLIMIT_NPROC does not bind root). Nor are there sockets, namespaces, mounts, tracing, new files, or shared memory and
files in memory, whose pages no limit of an address space counts.

Files can be read, and not locked or leased: a lease on a library would keep the machine's own programs from writing it.

The filter is a program of the kernel's classic BPF (linux/filter.h, linux/seccomp.h).
"""

import errno
import platform
import struct

# Numbers on x86-64 (asm/unistd_64.h) and on 64-bit ARM (asm-generic/unistd.h, which has not all of them).
ALLOWED = {
  "read": (0, 63), "write": (1, 64), "open": (2, None), "close": (3, 57), "stat": (4, None), "fstat": (5, 80),
  "lstat": (6, None), "poll": (7, None), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215),
  "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
  "pread64": (17, 67), "pwrite64": (18, 68), "readv": (19, 65), "writev": (20, 66), "access": (21, None),
  "select": (23, None), "sched_yield": (24, 124), "mremap": (25, 216), "madvise": (28, 233), "dup": (32, 23),
  "dup2": (33, None), "nanosleep": (35, 101), "alarm": (37, None), "getitimer": (36, 102), "setitimer": (38, 103),
  "getpid": (39, 172), "exit": (60, 93), "uname": (63, 160), "fcntl": (72, 25), "getcwd": (79, 17), "chdir": (80, 49),
  "fchdir": (81, 50), "readlink": (89, None), "umask": (95, 166), "gettimeofday": (96, 169), "getrlimit": (97, 163),
  "getrusage": (98, 165), "times": (100, 153), "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175),
  "getegid": (108, 177), "getppid": (110, 173), "getpgrp": (111, None), "getsid": (124, 156), "getresuid": (118, 148),
  "getresgid": (120, 150), "sigaltstack": (131, 132), "arch_prctl": (158, None), "gettid": (186, 178),
  "time": (201, None), "futex": (202, 98), "sched_getaffinity": (204, 123), "getdents64": (217, 61),
  "set_tid_address": (218, 96), "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115),
  "exit_group": (231, 94), "tgkill": (234, 131), "openat": (257, 56), "newfstatat": (262, 79), "readlinkat": (267, 78),
  "faccessat": (269, 48), "pselect6": (270, 72), "ppoll": (271, 73), "set_robust_list": (273, 99), "dup3": (292, 24),
  "prlimit64": (302, 261), "getrandom": (318, 278), "execve": (59, 221), "statx": (332, 291), "rseq": (334, 293),
  "faccessat2": (439, 439), "close_range": (436, 436), "restart_syscall": (219, 128),
}  # fmt: skip
# Of fcntl only what has to do with descriptors: F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC.
FCNTL = (0, 1, 2, 3, 4, 1030)
_COLUMN = {"x86_64": 0, "aarch64": 1}
_AUDIT_ARCH = (0xC000003E, 0xC00000B7)  # linux/audit.h

_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF_LD|BPF_W|BPF_ABS, BPF_JMP|BPF_JEQ|BPF_K, BPF_RET|BPF_K
_NUMBER, _ARCH, _SECOND = 0, 4, 24  # offsets in struct seccomp_data; of the second argument the low half
_KILL, _ALLOW, _ERRNO = 0x80000000, 0x7FFF0000, 0x00050000  # SECCOMP_RET_KILL_PROCESS, _ALLOW, _ERRNO


def knows(machine: str | None = None) -> bool:
  """Returns whether there is a filter for this kind of processor."""
  return (machine or platform.machine()) in _COLUMN


def program(machine: str | None = None) -> bytes:
  """Returns the filter as an array of struct sock_filter.

  Args:
    machine: x86_64 or aarch64; by default this one's.
  """
  column = _COLUMN[machine or platform.machine()]
  numbers = sorted(row[column] for name, row in ALLOWED.items() if name != "fcntl" and row[column] is not None)
  # The numbers of another architecture's calls mean other things: it ends the program.
  begin = [(_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, _AUDIT_ARCH[column]), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _NUMBER)]
  refuse = (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)
  end = [refuse, (_LOAD, 0, 0, _SECOND), *((_EQUAL, len(FCNTL) - place, 0, cmd) for place, cmd in enumerate(FCNTL))]
  end += [refuse, (_RETURN, 0, 0, _ALLOW)]
  # A jump is over so many steps: to the last one, or, for fcntl, to the second one of the end.
  calls = [(_EQUAL, len(numbers) + 1, 0, ALLOWED["fcntl"][column])]
  calls += [(_EQUAL, len(numbers) - place + len(end) - 2, 0, number) for place, number in enumerate(numbers)]
  return b"".join(struct.pack("<HBBI", *step) for step in [*begin, *calls, *end])

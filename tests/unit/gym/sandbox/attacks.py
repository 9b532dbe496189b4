"""Programs that want out of the sandbox, as data.

``ATTEMPTS`` end without an exception exactly where something got out; each sees what ``PRELUDE``
defines. ``SIEGES`` use things up, or leave things behind: each names the outcomes that are right.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_k2.gym.sandbox.base import Limits

MARK = b"GOT OUT"
PRELUDE = """
import ctypes, fcntl, json, mmap, os, platform, resource, signal, socket, struct, subprocess, sys
import threading, time
TARGET = json.loads(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
column = ("x86_64", "aarch64").index(platform.machine())
def call(numbers, *arguments):
    if numbers[column] is None:
        raise OSError("not on this machine")
    result = libc.syscall(ctypes.c_long(numbers[column]), *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return result
def connect(family, address, kind=socket.SOCK_STREAM, protocol=0):
    with socket.socket(family, kind, protocol) as one:
        one.settimeout(1)
        one.connect(address)
def must(condition):
    if not condition:
        raise OSError("not reached")
def is_open(number):
    try:
        os.fstat(number)
    except OSError:
        return False
    return True
new = lambda number: (number, number)
secret, canary, host = TARGET["secret"], TARGET["canary"], TARGET["pid"]
"""

ATTEMPTS: dict[str, str] = {
    # first, before others open something
    "inherited files": "must(any(is_open(n) for n in range(3, 1024)))",
    # network
    "tcp to the host": "connect(socket.AF_INET, ('127.0.0.1', TARGET['port']))",
    "tcp to the internet": "connect(socket.AF_INET, ('1.1.1.1', 53))",
    "tcp over IPv6": "connect(socket.AF_INET6, ('::1', TARGET['port']))",
    "udp": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))",
    "dns": "socket.getaddrinfo('example.com', 80)",
    "raw socket": "socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)",
    "ping socket": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)",
    "packet socket": "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)",
    "vsock": "socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)",
    "kernel crypto socket": "socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)",
    "multipath tcp": "connect(socket.AF_INET, ('127.0.0.1', TARGET['port']), protocol=262)",
    "sctp": "socket.socket(socket.AF_INET, socket.SOCK_STREAM, 132)",
    "listen": "socket.create_server(('0.0.0.0', 0))",
    "abstract unix socket": "connect(socket.AF_UNIX, chr(0) + TARGET['abstract'])",
    "unix socket by path": "connect(socket.AF_UNIX, TARGET['socket'])",
    "interface names": "must(len(socket.if_nameindex()) > 1)",
    # files
    "read a secret": "open(secret).read()",
    "read a secret by link": "os.symlink(secret, 'link'); open('link').read()",
    "read a secret by hard link": "os.link(secret, 'hard'); open('hard').read()",
    "read a secret by rename": "os.rename(secret, 'moved'); open('moved').read()",
    "read a secret by dot-dot": "open('../' * 20 + secret[1:]).read()",
    "list the secret's folder": "must(os.listdir(os.path.dirname(secret)))",
    "read /etc/shadow": "open('/etc/shadow').read()",
    "read ssh keys": "must(os.listdir(os.path.expanduser('~root/.ssh')))",
    "read the home folder": "must(set(os.listdir(TARGET['home'])) - {TARGET['way']})",
    "overwrite": "open(canary, 'w').write('x')",
    "append": "open(canary, 'a').write('x')",
    "truncate": "os.truncate(canary, 0)",
    "delete": "os.unlink(canary)",
    "rename over": "open('x', 'w').close(); os.rename('x', canary)",
    "change the mode": "os.chmod(canary, 0o777)",
    "change the owner": "os.chown(canary, 12345, 12345)",
    "change the times": "os.utime(canary, (1, 1))",
    "set an attribute": "os.setxattr(canary, 'user.x', b'x')",
    "write beside the box": "open('../x', 'w').write('x')",
    "write to /tmp": "open('/tmp/k2-attack', 'w').write('x')",
    "write to /var/tmp": "open('/var/tmp/k2-attack', 'w').write('x')",
    "write to /usr": "open('/usr/k2-attack', 'w').write('x')",
    "change the interpreter": "open(os.path.realpath(sys.executable), 'r+b').write(b'')",
    "change the library": "open(json.__file__, 'a').write('x')",
    "leave shared memory": "open('/dev/shm/k2-attack', 'w').write('x')",
    "make a device": "os.mknod('disk', 0o60600, os.makedev(8, 0)); open('disk', 'rb').read(1)",
    "read /dev/mem": "open('/dev/mem', 'rb').read(1)",
    "read /dev/kmsg": "open('/dev/kmsg', 'rb').read(1)",
    "read the disk": "open(TARGET['disk'], 'rb').read(1)",
    "write to a terminal": "open('/dev/tty', 'w').write('x')",
    "open by handle": "call((303, 264), -100, b'/', ctypes.create_string_buffer(256), "
    "ctypes.byref(ctypes.c_int()), 0)",
    # other views
    "chroot": "os.chroot('.')",
    "mount": "must(libc.mount(b'none', b'.', b'tmpfs', 0, None) == 0)",
    "unmount": "must(libc.umount2(b'/proc', 2) == 0)",
    "new mount api": "call(new(430), b'tmpfs', 0)",
    "copy a mount": "call(new(428), -100, b'/', 1)",
    "change a mount": "call(new(442), -100, b'/', 0x8000, struct.pack('=QQQQ', 0, 1, 0, 0), 32)",
    "user namespace": "os.unshare(os.CLONE_NEWUSER)",
    "network namespace": "os.unshare(os.CLONE_NEWNET)",
    "user namespace by clone": "call((56, 220), 0x10000000 | 17, 0, 0, 0, 0) or os._exit(0)",
    "user namespace by clone3": "call(new(435), struct.pack('=QQQQQQQQ', 0x10000000, 0, 0, 0, 17, "
    "0, 0, 0), 64) or os._exit(0)",
    "join a namespace": "os.setns(os.open('/proc/1/ns/mnt', os.O_RDONLY))",
    # other processes
    "see the host": "os.kill(host, 0)",
    "signal the host": "os.kill(host, signal.SIGCONT)",
    "signal by pidfd": "signal.pidfd_send_signal(os.pidfd_open(host), signal.SIGCONT)",
    "trace the host": "must(libc.ptrace(16, host, 0, 0) == 0)",
    "trace the parent": "must(libc.ptrace(16, os.getppid(), 0, 0) == 0)",
    "read the host's memory": "call((310, 270), host, ctypes.create_string_buffer(16), 1, "
    "ctypes.create_string_buffer(16), 1, 0)",
    "take the host's files": "call(new(438), os.pidfd_open(host), 0, 0)",
    "the host's environment": "must(open(f'/proc/{host}/environ', 'rb').read())",
    "the parent's environment": "must(open(f'/proc/{os.getppid()}/environ', 'rb').read())",
    "the parent's memory": "open(f'/proc/{os.getppid()}/mem', 'r+b')",
    "the parent's files": "must(os.listdir(f'/proc/{os.getppid()}/fd'))",
    "the parent's root": "must(os.listdir(f'/proc/{os.getppid()}/root/'))",
    "limit the host": "resource.prlimit(host, resource.RLIMIT_NOFILE, (64, 64))",
    "limit the parent": "resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (0, 0))",
    "slow the host down": "os.setpriority(os.PRIO_PROCESS, host, 19)",
    "slow the user down": "os.setpriority(os.PRIO_USER, os.getuid(), 19)",
    "pin the host": "os.sched_setaffinity(host, {0})",
    "inherited environment": "must(TARGET['variable'] in os.environ)",
    "stray environment": "must(set(os.environ) - {'PATH', 'HOME', 'TMPDIR', 'LC_CTYPE', 'PWD'})",
    # privileges
    "capabilities": "header, data = struct.pack('=Ii', 0x20080522, 0), "
    "ctypes.create_string_buffer(24); call((125, 90), header, data); must(any(data.raw))",
    "privileges by exec": "must(libc.prctl(39, 0, 0, 0, 0) == 0)",
    "raise a limit": "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1] + 1; "
    "resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))",
    "be more important": "os.nice(-10)",
    "real time": "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))",
    "become unmeasurable": "must(libc.prctl(4, 0, 0, 0, 0) == 0)",
    # the machine
    "host name": "socket.sethostname('attacked')",
    "clock": "time.clock_settime(time.CLOCK_REALTIME, time.time() + 1)",
    "adjust the clock": "call((159, 171), ctypes.create_string_buffer(208))",
    "reboot": "call((169, 142), 0xfee1dead, 672274793, 0, 0)",
    "kernel module": "call((175, 105), b'x', 1, b'')",
    "another kernel": "call((246, 104), 0, 0, 0, 0)",
    "swap": "must(libc.swapon(b'x', 0) == 0)",
    "sysrq": "open('/proc/sysrq-trigger', 'w').write('h')",
    "core pattern": "open('/proc/sys/kernel/core_pattern', 'w').write('x')",
    "kernel settings": "must(os.listdir('/proc/sys/kernel'))",
    "control groups": "must(os.listdir('/sys/fs/cgroup'))",
    "kernel log": "call((103, 116), 10, 0, 0)",
    "io ports": "call((172, None), 3)",
    # kernel interfaces
    "bpf": "call((321, 280), 0, struct.pack('=IIIII', 2, 4, 8, 1, 0) + bytes(64), 72)",
    "perf": "call((298, 241), struct.pack('=II', 1, 112) + bytes(104), 0, -1, -1, 0)",
    "userfaultfd": "call((323, 282), 1)",
    "io_uring": "call(new(425), 4, bytes(120))",
    "keyring": "call((248, 217), b'user', b'k2', b'x', 1, -3)",
    "fanotify": "call((300, 262), 0, 0)",
    "personality": "call((135, 92), 0x0040000)",
    "memory files": "os.memfd_create('x')",
    "secret memory": "call(new(447), 0)",
    "System V memory": "call((29, 194), 1, 4096, 0o1600)",
    "System V semaphores": "call((64, 190), 1, 1, 0o1600)",
    "message queue": "call((240, 180), b'k2', 0o102, 0o600, 0)",
    "uncounted fork": "call((57, None)) or os._exit(0)",
}


@dataclass(frozen=True)
class Siege:
    """A program that uses things up or leaves things behind.

    Attributes:
        code: after ``PRELUDE``.
        outcomes: those that are right.
        limits: that it runs under.
        keep: what it asks to be kept; nothing of it may come back.
        quick: part of `make test`.
    """

    code: str
    outcomes: tuple[str, ...]
    limits: Limits = Limits(wall_s=20.0, cpu_s=3.0)  # noqa: RUF009  # frozen
    keep: tuple[str, ...] = ()
    quick: bool = False


SHORT = Limits(wall_s=1.0, cpu_s=0.5)
SMALL = Limits(wall_s=30.0, cpu_s=10.0, memory_bytes=128 << 20, disk_bytes=16 << 20)
ANY = ("exited", "timeout", "memory", "killed")
SIEGES: dict[str, Siege] = {
    # processes
    "fork bomb": Siege("while True:\n try: os.fork()\n except OSError: pass", ANY, SHORT, (), True),
    "fork bomb without libc": Siege(
        "while True:\n try: call((57, None))\n except OSError: os.getpid()", ANY, SHORT
    ),
    "thread bomb": Siege(
        "threading.stack_size(65536)\n"
        "while True:\n try: threading.Thread(target=time.sleep, args=(9,)).start()\n"
        " except (RuntimeError, MemoryError): pass",
        ANY,
        SHORT,
    ),
    "busy children": Siege(
        "for _ in range(20):\n if os.fork() == 0:\n  while True: pass\nos.wait()", ("timeout",)
    ),
    "daemon left behind": Siege(
        "if os.fork() == 0:\n os.setsid()\n if os.fork() == 0:\n  time.sleep(600)\n os._exit(0)",
        ("exited",),
        quick=True,
    ),
    "child holds the output": Siege(
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])", ("exited",)
    ),
    "zombies": Siege(
        "for _ in range(500):\n try:\n  if os.fork() == 0: os._exit(0)\n except OSError: pass", ANY
    ),
    "endless exec": Siege("os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])", ANY),
    "signals ignored": Siege(
        "for n in range(1, 65):\n try: signal.signal(n, signal.SIG_IGN)\n"
        " except (OSError, ValueError): pass\nwhile True: time.sleep(1)",
        ("timeout",),
        SHORT,
    ),
    "kill everybody": Siege("os.kill(-1, signal.SIGKILL); time.sleep(1)", ANY),
    "kill the parent": Siege("os.kill(os.getppid(), signal.SIGKILL); time.sleep(1)", ANY),
    "stop the parent": Siege("os.kill(os.getppid(), signal.SIGSTOP); time.sleep(1)", ANY),
    "stop itself": Siege("os.kill(os.getpid(), signal.SIGSTOP)", ("timeout",), SHORT),
    "kill its group": Siege("os.killpg(0, signal.SIGKILL)", ("killed", "exited")),
    "core dump": Siege("os.abort()", ("killed", "exited"), keep=("core",)),
    # time
    "sleep": Siege("time.sleep(600)", ("timeout",), SHORT, quick=True),
    "loop": Siege("while True: pass", ("timeout",), SHORT),
    "closed streams": Siege("os.closerange(0, 3); time.sleep(600)", ("timeout",), SHORT),
    # memory
    "memory": Siege("x = bytearray(1 << 30)", ("exited", "memory", "killed"), SMALL, (), True),
    "memory of children": Siege(
        "for _ in range(8):\n if os.fork() == 0:\n  x = bytearray(60 << 20); time.sleep(20)\n"
        "time.sleep(20)",
        ("memory",),
        SMALL,
    ),
    "shared memory": Siege(
        "x = mmap.mmap(-1, 1 << 30)\nfor i in range(0, 1 << 30, 4096): x[i] = 1",
        ("exited", "memory", "killed"),
        SMALL,
    ),
    "memory in pipes": Siege(
        "held = []\nwhile True:\n r, w = os.pipe(); os.set_blocking(w, False); held += [r, w]\n"
        " os.write(w, bytes(65536))",
        ANY,
        SMALL,
    ),
    "memory in page tables": Siege(
        "x = mmap.mmap(-1, 1 << 38, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ)\n"
        "x.madvise(mmap.MADV_NOHUGEPAGE)\n"
        "for i in range(0, 1 << 38, 1 << 21): x[i]\n"
        "time.sleep(9); print('GOT OUT')",
        ("memory",),
        SMALL,
        quick=True,
    ),
    "deep recursion": Siege("sys.setrecursionlimit(1 << 30)\ndef f(): return f()\nf()", ANY, SMALL),
    # disk
    "disk": Siege(
        "with open('x', 'wb') as f:\n while True: f.write(bytes(1 << 20))", ANY, SMALL, (), True
    ),
    "many files": Siege(
        "n = 0\nwhile True:\n n += 1\n with open(f'x{n}', 'wb') as f: f.write(bytes(1 << 20))",
        ANY,
        SMALL,
    ),
    "empty files": Siege("n = 0\nwhile True:\n n += 1\n open(f'x{n}', 'w').close()", ANY, SMALL),
    "deleted files": Siege(
        "held = []\nwhile True:\n held.append(open('x', 'wb', 0)); os.unlink('x')\n"
        " held[-1].write(bytes(1 << 20))",
        ANY,
        SMALL,
    ),
    "hidden files": Siege(
        "os.mkdir('d', 0o300)\nn = 0\nwhile True:\n n += 1\n"
        " with open(f'd/x{n}', 'wb') as f: f.write(bytes(1 << 20))",
        ANY,
        SMALL,
    ),
    "deep folders": Siege(
        "for _ in range(3000):\n os.mkdir('d' * 100); os.chdir('d' * 100)", ANY, SMALL
    ),
    "sparse file": Siege("os.truncate(os.open('x', 65, 0o600), 1 << 40)", ANY, SMALL, ("x",)),
    # output
    "output": Siege("while True: print('x' * 1000)", ("output",), quick=True),
    "errors": Siege("while True: os.write(2, bytes(65536))", ("output",)),
    "kept link": Siege("os.symlink(secret, 'x')", ("exited",), keep=("x",)),
    "kept link to a folder": Siege(
        "os.symlink(os.path.dirname(secret), 'x')", ("exited",), keep=("x/secret",)
    ),
    "kept pipe": Siege("os.mkfifo('x')", ("exited",), keep=("x",)),
    "kept folder": Siege("os.mkdir('x')", ("exited",), keep=("x",)),
    # other ABIs of the kernel
    "x32 system call": Siege(
        "call((0x40000000 | 39, None)); print('GOT OUT')", ("killed", "exited")
    ),
    "32-bit system call": Siege(
        "must(column == 0)\ncode = mmap.mmap(-1, 4096, prot=7)\n"
        "code.write(bytes.fromhex('b814000000cd80c3'))\n"
        "f = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))\n"
        "if f() > 0: print('GOT OUT')",
        ("killed", "exited"),
    ),
}

"""Forks keepers: a small process that has imported all that they need, which takes longest.

It gets the descriptors of each run (a socket, and the program's input and output where the host
speaks with it), forks, and the fork is the keeper of that run. It ends when the host closes its
socket, or dies; keepers have sockets of their own and do not need it.
"""

from __future__ import annotations

import gc
import os
import signal
import socket

from megatron_k2.gym.sandbox.keeper import launch
from megatron_k2.gym.sandbox.keeper.main import main


def serve(descriptor: int, sandlock: str) -> None:
    """Fork a keeper for each descriptor that comes.

    Args:
        descriptor: of the socket to the host.
        sandlock: the folder of packages that has it; empty: not needed.
    """
    host = socket.socket(fileno=descriptor)
    host.set_inheritable(False)
    if sandlock:
        launch.sandlock_from(sandlock)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps keepers
    gc.freeze()
    while True:
        data, descriptors, _, _ = socket.recv_fds(host, 1, 3)
        if not data:
            os._exit(0)
        try:
            child = os.fork()
        except OSError:  # the host sees the socket of the run close
            child = -1
        if child == 0:
            host.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            main(*descriptors)
        for one in descriptors:
            os.close(one)

"""System calls that no program in the sandbox needs: numbers by name, and why each is refused.

From Linux's asm/unistd_64.h and asm-generic/unistd.h (6.x): (x86_64, aarch64); None: not there.
"""

from __future__ import annotations

Numbers = dict[str, tuple[int | None, int | None]]

UNCOUNTED: Numbers = {  # processes and memory that no limit of ours would count
    "fork": (57, None),  # glibc's fork() is clone; sandlock counts that one
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "mq_open": (240, 180),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "semget": (64, 190),
    "msgget": (68, 186),
}
KERNEL: Numbers = {  # interfaces with a history of holes
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "modify_ldt": (154, None),
    "uselib": (134, None),
    "personality": (135, 92),
    "lookup_dcookie": (212, 18),
    "nfsservctl": (180, 42),
    "fanotify_init": (300, 262),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "mbind": (237, 235),
    "set_mempolicy": (238, 237),
    "syslog": (103, 116),
    "vhangup": (153, 58),
    "kcmp": (312, 272),
}
MACHINE: Numbers = {  # what belongs to the whole machine
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "ioperm": (173, None),
    "iopl": (172, None),
}
SCHEDULING: Numbers = {  # of other processes of our user too; Landlock does not ask
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274),
}
VIEW: Numbers = {  # another view of the file system or of the system
    "mount": (165, 40),
    "umount2": (166, 39),
    "move_mount": (429, 429),
    "open_tree": (428, 428),
    "open_tree_attr": (467, 467),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
}
OTHERS: Numbers = {  # into other processes; sandlock's own supervisor needs them, its child not
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "pidfd_getfd": (438, 438),
}
REFUSED: Numbers = UNCOUNTED | KERNEL | MACHINE | SCHEDULING | VIEW | OTHERS
# Landlock does not ask about these: where no mount namespace makes the rest read-only, a program
# could otherwise change modes, owners and times of our user's files.
METADATA = (
    *("chmod", "fchmod", "fchmodat", "fchmodat2", "chown", "fchown", "lchown", "fchownat"),
    *("utime", "utimes", "futimesat", "utimensat", "setxattr", "lsetxattr", "fsetxattr"),
    *("removexattr", "lremovexattr", "fremovexattr", "setxattrat", "removexattrat"),
)
# Looked at more closely: see seccomp.py.
ARGUMENTS: Numbers = {
    "clone": (56, 220),
    "clone3": (435, 435),
    "socket": (41, 198),
    "prctl": (157, 167),
    "prlimit64": (302, 261),
    "sched_setaffinity": (203, 122),
}

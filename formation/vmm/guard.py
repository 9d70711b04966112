"""A VM's guard: the parent of its hypervisor process, which ends it when the lease is over, whatever became of the node.

A placement is a lease, and another node may start the VM when it is over. The node that holds it ends the VM before that,
but a node process may be killed, hang or be stopped while its VMs go on; so each VM has a guard that needs nobody.

Theory of operation. The guard is a program of its own, without the rest of Formation: it forks, the child asks the kernel
to be killed with its parent (prctl(2), PR_SET_PDEATHSIG) and becomes the hypervisor; the parent waits for its end and for
the deadline in the file `lease` of its working directory, the VM's folder. The node moves the deadline by replacing the
file. So whoever kills the guard kills the VM, and a guard that lives keeps the lease's end. Deadlines are nanoseconds of
CLOCK_BOOTTIME, which goes on while the host sleeps, and which nobody can set: a host that wakes up too late ends its VMs
within POLL_S. A file that is not there at the start means no lease; one that goes away later, or holds something else, has
ended. The guard ends as the hypervisor did, with its status or by its signal.

    python -I -S guard.py PID_FD PROGRAM [ARGUMENT …]

It writes the hypervisor's process id to PID_FD, a line, once it is safe to be found: the child waits for that.
Not covered: a guard that is stopped (SIGSTOP) by somebody on the machine.
"""

import ctypes
import os
import select
import signal
import sys
import time

LEASE_FILE = "lease"
# Between looks at the clock, for a sleep of the host is not seen by poll(2): a quarter of what a VM has to be gone.
POLL_S = 0.125
_PR_SET_PDEATHSIG = 1
_FAILED_STATUS = 127


def deadline_ns() -> int:
    """When the lease ends; 0: it has."""
    try:
        with open(LEASE_FILE, "rb") as file:
            return int(file.read(32))
    except (OSError, ValueError):
        return 0


def main() -> None:
    """See above."""
    pid_fd, argv = int(sys.argv[1]), sys.argv[2:]
    libc = ctypes.CDLL(None, use_errno=True)
    guard_pid = os.getpid()
    held_fd, go_fd = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            # Set by the child: it holds for it and what it becomes. If the guard ended before, its pipe says so.
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            os.close(go_fd)
            if os.read(held_fd, 1) != b"+" or os.getppid() != guard_pid:
                os._exit(_FAILED_STATUS)
            os.closerange(3, max(held_fd, pid_fd) + 1)
            os.execvp(argv[0], argv)
        except OSError as exc:
            os.write(2, f"{argv[0]}: {exc.strerror}\n".encode())
        finally:
            os._exit(_FAILED_STATUS)
    os.close(held_fd)
    pidfd = os.pidfd_open(child)
    # A session's or a terminal's signals are for the hypervisor's own to handle; the guard ends with it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.write(pid_fd, b"%d\n" % child)
    os.close(pid_fd)
    os.write(go_fd, b"+")
    os.close(go_fd)
    # What the hypervisor says goes to its own end of the pipe only.
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    ended = select.poll()
    ended.register(pidfd, select.POLLIN)
    while not ended.poll(POLL_S * 1000):
        if time.clock_gettime_ns(time.CLOCK_BOOTTIME) >= deadline_ns():
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            break
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        if os.WTERMSIG(status) != signal.SIGKILL:
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(guard_pid, os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


if __name__ == "__main__":
    main()

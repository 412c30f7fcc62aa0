"""Virtual nodes and the daemons: how each is started.

An isolated node is a process, host name and mount namespace: its jobs see its own ``hostname``, node names resolve, and SIGKILL of
its process 1 takes slurmd, job steps and every task at once, as a power cut would.
"""

from __future__ import annotations

import os
import select
import subprocess
from pathlib import Path

from megamem.testing.slurm_cluster.packages import program, search_path
from megamem.testing.slurm_cluster.processes import INIT, PAUSE, find

# Process 1 has to reap orphans, which a shell does while it waits.
_INIT_SCRIPT = f"""
hostname "$1" && mount --bind "$2" /etc/hosts && echo ready || exit 1
exec 1>&-
while :; do {" ".join(PAUSE)} & wait; done
"""
_START_SECONDS = 10.0


def environment(directory: Path, node: str | None = None) -> dict[str, str]:
    """What a daemon starts with; ``node`` for those of a node."""
    values = {"PATH": search_path(), "SLURM_CONF": f"{directory}/etc/slurm.conf", "HOME": os.environ.get("HOME", "/")}
    return values if node is None else values | {"SLURMD_NODENAME": node}


def start_munged(directory: Path) -> subprocess.Popen[bytes]:
    """Authentication of this cluster alone."""
    run = directory / "run"
    command = [program("munged"), "--foreground", "--force", f"--key-file={directory}/etc/munge.key"]
    command += [f"--socket={run}/munge.socket", f"--pid-file={run}/munged.pid", f"--seed-file={run}/munged.seed"]
    return _spawn([*command, f"--log-file={directory}/log/munged.log"], directory, "munged", environment(directory))


def start_slurmctld(directory: Path) -> subprocess.Popen[bytes]:
    """The controller; it reads its state of before, if there is one."""
    return _spawn([program("slurmctld"), "-D"], directory, "slurmctld", environment(directory))


def start_slurmd(directory: Path, node: str, init: int | None) -> subprocess.Popen[bytes]:
    """The daemon of a node, in the namespaces of process ``init`` where the node has some."""
    command = [program("slurmd"), "-D", "-N", node]
    if init is not None:
        user = [] if os.getuid() == 0 else ["--user", "--preserve-credentials"]
        enter = ["nsenter", f"--target={init}", *user, "--pid", "--uts", "--mount"]
        command = [*enter, *command]
    return _spawn(command, directory, f"slurmd-{node}", environment(directory, node))


def start_init(directory: Path, node: str) -> subprocess.Popen[bytes]:
    """The namespaces of a node. OSError where this user or kernel allows none."""
    user = [] if os.getuid() == 0 else ["--user", "--map-current-user", "--keep-caps"]
    command = ["unshare", *user, "--pid", "--uts", "--mount", "--fork", "--mount-proc", "--kill-child=KILL", "--"]
    command += ["sh", "-c", _INIT_SCRIPT, "sh", node, f"{directory}/etc/hosts", INIT]
    with (directory / "log" / f"init-{node}.out").open("ab") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment(directory, node),
            cwd="/",
            start_new_session=True,
        )
    assert process.stdout is not None
    with process.stdout as output:
        ready, _, _ = select.select([output], [], [], _START_SECONDS)
        line = os.read(output.fileno(), 100) if ready else b""
    if line != b"ready\n":
        process.kill()
        process.wait()
        reason = (directory / "log" / f"init-{node}.out").read_text(encoding="utf-8", errors="replace").strip()
        raise OSError(f"no namespaces for {node}: {reason or 'no answer'}")
    return process


def find_init(directory: Path, node: str) -> int | None:
    """Process 1 of a node, as seen from here."""
    return next((p.pid for p in find(directory) if p.node == node and p.name == "sh" and p.argv[-1] == INIT), None)


def _spawn(command: list[str], directory: Path, name: str, env: dict[str, str]) -> subprocess.Popen[bytes]:
    with (directory / "log" / f"{name}.out").open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env,
            cwd=directory,
            start_new_session=True,
        )

"""A SLURM cluster to throw away: controller, accounting and four nodes on this machine.

    python3 tests/slurm/cluster.py install       Debian's packages, as root
    python3 tests/slurm/cluster.py up FOLDER     start it; prints what to export
    python3 tests/slurm/cluster.py down FOLDER   stop it

Needs root and nothing else of the machine: no systemd, no cgroups, its own ports and keys, all
files below FOLDER (a short path: sockets). n1 and n2 are partition `main`; `cheap` and `urgent`
share n3, and the second preempts the first; n4 alone is `fragile`. Each node has two GPUs that are
not there. Standard library only, so that it runs before anything is installed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ["slurmctld", "slurmd", "slurm-client", "munge", "slurmdbd", "mariadb-server-core"]
NODES = ("n1", "n2", "n3", "n4")
CPUS, MEMORY, GPUS = 4, 16000, 2
MAX_ARRAY = 100

SLURM = """\
ClusterName=throwaway
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={port}
AuthType=auth/munge
CredType=cred/munge
# A job may start again when its former credential has expired: 5 s is the least, 120 the default.
AuthInfo=socket={root}/munge.sock,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.own.pid
SlurmdPidFile={root}/slurmd-%n.own.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
ReturnToService=1
JobRequeue=1
KillWait=5
MinJobAge=300
MaxArraySize={max_array}
PropagateResourceLimits=NONE
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd}
AccountingStoragePass={root}/munge.sock
GresTypes=gpu
{nodes}
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=60 DefMemPerCPU=100 State=UP
PartitionName=cheap Nodes=n3 MaxTime=60 DefMemPerCPU=100 PriorityTier=1 GraceTime=30 State=UP
PartitionName=urgent Nodes=n3 MaxTime=60 DefMemPerCPU=100 PriorityTier=10 PreemptMode=OFF State=UP
PartitionName=fragile Nodes=n4 MaxTime=60 DefMemPerCPU=100 State=UP
"""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} "
    "RealMemory={memory} Gres=gpu:{gpus} State=UNKNOWN"
)
SLURMDBD = """\
AuthType=auth/munge
AuthInfo=socket={root}/munge.sock
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={dbd}
SlurmUser=root
LogFile={root}/log/slurmdbd.log
PidFile={root}/slurmdbd.own.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={sql}
StorageUser=slurm
StoragePass={password}
StorageLoc=accounting
"""
# What mysql_install_db does, without the programs of another package.
BOOTSTRAP = (
    "CREATE DATABASE mysql;\nUSE mysql;\nSET @auth_root_socket=NULL;\n"
    "SET @current_hostname='localhost';\nSET @skip_auth_anonymous=1;\n"
)
TABLES = ("mysql_system_tables", "mysql_performance_tables", "mysql_system_tables_data")
DATABASE = """\
CREATE DATABASE accounting;
CREATE USER 'slurm'@'127.0.0.1' IDENTIFIED BY '{password}';
GRANT ALL ON accounting.* TO 'slurm'@'127.0.0.1';
ALTER USER 'root'@'localhost' IDENTIFIED BY '{password}';
"""


@dataclass(frozen=True)
class Cluster:
    """Its daemons run in the foreground of sessions of their own, known by recorded ids."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "slurm.conf"

    def up(self) -> None:
        for name in ("log", "state", "database", *(f"spool-{node}" for node in NODES)):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        self.root.chmod(0o755)
        os.environ["SLURM_CONF"] = str(self.config)
        ports = free_ports(3 + len(NODES))
        self.configure(ports)
        self.start_munge()
        self.start_accounting(*ports[1:3])
        self.spawn("slurmctld", "-D", "-f", str(self.config))
        for node in NODES:
            self.spawn("slurmd", "-D", "-f", str(self.config), "-N", node, name=f"slurmd-{node}")
        wait_for("the nodes", 30, self.nodes_are_idle)

    def configure(self, ports: list[int]) -> None:
        host = socket.gethostname().partition(".")[0]
        size = {"host": host, "cpus": CPUS, "memory": MEMORY, "gpus": GPUS}
        nodes = [NODE.format(name=n, port=p, **size) for n, p in zip(NODES, ports[3:], strict=True)]
        where = {"root": self.root, "host": host, "port": ports[0], "dbd": ports[1]}
        text = SLURM.format(nodes="\n".join(nodes), max_array=MAX_ARRAY, **where)
        self.config.write_text(text)
        devices = [self.root / f"gpu{number}" for number in range(GPUS)]
        for device in devices:
            os.mknod(device, 0o20666, os.makedev(1, 3))
        files = "".join(f"Name=gpu File={device}\n" for device in devices)
        (self.root / "gres.conf").write_text(files)

    def start_munge(self) -> None:
        key, sock = self.root / "munge.key", self.root / "munge.sock"
        secret(key, secrets.token_bytes(128))
        options = {"key-file": key, "socket": sock, "pid-file": self.root / "munged.own.pid"}
        options |= {"log-file": self.root / "log/munged.log", "seed-file": self.root / "munge.seed"}
        self.spawn("munged", "-F", *(f"--{name}={value}" for name, value in options.items()))
        wait_for("munge", 10, lambda: succeeds("munge", "-S", str(sock), "-n"))

    def start_accounting(self, dbd: int, sql: int) -> None:
        password, data = secrets.token_hex(16), self.root / "database"
        small = ["--innodb-buffer-pool-size=32M", "--innodb-log-file-size=8M", "--skip-log-bin"]
        common = ["--no-defaults", "--user=root", f"--datadir={data}", *small]
        script = BOOTSTRAP + "".join(
            Path(f"/usr/share/mysql/{name}.sql").read_text() for name in TABLES
        )
        with (self.root / "log/bootstrap.log").open("w") as log:
            run = ["mariadbd", *common, "--bootstrap"]
            subprocess.run(run, input=script, text=True, stdout=log, stderr=log, check=True)
        first = self.root / "first.sql"
        secret(first, DATABASE.format(password=password).encode())
        where = [f"--port={sql}", "--bind-address=127.0.0.1", "--skip-name-resolve"]
        where += [f"--socket={data}/sock", f"--pid-file={data}/pid", f"--init-file={first}"]
        self.spawn("mariadbd", *common, *where)
        wait_for("the database", 30, lambda: listens(sql))
        text = SLURMDBD.format(root=self.root, dbd=dbd, sql=sql, password=password)
        secret(self.root / "slurmdbd.conf", text.encode())
        self.spawn("slurmdbd", "-D")
        wait_for("accounting", 30, lambda: succeeds("sacctmgr", "-n", "list", "cluster"))
        add = ["sacctmgr", "-i", "-Q", "add", "cluster", "throwaway"]
        subprocess.run(add, stdout=subprocess.DEVNULL, check=True)

    def nodes_are_idle(self) -> bool:
        shown = subprocess.run(
            ["sinfo", "-h", "-N", "-t", "idle", "-o", "%N"],
            capture_output=True,
            text=True,
            check=False,
        )
        return set(shown.stdout.split()) == set(NODES)

    def spawn(self, program: str, *arguments: str, name: str = "") -> None:
        name = name or program
        with (self.root / "log" / f"{name}.out").open("a") as out:
            process = subprocess.Popen(
                [program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        (self.root / f"{name}.pid").write_text(str(process.pid))

    def down(self) -> None:
        """Jobs first, then the daemons in the order that lets each say goodbye."""
        os.environ["SLURM_CONF"] = str(self.config)
        with contextlib.suppress(subprocess.SubprocessError, OSError):
            subprocess.run(["scancel", "--user=root"], timeout=10, check=False)
            empty = ["squeue", "-h"]
            wait_for("jobs to end", 20, lambda: not subprocess.check_output(empty, timeout=5))
        for name in ("slurmd", "slurmctld", "slurmdbd", "mariadbd", "munged"):
            for file in sorted(self.root.glob(f"{name}*.pid")):
                if not file.name.endswith(".own.pid"):
                    stop(int(file.read_text()), name)
                    file.unlink()


def stop(process: int, program: str) -> None:
    """End a process, if it still is the program that was started."""
    command = Path(f"/proc/{process}/cmdline")

    def alive() -> bool:
        with contextlib.suppress(OSError):
            return command.read_bytes().startswith(program.encode())
        return False

    for kill in (signal.SIGTERM, signal.SIGKILL):
        if alive():
            os.kill(process, kill)
            with contextlib.suppress(ChildProcessError):
                for _ in range(100):
                    if os.waitpid(process, os.WNOHANG)[0] or not alive():
                        return
                    time.sleep(0.1)
            with contextlib.suppress(TimeoutError):
                wait_for(f"{program} to end", 10, lambda: not alive())


def secret(path: Path, content: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(content)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def succeeds(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def wait_for(what: str, seconds: float, done: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.1)


def missing_programs() -> list[str]:
    programs = ("munged", "mariadbd", "slurmdbd", "slurmctld", "slurmd", "sbatch")
    return [program for program in programs if not shutil.which(program)]


def install() -> None:
    if not missing_programs():
        return
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        subprocess.run(["apt-get", "-qq", *command], env=environment, check=True)


def main(arguments: list[str]) -> None:
    match arguments:
        case ["install"]:
            install()
        case ["up", folder]:
            Cluster(Path(folder).absolute()).up()
            print(f"export SLURM_CONF={Path(folder).absolute()}/slurm.conf")
        case ["down", folder]:
            Cluster(Path(folder).absolute()).down()
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])

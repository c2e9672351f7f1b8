"""The processes that share one run. A process by itself is a world of one, and nothing else differs."""

import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from itertools import count, pairwise
from typing import Any, Protocol, TypeVar

import psutil
import torch
import xxhash
from torch import Tensor

from lmd_hf.compat import local_processes, output_to_errors
from lmd_hf.errors import LmdError, ProcessError, SettingsError, first_line


T = TypeVar("T")
Item = TypeVar("Item")
Result = TypeVar("Result")
MEETING = timedelta(minutes=5)  # for processes that were started together to find each other
PATIENCE = timedelta(days=7)  # for the others' largest matrices; that a rank has died is noticed at once
NETWORK = "GLOO_SOCKET_IFNAME"  # the interface through which gloo is to be reached
TOLD = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # by torchrun to each process, beside WORLD_SIZE
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # by mpirun: Open MPI, MPICH and Intel, MVAPICH
LAUNCHED = "ACCELERATE_MIXED_PRECISION"  # what `accelerate launch` always sets


class Counter(Protocol):
    """A sum that every rank may add to and see."""

    def add(self, amount: float) -> float:
        """Add, and return the sum."""
        ...


@dataclass
class _Own:
    """The counter of a world of one."""

    total: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, amount: float) -> float:
        """Add, and return the sum."""
        with self.lock:
            self.total += amount
            return self.total


@dataclass(frozen=True)
class _Shared:
    """A sum that rank 0 keeps for all ranks, in whole units: the store counts integers."""

    store: Any
    name: str

    def add(self, amount: float) -> float:
        """Add, and return the sum."""
        with _talk():
            return float(self.store.add(self.name, round(amount)))


@dataclass(frozen=True)
class World:
    """This process is `rank` of `size`. What passes between ranks are results of our own ranks, never weights."""

    rank: int = 0
    size: int = 1
    group: Any = field(default=None, compare=False, repr=False)
    store: Any = field(default=None, compare=False, repr=False)
    counters: Iterator[int] = field(default_factory=count, compare=False, repr=False)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks, on every rank. All ranks have to call it."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        with _talk():
            torch.distributed.all_gather_object(values, value, group=self.group)
        return values

    def shared_out(self, items: Sequence[Item], work: Callable[[list[Item]], list[Result]]) -> list[Result]:
        """What `work` makes of the items, in their order and on every rank the same: each rank works on every `size`-th
        of them. All have to call it, with the same items."""
        shares = self.gather(self.together(lambda: work(list(items[self.rank :: self.size]))))
        return [shares[i % self.size][i // self.size] for i in range(len(items))]

    def add_up(self, mine: Tensor) -> Tensor:
        """The sum of every rank's tensor, on every rank; of a CPU tensor, which may be overwritten. All have to call
        it, with tensors of one shape."""
        if self.group is not None:
            with _talk():
                torch.distributed.all_reduce(mine, group=self.group)
        return mine

    def send(self, value: Tensor, rank: int) -> Callable[[], None]:
        """Begin to send a CPU tensor, which must stay as it is until what this returns, once called, has returned: then
        it has arrived. What is sent to one rank arrives in that order."""
        with _talk():
            return partial(_wait, torch.distributed.isend(value, rank, group=self.group), value)

    def receive(self, into: Tensor, rank: int) -> Tensor:
        """The next tensor that a rank has sent here, once it has come."""
        with _talk():
            torch.distributed.recv(into, rank, group=self.group)
        return into

    def together(self, stage: Callable[[], T]) -> T:
        """What a stage returns here. If it raises an `LmdError` on any rank, it does on all of them, so that none waits
        for one that has given up."""
        result: Any = None
        mine: LmdError | None = None
        try:
            result = stage()
        except LmdError as error:
            mine = error
        for rank, theirs in enumerate(self.gather(mine)):
            if theirs is not None:
                raise theirs if rank == self.rank else type(theirs)(f"rank {rank}: {theirs}")
        return result  # type: ignore[no-any-return]

    def check_same(self, seen: Mapping[str, str | None], what: str = "models") -> None:
        """`SettingsError` on every rank if two of them see different values under one name; `None` is unknown, and
        differs from nothing."""
        digests = {name: xxhash.xxh3_128_hexdigest(value.encode()) for name, value in seen.items() if value is not None}
        agreed: dict[str, str] = {}
        for theirs in self.gather(digests):
            if any(agreed.setdefault(name, value) != value for name, value in theirs.items()):
                raise SettingsError(
                    f"the ranks see different {what}; pin --revision to a commit, or give a folder that all of them "
                    "share"
                )

    def counter(self) -> Counter:
        """A new counter, at 0; the n-th that each rank asks for is the same one."""
        return _Own() if self.store is None else _Shared(self.store, f"counter {next(self.counters)}")

    def leave(self) -> None:
        """Wait for the others, so that none loses a peer in mid-talk, and end the connections."""
        if self.group is not None:
            with _talk():
                torch.distributed.barrier(group=self.group)
            torch.distributed.destroy_process_group()


@contextmanager
def _talk() -> Iterator[None]:
    """What is said to other ranks, or heard of them, in this context raises `ProcessError` where one is gone."""
    try:
        yield
    except RuntimeError as error:  # torch has no class of its own for it
        raise ProcessError(
            f"another process of this run has ended or cannot be reached ({_told(error)}); "
            "run the same command again: what is finished is kept"
        ) from error


def _wait(message: Any, _: Tensor) -> None:
    """Until a message has arrived; what it holds lives until then."""
    with _talk():
        message.wait()


def _told(error: RuntimeError) -> str:
    """Its first sentence; what follows says where to ask."""
    return first_line(error).partition(". ")[0]


def join(device: str = "auto") -> World:
    """The world that torchrun or `accelerate launch` started this process in; a world of one without them.

    On CPUs the processes talk through gloo, also where each has a GPU: what they exchange lies in main memory. Raises
    `SettingsError` where a launcher was asked for several processes and started one (see `one_of_many`), for mpirun,
    and for a WORLD_SIZE that no launcher has set; `ProcessError` where the processes do not find each other.
    """
    if wanted := one_of_many():
        raise SettingsError(
            f"`accelerate launch` was asked for {wanted} processes and started one, as it does on CPUs; "
            f"use `torchrun --nproc_per_node {wanted} -m lmd_hf …`"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        _refuse_mpi()
        return World()
    if missing := [name for name in TOLD if name not in os.environ]:
        raise SettingsError(f"WORLD_SIZE is set, {' and '.join(missing)} not; unset it, or start through torchrun")
    if NETWORK not in os.environ and (name := _network()):
        os.environ[NETWORK] = name
    try:
        with output_to_errors():
            return _meet(on_cpu=device == "cpu" or not torch.cuda.is_available())
    except RuntimeError as error:
        raise ProcessError(
            f"the processes of this run do not reach each other ({_told(error)}); if they are on several "
            f"machines, set {NETWORK} on each to the interface of the network that joins them, as `ip addr` names it"
        ) from error


def _refuse_mpi() -> None:
    """Processes of mpirun would each do all of the work."""
    started = next((os.environ[name] for name in MPI_SIZES if name in os.environ), "1")
    if started != "1":
        raise SettingsError(
            f"mpirun started {started} processes, which would each do the whole work; "
            f"use `torchrun --nproc_per_node {started} -m lmd_hf …`"
        )


def _meet(*, on_cpu: bool) -> World:
    from accelerate import PartialState

    # without cpu=True every rank of a machine without an accelerator believes that it is alone
    state = PartialState(cpu=on_cpu, timeout=MEETING)
    torch.distributed.new_group(backend="gloo", timeout=MEETING)  # who cannot be reached is not waited for longer
    group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
    world = World(state.process_index, state.num_processes, group=group)
    return replace(world, store=_open_store(world))


def _network() -> str | None:
    """The name of the interface on the way to the machine of rank 0; `None` where all processes are on this one, or
    this is that machine, which connects to the others and need not be found.

    Gloo by itself listens where this machine's own name leads. On many that is the loopback, where no other machine is.
    """
    if local_processes() == int(os.environ["WORLD_SIZE"]):
        return None
    try:
        family, kind, protocol, _, there = socket.getaddrinfo(os.environ["MASTER_ADDR"], 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as line:
            line.connect(there)  # sends nothing, and tells this machine's own address on that way
            here = line.getsockname()[0]
    except OSError:
        return None
    names = (name for name, known in psutil.net_if_addrs().items() if here in (each.address for each in known))
    return next((name for name in names if name not in ("lo", "lo0")), None)


def _open_store(world: World) -> Any:
    host = os.environ["MASTER_ADDR"]
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    own = TCPStore(host, 0, is_master=True, wait_for_workers=False) if world.rank == 0 else None
    port = world.gather(own.port if own is not None else 0)[0]
    return own or TCPStore(host, port, is_master=False)


def one_of_many() -> int:
    """How many processes `accelerate launch` was asked for, by its flags or its configuration, where it started just
    one (on CPUs, without a host file for MPI); 0 where nothing is wrong."""
    if LAUNCHED not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return 0
    try:
        parent = psutil.Process().parent()
        words = [part for word in (parent.cmdline() if parent is not None else []) for part in word.split("=", 1)]
    except psutil.Error:
        return 0
    if not any(word.endswith(("launch", "launch.py")) for word in words):
        return 0
    flags = dict(pairwise(words))
    asked = flags.get("--num_processes", flags.get("--num-processes"))
    if asked is None:
        asked = _configured(flags.get("--config_file", flags.get("--config-file")))
    return int(asked) if asked.isdigit() and int(asked) > 1 else 0


def _configured(file: str | None) -> str:
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    if file is None and not os.path.isfile(default_config_file):
        return ""
    return str(getattr(load_config_from_file(file), "num_processes", ""))

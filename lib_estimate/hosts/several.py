"""Several checkpoints as one host: fine-tunes of the same model, all of them in memory."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

from lib_estimate.errors import EstimateError
from lib_estimate.hosts.base import Host, ModelInfo, Session


class Several:
    """Checkpoints that one embedding is made for, or measured on. The first one leads: its tokens are the start."""

    def __init__(self, hosts: Sequence[Host]) -> None:
        self.hosts = hosts

    def session(self, *, tags: bool = False) -> AbstractContextManager[Session]:
        """The first checkpoint alone."""
        return self.hosts[0].session(tags=tags)

    def without(self, names: Collection[str]) -> Several:
        return Several([host.without(names) for host in self.hosts])

    def in_turn(self) -> Generator[tuple[int, int, Host], None, None]:
        """See the function of this name."""
        for number, host in enumerate(self.hosts, 1):
            yield number, len(self.hosts), host


def together(hosts: Sequence[Host]) -> Host:
    """The host of one checkpoint, or of several."""
    return hosts[0] if len(hosts) == 1 else Several(hosts)


def in_turn(host: Host) -> Generator[tuple[int, int, Host], None, None]:
    """(number from 1, how many, host) of each of its checkpoints, of which no two have to be there at a time. To be
    closed: a host that loads them puts back the one from before."""
    return (host if isinstance(host, Several) else Several([host])).in_turn()


def each_of(host: Host) -> Sequence[Host]:
    """The hosts of its checkpoints, one by one."""
    return host.hosts if isinstance(host, Several) else [host]


@contextmanager
def sessions_of(host: Host, *, tags: bool = False) -> Iterator[list[Session]]:
    """A session of each of a host's checkpoints, all at the same time; EstimateError where no embedding fits all."""
    with ExitStack() as stack:
        lent = [stack.enter_context(each.session(tags=tags)) for each in each_of(host)]
        for session in lent[1:]:
            _check_alike(lent[0].info, session.info)
        yield lent


def _check_alike(first: ModelInfo, other: ModelInfo) -> None:
    if list(first.widths.items()) != list(other.widths.items()):
        widths = [", ".join(f"{key} {width}" for key, width in info.widths.items()) for info in (first, other)]
        raise EstimateError(
            f"{first.name} and {other.name} can't share an embedding: the token vectors of one are {widths[0]}, of the "
            f"other {widths[1]}. Take checkpoints of one family."
        )
    if first.device != other.device:
        raise EstimateError(
            f"{first.name} is on {first.device}, {other.name} on {other.device}: put both on the same device."
        )

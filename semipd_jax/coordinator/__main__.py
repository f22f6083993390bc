"""`python -m semipd_jax.coordinator`: a child process of the launcher."""

from collections.abc import Iterable
from typing import Final

from semipd_jax.child import Child, Command, freeze_heap, run_child
from semipd_jax.coordinator.coordinator import Coordinator
from semipd_jax.coordinator.setup import build_coordinator, make_grammars
from semipd_jax.errors import StartupError
from semipd_jax.messages import (
    FromCoordinator,
    FromWorker,
    ShareUnavailable,
    ToCoordinator,
    ToWorker,
    WorkerLost,
)
from semipd_jax.transport.channels import CLIENTS, WORKERS, Hub, Poller

_TICK_S: Final = 0.5


def main(child: Child) -> None:
    spec = child.spec
    if spec.layout is None:
        raise StartupError("the coordinator was started without a memory layout")
    workers = Hub[FromWorker, ToWorker](spec.run_dir, WORKERS, FromWorker)
    clients = Hub[ToCoordinator, FromCoordinator](spec.run_dir, CLIENTS, ToCoordinator)
    grammars = make_grammars(spec.config.model, spec.layout)
    coordinator = build_coordinator(
        spec.config, spec.layout, workers, clients, tell_launcher=child.send, grammars=grammars
    )
    poller = Poller()
    for source in (workers, clients, child.fileno()):
        poller.add(source)
    if grammars is not None:
        poller.add(grammars.fileno())
    freeze_heap()
    child.ready()
    while not child.stopping.is_set():
        poller.wait(_TICK_S)
        take_in(child.receive(), workers.receive(), coordinator)
        for client, message in clients.receive():
            coordinator.from_client(client, message)
        if grammars is not None:
            coordinator.masks_made()
        coordinator.watch()
        child.alive()
    workers.close()
    clients.close()


def take_in(
    commands: Iterable[Command], said: Iterable[tuple[str, FromWorker]], coordinator: Coordinator
) -> None:
    """Takes in what workers say, then what the launcher says: a step whose reply is here is not
    lost with its worker. A lost worker replied before the launcher spoke of it, so `said` is read
    here, when `commands` have been."""
    for _, message in said:
        coordinator.from_worker(message)
    for command in commands:
        match command:
            case WorkerLost(worker_id=worker_id, lane=lane, is_to_blame=is_to_blame):
                coordinator.worker_lost(lane, worker_id, is_to_blame=is_to_blame)
            case ShareUnavailable(lane=lane, share=share):
                coordinator.share_unavailable(lane, share)
            case _:
                pass


if __name__ == "__main__":
    run_child(main)

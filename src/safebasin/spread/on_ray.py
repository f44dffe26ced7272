"""Ray core actors: a pool of workers on one machine or on many. The only file that imports ray.

Every actor builds one worker (one model) and takes item after item. An actor that is lost costs the item that it had:
the item is tried again by a new one. Rows do not pass through Ray: workers read and write files that all machines see.

Ray obeys whoever reaches its ports (CVE-2023-48022), so a cluster that is not ours must ask for a token, and one that
is ours has no dashboard.
"""

import collections
import contextlib
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from safebasin.console import line, printable
from safebasin.data.files import cause
from safebasin.errors import UserError
from safebasin.spread import Facts, Worker

STORE = 100 << 20  # bytes of the object store of a cluster of ours: items and counts are small
LOCAL = {  # of a cluster of ours
    "RAY_worker_niceness": "0",  # Ray's own is 15: on a busy machine such workers stand still
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class Remote:
    """What runs in an actor. The worker is built by the first item, so that its errors are those of a task."""

    def __init__(self, make: Callable[[], Worker[Any]], folder: str):
        self.make, self.folder, self.worker = make, folder, None  # type: Any, str, Any

    def work(self, item: Any, part: str) -> Facts:
        os.chdir(self.folder)  # a recipe may name files by relative paths
        self.worker = self.worker or self.make()
        return self.worker(item, Path(part))


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class OnRay:
    """A pool of actors. Machines come from whoever made the cluster; all see the same files under the same paths."""

    address: str = ""  # of a cluster: auto, or HOST:PORT; "": one on this machine, which ends with the step
    workers: NonNegativeInt = 0  # actors; 0: as many as fit
    gpus: NonNegativeFloat = 0  # of each, a part of one allowed
    cpus: PositiveInt = 1  # of each; torch takes as many threads
    tries: Annotated[int, Field(ge=1, le=100)] = 3  # of an item whose worker dies

    def work(
        self, items: Sequence[Any], make: Callable[[], Worker[Any]], parts: Callable[[str], Path]
    ) -> Iterator[Facts]:
        if not items:
            return
        with self.cluster() as ray:
            size = min(self._places(ray), len(items))
            options = {"num_cpus": self.cpus, "num_gpus": self.gpus, "max_restarts": 0}
            actor_of = ray.remote(Remote).options(**options)
            queue, lost = collections.deque(items), collections.Counter[str]()
            idle: list[Any] = []
            busy: dict[Any, tuple[Any, Any]] = {}
            try:
                while queue or busy:
                    while queue and len(busy) < size:
                        actor = idle.pop() if idle else actor_of.remote(make, os.getcwd())
                        item = queue.popleft()
                        busy[actor.work.remote(item, str(parts(item.name)))] = actor, item
                    done = ray.wait(list(busy), num_returns=1)[0][0]
                    actor, item = busy.pop(done)
                    try:
                        facts = ray.get(done)
                    except ray.exceptions.RayTaskError as error:
                        raise error.cause from None
                    except ray.exceptions.RayActorError as error:
                        if error.actor_init_failed:
                            raise UserError(f"engine.ray: no worker can start: {_last_line(error)}") from error
                        lost[item.name] += 1
                        self._say_lost(item.name, lost[item.name])
                        queue.appendleft(item)
                        continue
                    idle.append(actor)
                    yield facts
            finally:
                for actor in [*idle, *(actor for actor, _ in busy.values())]:
                    ray.kill(actor)

    def _say_lost(self, name: str, times: int) -> None:
        if times == self.tries:
            raise UserError(
                f"{name}: its worker died {times} times; what it reads kills a worker, or memory does not suffice "
                "(Ray's logs say more); parts that are done stay: start again to go on"
            )
        line(f"  {name}: its worker died; tried again, {self.tries - times} left")

    @contextlib.contextmanager
    def cluster(self) -> Iterator[Any]:
        """Ray, connected; a connection that was there before stays.

        Raises:
            UserError: ray is not installed, or there is no such cluster.
        """
        ray = _import(dict(LOCAL) if not self.address else {})
        if ray.is_initialized():
            yield ray
            return
        try:
            if self.address:
                self._check_token()
                ray.init(address=self.address, log_to_driver=False, logging_level="error")
            else:
                more = {"include_dashboard": False, "object_store_memory": STORE}
                cpus = self.workers * self.cpus or None
                ray.init(address="local", num_cpus=cpus, log_to_driver=False, logging_level="error", **more)
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            raise UserError(f"engine.ray: no cluster at {self.address or 'this machine'}: {cause(error)}") from error
        try:
            yield ray
        finally:
            ray.shutdown()

    def _check_token(self) -> None:
        if os.environ.get("RAY_AUTH_MODE") != "token":
            raise UserError(
                f"engine.ray.address {self.address}: a cluster without a token runs the code of whoever reaches it; "
                "start it with RAY_AUTH_MODE=token, and set RAY_AUTH_MODE=token and its token (ray get-auth-token) here"
            )

    def _places(self, ray: Any) -> int:
        """How many actors fit into the cluster as it is.

        Raises:
            UserError: none does.
        """
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        fit = [
            int(min(node.get("CPU", 0) / self.cpus, node.get("GPU", 0) / self.gpus if self.gpus else float("inf")))
            for node in nodes
        ]
        if not sum(fit):
            raise UserError(f"engine.ray: no machine of the cluster has {self.cpus} CPUs and {self.gpus:g} GPUs")
        return min(sum(fit), self.workers or sum(fit))


def _last_line(error: BaseException) -> str:
    return printable(next((text for text in reversed(str(error).splitlines()) if text.strip()), ""))


def _import(settings: dict[str, str]) -> Any:
    """Ray, with settings of its environment where it has none. It reads some of them once, when it is imported."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--engine ray starts its own workers; start it without torchrun, which shares a run by itself")
    if settings and "ray" not in sys.modules:
        settings |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    os.environ.update({name: value for name, value in settings.items() if name not in os.environ})
    try:
        import ray
    except ImportError as error:
        raise UserError("--engine ray needs: pip install 'safebasin[ray]'") from error
    return ray

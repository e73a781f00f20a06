"""Whether a process talks to the service of its own run, about the model of that run."""

from buffer.connection import ServiceClient
from buffer.errors import RunMismatch
from services.settings import RunConfig


def check_run(client: ServiceClient, config: RunConfig, fingerprint: str) -> None:
    """Wait for the service and compare; actor and learner call it before they begin.

    `fingerprint` is that of config.run.model. Raises RunMismatch, and what the client raises when its patience ends.
    """
    info = client.run_info()
    if info.run_id != config.run.name:
        raise RunMismatch(
            f"{client.url} serves run {info.run_id}, but run.name is {config.run.name}",
            hint="set run.name or service.url",
        )
    if info.model_fingerprint not in (None, fingerprint):
        raise RunMismatch(
            f"run {info.run_id} was begun with another model or tokenizer ({str(info.model_fingerprint)[:12]}) than"
            f" {config.run.model} ({fingerprint[:12]})",
            hint="set run.model to the model that the run was begun with, or give the run another name",
        )

"""The collaborators of one API worker, made from the settings: the same in a service of one process and of several."""

from collections.abc import Mapping
from functools import partial

from buffer.errors import InvalidSettings
from buffer.redis_client import RedisClient
from buffer.redis_scripts import shard_prefix
from buffer.redis_shards import open_table
from buffer.weights.open_store import open_weight_store
from services.context import ServiceContext
from services.evaluations import BoardEvaluations
from services.history import RedisHistory
from services.presence import Presence, RedisBoard
from services.settings import RunConfig
from services.stats import store_status
from services.token_text import TokenTextReader
from services.trained_ring import RedisTrainedRing


def assemble(config: RunConfig, client: RedisClient, promises: Mapping[str, str]) -> ServiceContext:
    """Return the collaborators; nothing is asked of Redis or of object storage. Raises as open_weight_store."""
    run_id, first = config.run.name, shard_prefix(config.run.name, 0)
    weights = open_weight_store(config.weights, config.run.directory / "weights", run_id)
    return ServiceContext(
        run_id=run_id,
        settings=config.service,
        table=open_table(client, config.table, config.limiter, run_id),
        table_settings=config.table,
        limiter_settings=config.limiter,
        weights=weights,
        presence=Presence(RedisBoard(client, key=first + "presence")),
        history=RedisHistory(client, prefix=first + "history:"),
        trained=RedisTrainedRing(client, prefix=first + "trained:"),
        token_texts=TokenTextReader(config.run.model).texts,
        store=partial(store_status, client, config.run.directory),
        evaluations=BoardEvaluations(RedisBoard(client, key=first + "evaluations"), weights),
        promises=lambda: promises,
    )


def take_up(context: ServiceContext) -> None:
    """Bring the table to the latest published version: its Redis may be a new one.

    Raises InvalidSettings when the store holds weights of another run, StoreUnavailable when it cannot be used.
    """
    latest = context.weights.latest()
    if latest is None:
        return
    if latest.run_id != context.run_id:
        raise InvalidSettings(
            f"{context.weights.location} holds weights of run {latest.run_id}, not {context.run_id}",
            hint="set run.name, run.runs_dir or weights.store",
        )
    context.table.advance_version(latest.version)

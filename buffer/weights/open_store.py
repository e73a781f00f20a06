"""The weight store that the settings name."""

from pathlib import Path

from buffer.errors import InvalidSettings
from buffer.weights.directory_store import DirectoryWeightStore
from buffer.weights.store import ServedWeightStore, WeightStoreSettings


def open_weight_store(settings: WeightStoreSettings, directory: Path, run_id: str) -> ServedWeightStore:
    """Return the store of a run: in `directory`, or in object storage below its id.

    Raises InvalidSettings when object storage needs a package that is not installed, StoreUnavailable when the
    directory cannot be made.
    """
    if settings.store == "directory":
        return DirectoryWeightStore(directory, settings=settings)
    try:
        from buffer.weights.object_store import ObjectWeightStore  # obstore is an extra
    except ModuleNotFoundError as error:
        raise InvalidSettings(
            f"weights.store={settings.store} needs {error.name}", hint="in the clone: pip install '.[s3]'"
        ) from error
    return ObjectWeightStore(run_id, settings=settings)

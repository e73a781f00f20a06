"""Where a run's model is: one rule for learner and actors, and nothing is downloaded."""

from pathlib import Path

from huggingface_hub import snapshot_download

from buffer.errors import InvalidSettings


def local_model_dir(model: Path) -> Path:
    """Return a model's local directory: the path itself if it exists, else the copy in the local hub cache.

    Raises InvalidSettings when there is neither.
    """
    if model.exists():
        return model
    try:
        return Path(snapshot_download(str(model), local_files_only=True))
    except (OSError, ValueError) as error:  # not in the cache; not even a name that the hub could know
        raise InvalidSettings(
            f"{model} is neither a local model directory nor a model in the local hub cache",
            hint=f"correct run.model, run `stalewise make-model`, or fetch a model of the hub: `hf download {model}`",
        ) from error

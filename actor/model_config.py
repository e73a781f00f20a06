"""The configuration of a model directory, of a model of text alone or of one that has text among other parts."""

from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from buffer.errors import InvalidSettings


def load_config(model_dir: Path) -> PreTrainedConfig:
    """Return the configuration in a local model directory. Raises InvalidSettings when there is none that is known."""
    if not (model_dir / "config.json").is_file():
        raise InvalidSettings(
            f"{model_dir} is not a model directory: it has no config.json",
            hint="give the path of a directory written by save_pretrained, or run `stalewise make-model`",
        )
    try:
        return AutoConfig.from_pretrained(model_dir, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InvalidSettings(f"{model_dir} does not hold a causal language model: {error}") from error


def vocab_size(config: PreTrainedConfig) -> int:
    """Return the number that token ids are below."""
    return int(config.get_text_config().vocab_size)


def max_positions(config: PreTrainedConfig) -> int:
    """Return how many tokens of a sequence the model was made for."""
    return int(config.get_text_config().max_position_embeddings)

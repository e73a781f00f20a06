"""The tokenizer of a model directory."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from buffer.errors import InvalidSettings


def load_tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a local model directory. Raises InvalidSettings when there is none that can be read."""
    try:
        return AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    except Exception as error:  # tokenizers raises a bare one for a damaged file: an actor would die of it
        reason = str(error).partition("\n")[0].strip()
        raise InvalidSettings(
            f"{model_dir} holds no tokenizer that can be read: {reason}",
            hint="give the path of a directory written by save_pretrained, or run `stalewise make-model`",
        ) from error

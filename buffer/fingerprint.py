"""The identity of a model directory: what must agree between learner and actors before tokens mean the same."""

import hashlib
from pathlib import Path

from buffer.errors import InvalidSettings

_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")


def model_fingerprint(model_dir: Path) -> str:
    """Return the sha256 over the names and bytes of config and tokenizer files of a local model directory.

    generation_config.json is not among them: it says where a response stops and not what a token means, the learner
    does not read it, and every run begun before it counted would be refused as another model's.
    Raises InvalidSettings when the directory is not a model.
    """
    if not (model_dir / "config.json").is_file():
        raise InvalidSettings(
            f"{model_dir} is not a model directory: it has no config.json",
            hint="give the path of a directory written by save_pretrained, or run `stalewise make-model`",
        )
    digest = hashlib.sha256()
    for name in _FILES:
        if (model_dir / name).is_file():
            content = (model_dir / name).read_bytes()
            digest.update(f"{name}:{len(content)}:".encode() + content)
    return digest.hexdigest()

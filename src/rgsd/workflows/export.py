"""Settings of `rgsd export`; `rgsd.models.export` does the work."""

from __future__ import annotations

from dataclasses import dataclass

from rgsd.errors import ConfigError
from rgsd.settings import setting


@dataclass
class ExportConfig:
    """Where the model goes and how it is stored."""

    output_dir: str = setting("", "Folder of the model: new or empty. Required.")
    dtype: str | None = setting(
        None, "Type of the stored weights. Unset: the type in the run.", choices=["float32", "bfloat16", "float16"]
    )
    trust_remote_code: bool = setting(False, "Run code that ships with the base model. Only for sources you trust.")

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise ConfigError("output_dir is unset: name a new folder for the model, e.g. --output_dir my-model")

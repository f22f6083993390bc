"""The small Llama that is served when no model is named, and how it was made."""

from pathlib import Path
from typing import Final

MODEL_DIR: Final = Path(__file__).parent / "model"

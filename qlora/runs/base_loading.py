"""How PEFT loads a run's base: the class of transformers, and the rows of new tokens that the base lacks."""

from typing import Any

from qlora.model.load_base import Base
from qlora.model.meta_model import read_config
from qlora.model.wrapper_models import factory_name
from qlora.runs.report.model_card import Loading


def loading_of(base: Base) -> Loading:
    """Class and rows of a base as it is after training."""
    config = read_config(base.folder.path)
    model: Any = base.model
    rows = len(model.get_input_embeddings().weight)
    return Loading(factory_name(config), None if rows == config.get_text_config().vocab_size else rows)

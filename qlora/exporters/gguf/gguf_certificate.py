"""The certificate of a GGUF file: read back and compared with the trained model, weights and prompts.

The file's values are dequantized, its layout is undone, its metadata is put into the configuration, and transformers'
class computes the logits. Prompts are rendered with the template in the file and tokenized by its vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qlora.data.types import Example
from qlora.errors import QloraError, first_line
from qlora.exporters.certificate import Agreement, compare
from qlora.exporters.gguf.file_reader import GgufReader
from qlora.exporters.gguf.file_tokenizer import FileTokenizer
from qlora.exporters.gguf.gguf_architectures import ARCHITECTURES, Architecture
from qlora.exporters.gguf.gguf_file import GgufFile
from qlora.exporters.gguf.metadata import config_of_file
from qlora.exporters.gguf.tensor_layout import placements
from qlora.exporters.served_conversations import ConversationAgreement, ServedConversation, where_different
from qlora.model.lazy_model import build_lazy_model
from qlora.model.meta_model import build_meta_model
from qlora.runs.load_run import LoadedRun

TEMPLATE = "tokenizer.chat_template"


def certify_gguf(run: LoadedRun, path: Path, examples: Sequence[Example]) -> Agreement:
    """Compare a file with the trained model; computed in float32. QloraError if it is not a file of this model."""
    file, trained = GgufFile(path), run.base.model
    written = load_gguf(file, trained, run.recipe.model.attention, run.base.device)
    return compare(trained, written, examples, run.base.device)


def load_gguf(file: GgufFile, trained: Any, attention: str, device: torch.device) -> Any:
    """The model of a file, in float32; its matrices are read when they are used. `trained` has its class."""
    architecture = ARCHITECTURES.get(type(trained).__name__, Architecture(file.architecture))
    if architecture.name != file.architecture:
        raise QloraError(
            f"{file.path} is a file of {file.architecture}, expected {architecture.name}. Export it again."
        )
    is_known = type(trained).__name__ in ARCHITECTURES
    config = config_of_file(file, architecture, trained.config) if is_known else trained.config
    skeleton = build_meta_model(config, torch.float32, attention, torch.device("cpu"))
    reader = GgufReader(file, placements(architecture, skeleton))
    return build_lazy_model(config, reader, torch.float32, attention, device)


def compare_file_prompts(
    path: Path, tokenizer: Any, conversations: Sequence[ServedConversation]
) -> ConversationAgreement:
    """The prompt ids of training against those by the template and the vocabulary in a file.

    tokenizer: transformers', for its way to render a template only.
    """
    file = GgufFile(path)
    template = file.get(TEMPLATE)
    if not template and conversations:
        return ConversationAgreement(len(conversations), 0, "the file has no chat template")
    own = FileTokenizer(file)
    return ConversationAgreement.of([_difference(own, tokenizer, str(template), item) for item in conversations])


def _difference(own: FileTokenizer, tokenizer: Any, template: str, conversation: ServedConversation) -> str:
    """Where a conversation differs; empty if it does not."""
    try:
        prompt = tokenizer.apply_chat_template(
            conversation.turns,
            tools=conversation.tools,
            chat_template=template,
            add_generation_prompt=True,
            tokenize=False,
            bos_token=own.text_of(own.bos_id),
            eos_token=own.text_of(own.eos_id),
        )
    except Exception as error:  # a template is a program: it may raise anything
        return f"{conversation.where}: refused by the chat template ({first_line(error, 200)})"
    return where_different(conversation, own.encode_prompt(prompt))

"""A loaded run as a model of lm-evaluation-harness: the frozen 4-bit base with its adapter, exactly as it was trained.

The only module that imports lm_eval.
"""

import logging
from collections import defaultdict
from collections.abc import Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from lm_eval import evaluator
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from qlora.data.types import Message
from qlora.errors import DataError, InputError, QloraError
from qlora.model.generate_tokens import RowHooks, generate
from qlora.runs.benchmark_results import BenchmarkRequest
from qlora.runs.inference_memory import inference_memory
from qlora.runs.load_run import LoadedRun
from qlora.runs.memory_setup import Log
from qlora.training.continuation_scores import score_continuations
from qlora.utils.progress import ProgressReporter

NO_LIMIT = 2**31
MAX_NEW_TOKENS = 256  # of a task that does not say how many: the harness's default


class HarnessModel(TemplateLM):
    """Log-likelihoods and greedy or sampled answers, in the batches of `qlora eval` and `qlora generate`."""

    def __init__(self, run: LoadedRun, log: Log) -> None:
        super().__init__()
        self.run, self.tokenizer, self.tokens = run, run.base.tokenizer, 0
        self._log, self._has_template = log, False
        config = run.base.config.get_text_config()
        self.max_length = int(getattr(config, "max_position_embeddings", 0) or NO_LIMIT)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        end = self.tokenizer.eos_token_id
        return int(self.run.base.stop_token_ids[0] if end is None else end)

    @property
    def prefix_token_id(self) -> int:
        """The context of a text without context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """The name under which the harness caches requests."""
        return str(self.run.recipe.model.name).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text; a rendered conversation, or a text that begins with it, gets no second begin token."""
        begin = self.tokenizer.bos_token
        has_begin = self._has_template or bool(begin and string.startswith(begin))
        special = not has_begin if add_special_tokens is None else add_special_tokens
        return [int(token) for token in self.tokenizer.encode(string, add_special_tokens=special)]

    def chat_template(self, chat_template: bool | str = False) -> str:
        """What the harness records: the template is the run's own."""
        return "the run's"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as training renders it, up to the next answer."""
        if not add_generation_prompt:
            raise InputError("--chat-template: a task that begins the answer itself is not supported. Leave it out.")
        self._has_template = True
        messages = [Message(turn["role"], turn["content"]) for turn in chat_history]
        return str(self.tokenizer.decode(self.run.encoder.prompt_ids(messages), skip_special_tokens=False))

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, and whether it is greedy; progress is ours."""
        return super().loglikelihood(requests, disable_tqdm=True)  # type: ignore[no-any-return]

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        pairs = [self._within_length(context, continuation) for _, context, continuation in requests]
        return self._scores(pairs)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        """The log-likelihood of each whole text, in windows of the model's context."""
        totals = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(self.tok_encode(text, False), self.prefix_token_id, self.max_length, 1)
            totals.append(sum(value for value, _ in self._scores([make_disjoint_window(w) for w in windows])))
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        """The answer to each context up to the first of its stop texts."""
        groups = defaultdict[tuple[int, float], list[int]](list)
        settings = [self._settings(request.args[1]) for request in requests]
        for index, (count, temperature, _) in enumerate(settings):
            groups[count, temperature].append(index)
        answers: dict[int, str] = {}
        for (count, temperature), indices in groups.items():
            tokens_left = max(1, self.max_length - count)
            prompts = [self.tok_encode(requests[index].args[0])[-tokens_left:] for index in indices]
            stops = [settings[index][2] for index in indices]
            report = ProgressReporter(self._log, "answering", "prompts")
            hooks = RowHooks(report=report, is_complete=partial(self._contains_stop, stops))
            with inference_memory(self.run.base):
                outputs = generate(self.run.base, prompts, count, temperature, self.run.recipe.train.seed, hooks)
            for index, ids, own in zip(indices, outputs, stops, strict=True):
                answers[index] = _before(self._text(ids), own)
        return [answers[index] for index in range(len(requests))]

    def _settings(self, options: dict[str, Any]) -> tuple[int, float, list[str]]:
        """New tokens, temperature, and stop texts of a request."""
        values: Any = normalize_gen_kwargs(options, MAX_NEW_TOKENS)
        temperature = float(values.get("temperature") or 0.0) if values.get("do_sample") else 0.0
        return int(values["max_gen_toks"]), temperature, [*handle_stop_sequences(values.get("until"), eos=None)]

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _contains_stop(self, stops: Sequence[Sequence[str]], row: int, ids: Sequence[int]) -> bool:
        return any(stop in self._text(ids) for stop in stops[row])

    def _scores(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        self.tokens += sum(len(continuation) for _, continuation in pairs)
        report = ProgressReporter(self._log, "scoring", "texts")
        scores = score_continuations(self.run.base.model, pairs, self.run.base.device, report)
        return [(score.log_likelihood, score.is_greedy) for score in scores]

    def _within_length(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[list[int], list[int]]:
        """The pair without the beginning of a context that is too long."""
        tokens_left = self.max_length + 1 - len(continuation)  # the last token of the continuation is no input
        if tokens_left < 1:
            raise DataError(
                f"--lm-eval: a continuation of {len(continuation):,} tokens, but the model's context has "
                f"{self.max_length:,}. Leave this task out."
            )
        return [*context][-tokens_left:], [*continuation]


def run_tasks(run: LoadedRun, request: BenchmarkRequest, log: Log) -> dict[str, Any]:
    """The harness's results of the tasks, and the number of scored tokens. InputError for a task that can't be run."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=request.include_path)
    for task in request.tasks:
        if not manager.match_tasks([task]):
            near = get_close_matches(task, manager.all_tasks, n=3)  # of thousands
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise InputError(f"--lm-eval: no task {task!r}.{hint} All of them: lm-eval ls tasks.")
    model = HarnessModel(run, log)
    try:
        results: Any = evaluator.simple_evaluate(
            model=model,
            tasks=[*request.tasks],
            limit=request.limit,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=0,
            apply_chat_template=request.chat_template,
        )
    except QloraError:
        raise
    except (OSError, ValueError, KeyError) as error:  # data sets that can't be had, faults of a task's own file
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"--lm-eval {','.join(request.tasks)}: {reason[:400]}") from error
    return {**results, "tokens": model.tokens, "include_path": _shown(request.include_path)}


def _before(text: str, stops: Sequence[str]) -> str:
    ends = [text.index(stop) for stop in stops if stop in text]
    return text[: min(ends)] if ends else text


def _shown(path: str | None) -> str | None:
    return None if path is None else str(Path(path))

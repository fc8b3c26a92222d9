"""What a run optimizes: the table of objectives and their settings.

An objective other than sft compares answers: it is a function of the log-probabilities of whole answers, under the
model in training and, for some, under a reference that does not train.
"""

from collections.abc import Mapping
from typing import Annotated

from qlora.config import KindOf, Section, setting
from qlora.utils.registry import Registry

OBJECTIVES = Registry(
    "objective.kind",
    sft="qlora.training.loss:TokenLoss",  # cross entropy of the answers
    dpo="qlora.training.objectives.dpo:Dpo",  # pairs, with a reference                arXiv:2305.18290
    ipo="qlora.training.objectives.ipo:Ipo",  # pairs, with a reference                arXiv:2310.12036
    orpo="qlora.training.objectives.orpo:Orpo",  # pairs, without one                  arXiv:2403.07691
    simpo="qlora.training.objectives.simpo:Simpo",  # pairs, without one               arXiv:2405.14734
    kto="qlora.training.objectives.kto:Kto",  # answers with a label, with a reference arXiv:2402.01306
)
READ_BY: Mapping[str, tuple[str, ...]] = {  # setting -> the kinds that read it
    "beta": ("dpo", "ipo", "orpo", "simpo", "kto"),
    "label_smoothing": ("dpo", "simpo"),
    "gamma": ("simpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "sft_weight": ("dpo", "ipo", "simpo", "kto"),
    "reference": ("dpo", "ipo", "kto"),
}
_FORMATS = {"sft": None, "kto": "feedback"}  # what the records of a kind are read as; of the others: preference


class Objective(Section):
    """What is optimized. Names, defaults and meanings are those of TRL; null is the default, where a kind reads it."""

    kind: Annotated[str, KindOf(OBJECTIVES)] = setting("sft", "sft | dpo | ipo | orpo | simpo | kto")
    beta: float = setting(
        0.1,
        "dpo, ipo, kto: weight of the KL to the reference; orpo: of the odds ratio; simpo: of the reward; default 0.1",
        gt=0,
        nullable=True,
    )
    label_smoothing: float = setting(
        0.0, "dpo, simpo: assumed fraction of exchanged pairs; default 0", ge=0, lt=0.5, nullable=True
    )
    gamma: float = setting(0.5, "simpo: margin of the rewards to reach; default 0.5", ge=0, nullable=True)
    desirable_weight: float = setting(1.0, "kto: weight of the answers labeled true; default 1", gt=0, nullable=True)
    undesirable_weight: float = setting(1.0, "kto: weight of the answers labeled false; default 1", gt=0, nullable=True)
    sft_weight: float = setting(
        0.0, "dpo, ipo, simpo, kto: weight of the cross entropy of the chosen answers; default 0", ge=0, nullable=True
    )
    reference: str = setting(
        "base",
        "dpo, ipo, kto: base (the adapter switched off), or the folder of an adapter, where training starts",
        min_length=1,
        nullable=True,
    )

    @property
    def sided_format(self) -> str | None:
        """The data format that every record must have: preference or feedback; None: any other."""
        return _FORMATS.get(self.kind, "preference")

    @property
    def learns_prompts(self) -> bool:
        """Whether the cross entropy of the chosen answers is of their prompts too."""
        return self.sided_format is not None and bool(OBJECTIVES[self.kind].learns_prompts)

    def without_effect(self) -> Mapping[str, str]:
        """Settings that other kinds read."""
        return {
            key: f"objective.kind {self.kind} does not read it ({', '.join(kinds)} do)"
            for key, kinds in READ_BY.items()
            if self.kind not in kinds
        }

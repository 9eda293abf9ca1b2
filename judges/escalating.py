"""A small judge first, a larger one only where it is unsure, and nobody's verdict where nobody is sure.

The bands in which a judge is believed come from a file of thresholds, fitted for a target agreement with people by fixed-sequence
tests (Jung et al. 2024, "Trust or Escalate", section 2).
"""

from __future__ import annotations

from itertools import chain
from typing import Annotated, Literal, Self

from msgspec.structs import replace
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from judges.asking import Probability, sha256
from judges.base import CallsFailed, Dialogue, Judge, VerdictError
from judges.panel import Members, Speaker, check_members
from validators import Cause, CheckResult, Exchange, Finding, Opinion, Outcome


class Believed(BaseModel):
    """Where a judge is believed: a score of at least `pass_at` passes, one of at most `fail_at` fails; null means never."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    digest: str
    pass_at: Probability | None
    fail_at: Probability | None

    @model_validator(mode="after")
    def _is_ordered(self) -> Self:
        if self.pass_at is not None and self.fail_at is not None and self.fail_at >= self.pass_at:
            raise ValueError(f"fail_at ({self.fail_at}) is not below pass_at ({self.pass_at})")
        return self

    def outcome(self, score: float) -> Outcome | None:
        """PASS or FAIL, or None where the judge is not to be believed."""
        if self.pass_at is not None and score >= self.pass_at:
            return Outcome.PASS
        if self.fail_at is not None and score <= self.fail_at:
            return Outcome.FAIL
        return None


class JudgeThresholds(BaseModel):
    """The file of thresholds: each judge's band, and what was asked of the fit.

    `target_agreement` is the agreement with people among what the judges decide that holds with probability 1 - `delta`;
    `n` labels were used.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1]
    name: str
    created_at: str
    target_agreement: Probability
    delta: Probability
    n: Annotated[int, Field(ge=1)]
    judges: Annotated[tuple[Believed, ...], Field(min_length=1)]


class Escalating(Judge):
    """Asks the judges in order until the score of one lies where it is believed; an ERROR with cause `unsure` if none does.

    A judge that cannot tell is passed over like one that is unsure. `thresholds` is the path of the JSON file that says where
    each is believed.
    """

    use: Literal["escalating"]
    thresholds: str
    judges: Members

    _thresholds: JudgeThresholds = PrivateAttr()
    _digest: str = PrivateAttr("")

    @model_validator(mode="after")
    def _load(self, info: ValidationInfo) -> Self:
        check_members(self.judges)
        self._thresholds = _read(self.thresholds, info)
        named = [each.id for each in self._thresholds.judges]
        ids = [judge.id for judge in self.judges]
        if named != ids:
            raise ValueError(
                f"thresholds file {self.thresholds!r} is for the judges {', '.join(named)}, in this order, "
                f"not for {', '.join(ids)}"
            )
        members = [[judge.id, judge.digest] for judge in self.judges]
        self._digest = sha256("escalating", members, self._thresholds.model_dump(mode="json"))
        return self

    @property
    def models(self) -> tuple[str, ...]:
        """The judges' models in the order they are asked, each once."""
        return tuple(dict.fromkeys(chain.from_iterable(each.models for each in self.judges)))

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the judges and of the thresholds."""
        return self._digest

    @property
    def stale(self) -> tuple[str, ...]:
        """The ids of judges that are not, or no longer, those the thresholds were fitted for."""
        return tuple(
            judge.id
            for judge, believed in zip(self.judges, self._thresholds.judges, strict=True)
            if judge.digest != believed.digest
        )

    def ask(self, exchange: Exchange, nonce: str) -> Dialogue:
        """Ask one judge after another.

        Raises
        ------
        VerdictError
            If the thresholds are stale.
        Exception
            What went wrong with the last judge, if it could not tell.
        """
        if self.stale:
            raise VerdictError(
                f"the thresholds were fitted for another version of {', '.join(self.stale)}; fit them again"
            )
        cost_usd = 0.0
        said: dict[str, CheckResult] = {}
        error: Exception | None = None
        for judge, believed in zip(self.judges, self._thresholds.judges, strict=True):
            speaker = Speaker(judge, exchange, nonce)
            while speaker.calls:
                try:
                    replies = yield speaker.calls
                except CallsFailed as failed:
                    speaker.answer(failed.outcomes)
                else:
                    cost_usd += sum(reply.cost_usd for reply in replies)
                    speaker.answer(replies)
            error, result = speaker.error, speaker.result
            if result is None or result.score is None:
                continue
            said[judge.id] = result
            outcome = believed.outcome(result.score)
            if result.opinion is None or outcome:
                # Without an opinion no model was asked: a rule has failed it, and a larger judge would not be asked either.
                if outcome is Outcome.FAIL and not result.findings:
                    message = f"the judge {judge.id} is sure that it fails"
                    finding = Finding(exchange.choices[0].path, message, rule=judge.id)
                    result = replace(result, findings=(finding,))
                return self._decided(result, outcome or result.outcome, said, cost_usd)
        if error:
            raise error
        return CheckResult(
            self.id,
            Outcome.ERROR,
            error="no judge is sure",
            cost_usd=cost_usd,
            cause=Cause.UNSURE,
            opinion=_opinion(said),
        )

    def _decided(
        self,
        result: CheckResult,
        outcome: Outcome,
        said: dict[str, CheckResult],
        cost_usd: float,
    ) -> CheckResult:
        return replace(
            result,
            check=self.id,
            outcome=outcome,
            findings=result.findings if outcome is Outcome.FAIL else (),
            cost_usd=cost_usd,
            opinion=_opinion(said),
        )


def _opinion(said: dict[str, CheckResult]) -> Opinion | None:
    opinions = [each.opinion for each in said.values() if each.opinion]
    if not opinions:
        return None
    return replace(
        opinions[-1],
        models=tuple(dict.fromkeys(chain.from_iterable(each.models for each in opinions))),
        parts={name: result.score or 0.0 for name, result in said.items()},
    )


def _read(path: str, info: ValidationInfo) -> JudgeThresholds:
    where = f"thresholds file {path!r}"
    read = (info.context or {}).get("read")
    if read is None:
        raise ValueError(f"{where} cannot be read here: no reader was given")
    try:
        return JudgeThresholds.model_validate_json(read(path))
    except OSError as error:
        raise ValueError(f"{where} cannot be read: {error.strerror or error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "as a whole"
        raise ValueError(f"{where} is wrong at {place}: {first['msg']}") from error

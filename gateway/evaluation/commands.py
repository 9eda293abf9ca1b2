"""`holdgate judge`: what the command line takes; the work is done by `gateway.evaluation.measuring`, loaded when it is needed."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from gateway.terminal import ConfigOption, config_path, fail, settings_at

judge = typer.Typer(
    no_args_is_help=True, help="Measure judges against people's labels, and fit cascades of them."
)

LabelsOption = Annotated[
    Path | None, typer.Option(help="JSON Lines: id, request, response, acceptable")
]
ReviewsOption = Annotated[
    bool, typer.Option("--from-reviews", help="take what people decided in review as labels")
]
PolicyOption = Annotated[str | None, typer.Option(help="the policy that has the check")]
CheckOption = Annotated[str | None, typer.Option(help="the id of the check")]
ConcurrencyOption = Annotated[int, typer.Option(min=1, max=256, help="questions at once")]
BudgetOption = Annotated[
    float | None, typer.Option("--budget-usd", min=0, help="what this run may spend at most")
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="go on with the results that are there")
]


@judge.command("eval")
def evaluate(
    labels: LabelsOption = None,
    from_reviews: ReviewsOption = False,
    attack: Annotated[
        bool,
        typer.Option("--attack", help="the corpus of attacks in place of labels: a table only"),
    ] = False,
    rubric: Annotated[Path | None, typer.Option(help="the rubric file of the judge")] = None,
    model: Annotated[str | None, typer.Option(help="the model that judges by it")] = None,
    method: Annotated[str, typer.Option(help="logprob, votes or verbalised")] = "logprob",
    policy: PolicyOption = None,
    check: CheckOption = None,
    swap: Annotated[
        bool, typer.Option("--swap", help="ask again with answer and reference exchanged")
    ] = False,
    require: Annotated[
        list[str] | None, typer.Option(help="such as kappa>=0.6; exits 3 if it is not so")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="the report")] = Path("judge.html"),
    concurrency: ConcurrencyOption = 8,
    budget_usd: BudgetOption = None,
    resume: ResumeOption = False,
    config: ConfigOption = None,
) -> None:
    """Measure a judge against labels: a table, and a report as one HTML file; verdicts are kept beside it.

    The judge is a rubric with a model, or a check of a policy. Exits 0; 1 on an error; 3 if a requirement is missed or an attack
    got through; 4 if the budget was used up before the end.
    """
    measuring = _measuring()
    settings = settings_at(config_path(config))
    run = measuring.Run(settings, out, concurrency, budget_usd, resume)
    with measuring.told():
        named = measuring.named_judge(
            settings, rubric=rubric, model=model, method=method, policy=policy, check=check
        )
        if attack:
            status = measuring.attack(run, named)
        else:
            cases = measuring.cases_of(settings, labels, from_reviews=from_reviews)
            wanted = measuring.requirements(require or [])
            status = measuring.evaluate(run, named, cases, wanted, swap=swap)
    raise typer.Exit(status)


@judge.command()
def fit(
    policy: Annotated[str, typer.Option(help="the policy that has the check")],
    check: Annotated[str, typer.Option(help="the id of the check, use: escalating")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="the thresholds file, such as calibrators/x.json")
    ],
    labels: LabelsOption = None,
    from_reviews: ReviewsOption = False,
    target_agreement: Annotated[
        float, typer.Option(min=0.5, max=0.999, help="how often people must agree with it")
    ] = 0.85,
    delta: Annotated[
        float, typer.Option(min=0.001, max=0.5, help="how likely that may be broken")
    ] = 0.1,
    concurrency: ConcurrencyOption = 8,
    budget_usd: BudgetOption = None,
    resume: ResumeOption = False,
    config: ConfigOption = None,
) -> None:
    """Fit the thresholds of a cascade of judges for a target agreement with people.

    Exits 0; 1 on an error; 3 if these labels do not prove the target, in which case the file says that nobody is to be believed
    and all goes to a person; 4 if the budget was used up before the end, and nothing is written.
    """
    measuring = _measuring()
    settings = settings_at(config_path(config))
    run = measuring.Run(settings, out, concurrency, budget_usd, resume)
    with measuring.told():
        judges = measuring.cascade_of(settings, policy, check)
        cases = measuring.cases_of(settings, labels, from_reviews=from_reviews)
        target = measuring.Target(target_agreement, delta)
        status = measuring.fit(run, judges, cases, target)
    raise typer.Exit(status)


def _measuring() -> ModuleType:
    try:
        from gateway.evaluation import measuring  # noqa: PLC0415 - needs the extra `analysis`
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("numpy", "plotly", "scipy", "sklearn"):
            raise
        fail(f"This needs {missing}: install holdgate[analysis].")
    return measuring

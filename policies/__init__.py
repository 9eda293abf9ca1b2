"""From evidence to a decision: the policy document, the cascade, confidence, risk. Pure."""

from __future__ import annotations

from policies.auditing import AuditLevel
from policies.calibration import (
    CalibrationError,
    Calibrator,
    artefact_schema,
    is_calibrator,
    load_calibrator,
)
from policies.cascade import RunStage, Settle, next_step, run_validators, start, vetted
from policies.decision import Decision, Zone, decide, to_json
from policies.evidence import Estimate, Evidence, Reason, estimate
from policies.expressions import ExpressionError, MissingValue, Variables
from policies.lint import staleness
from policies.loading import json_schema, load_policies, load_policy
from policies.match import Facts, Match, PolicySet
from policies.model import Action, Band, Mode, Policy, RiskTier, Stage, StreamMode, parse_duration_s
from policies.risk import RiskAssessment, assess
from policies.signals import FieldSignal, field_signals
from policies.source import PolicyError, Problem
from policies.streaming import effective_stream
from policies.thresholds import band

__all__ = [
    "Action",
    "AuditLevel",
    "Band",
    "CalibrationError",
    "Calibrator",
    "Decision",
    "Estimate",
    "Evidence",
    "ExpressionError",
    "Facts",
    "FieldSignal",
    "Match",
    "MissingValue",
    "Mode",
    "Policy",
    "PolicyError",
    "PolicySet",
    "Problem",
    "Reason",
    "RiskAssessment",
    "RiskTier",
    "RunStage",
    "Settle",
    "Stage",
    "StreamMode",
    "Variables",
    "Zone",
    "artefact_schema",
    "assess",
    "band",
    "decide",
    "effective_stream",
    "estimate",
    "field_signals",
    "is_calibrator",
    "json_schema",
    "load_calibrator",
    "load_policies",
    "load_policy",
    "next_step",
    "parse_duration_s",
    "run_validators",
    "staleness",
    "start",
    "to_json",
    "vetted",
]

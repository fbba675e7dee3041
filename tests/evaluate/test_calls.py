"""Figures of pictures that were made with fewer model calls say so wherever they go."""

from __future__ import annotations

import json

from qdeploy.evaluate.report import list_facts
from qdeploy.evaluate.result import EvaluationResult
from qdeploy.evaluate.run import options_to_json, write_notes
from qdeploy.evaluate.settings import EvaluationSettings
from qdeploy.sampling.call_schedule import CallSchedule
from qdeploy.sampling.forecast import Forecast


def test_settings_notes_and_rows_name_the_calls() -> None:
    settings = EvaluationSettings(calls=CallSchedule((0.2, 0.8), Forecast("linear")))
    options = json.loads(json.dumps(options_to_json(settings)))
    assert options["guidance_interval"] == [0.2, 0.8]
    assert options["forecast"]["method"] == "linear"
    words = "guidance on 0.2 to 0.8 of the schedule, calls forecast by linear:warmup=0.12"
    assert words in options["calls"]
    assert words in write_notes(settings, None, None, None)[0]
    assert words in str(dict(list_facts(EvaluationResult(options, {}, None, None, ())))["calls"])


def test_every_call_says_nothing() -> None:
    options = options_to_json(EvaluationSettings())
    assert options["calls"] == ""
    assert not {"guidance_interval", "forecast"} & options.keys()

"""The app through streamlit's own test runner: addresses in, verdicts and charts out, no browser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

pytest.importorskip("streamlit")

from streamlit.testing.v1 import AppTest

import planner
from planner.errors import PlannerError, SourceUnavailable, UnknownName
from planner.readers.plan_document import plan_from_text
from planner.units import format_bytes

ROOT = Path(__file__).parents[2]


def opened(**query: str) -> AppTest:
    app = AppTest.from_file(str(ROOT / "app.py"), default_timeout=30)
    for name, value in query.items():
        app.query_params[name] = value
    app.run()
    assert not app.exception, [error.value for error in app.exception]
    return app


def verdict(app: AppTest) -> str:
    found = [box.value for box in (*app.success, *app.warning, *app.error)]
    assert len(found) == 1, found
    return found[0]


def refusals(app: AppTest) -> list[str]:
    return [box.value for box in app.info if "Not answered" in box.value]


def address(app: AppTest) -> dict[str, str]:
    link = next(code.value for code in app.code if code.value.startswith("?") or "?v=" in code.value)
    return {name: values[0] for name, values in parse_qs(urlsplit(link).query).items()}


def answer_of(query: dict[str, str]) -> dict[str, Any]:
    method: dict[str, Any] = {"name": query["method"]}
    if query["method"] != "full":
        method |= {"rank": int(query["rank"]), "targets": query["targets"]}
    document = {
        "model": query["model"],
        "method": method,
        "data": {"sequence_length": int(query["seq"]), "micro_batch_size": int(query["batch"])},
        "recompute": query["recompute"],
        "precision": query["precision"],
        "parallelism": {"zero": int(query["zero"])},
        "hardware": {"gpu": query["gpu"], "gpus_per_node": int(query["gpus"])},
    }
    return planner.estimate(document).to_dict()


def test_the_first_screen_answers_a_person_with_one_24_gb_card() -> None:
    app = opened()
    assert app.selectbox(key="gpu").value == "rtx-4090"
    expected = answer_of(address(app))
    assert format_bytes(abs(expected["verdict"]["head_room_bytes"])) in verdict(app)


@pytest.mark.parametrize(
    "query",
    [
        {"model": "Llama-3.1-8B", "method": "full", "gpu": "rtx-4090"},
        {"model": "Qwen3-14B", "method": "lora", "gpu": "h100-sxm", "seq": "4096", "batch": "2", "recompute": "none"},
        {"model": "mistralai/Mistral-7B-v0.1", "method": "qlora", "gpu": "4090"},
        {
            "model": "Llama-3.1-8B",
            "method": "full",
            "gpu": "h100-sxm",
            "gpus": "8",
            "zero": "3",
            "precision": "bf16-amp",
        },
    ],
    ids=["does not fit", "one GPU", "other spellings", "sharded"],
)
def test_an_address_is_a_plan_and_the_page_says_what_the_library_says(query: dict[str, str]) -> None:
    app = opened(**query)
    link = address(app)
    assert {name: link[name] for name in query} == query
    expected = answer_of(link)
    sentence = verdict(app)
    assert sentence.startswith({"fits": "**Fits", "tight": "**Tight"}.get(expected["verdict"]["outcome"], "**Does not"))
    assert format_bytes(abs(expected["verdict"]["head_room_bytes"])) in sentence
    chart = json.loads(app.get("plotly_chart")[0].proto.spec)
    drawn = sum(trace["x"][0] for trace in chart["data"] if trace["type"] == "bar")
    assert drawn == expected["memory"]["device_used"]


def test_a_permalink_holds_every_control_and_opens_the_same_page() -> None:
    first = opened(model="gpt2", method="full", seq="1024", batch="4", recompute="none", gpu="t4", unit="GB")
    link = address(first)
    controls = {*(box.key for box in (*first.selectbox, *first.number_input)), "method", "recompute", "unit"}
    assert set(link) == controls | {"v"}
    second = opened(**link)
    assert address(second) == link
    assert verdict(second) == verdict(first)


def test_bad_input_keeps_the_last_answer_and_says_why_in_one_sentence() -> None:
    app = opened()
    before = verdict(app)
    app.selectbox(key="precision").set_value("fp8-mixed").run()
    assert not app.exception
    assert verdict(app) == before
    (sentence,) = refusals(app)
    with pytest.raises(PlannerError) as error:
        answer_of({**address(app)})
    assert str(error.value) in sentence.replace("\\", "")
    assert "last answer, for Llama-3.1-8B" in sentence.replace("\\", "")
    app.selectbox(key="precision").set_value("bf16-amp").run()
    assert not refusals(app) and verdict(app) != before


def test_an_unknown_model_is_fetched_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    # A name from the list stands for an unknown one: streamlit's test runner cannot carry a typed option over a rerun.
    asked: list[bool] = []
    real = planner.load_model

    def load_model(model: Any, *, fetch: bool = False) -> Any:
        if model != "gpt2-xl":
            return real(model, fetch=fetch)
        asked.append(fetch)
        if not any(asked):
            raise UnknownName("gpt2-xl is not known.")
        return real("gpt2")

    for place in ("planner.api.load_model", "planner.readers.models.load_model"):
        monkeypatch.setattr(place, load_model)
    app = opened(model="gpt2-xl")
    assert refusals(app) and not any(asked)
    app.button(key="fetch").click().run()
    assert not app.exception
    assert not refusals(app)
    assert asked.count(True) == 1
    assert "Fits" in verdict(app)


def test_a_model_that_cannot_be_fetched_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_model(model: Any, *, fetch: bool = False) -> Any:
        raise SourceUnavailable("the hub is out of reach") if fetch else UnknownName(f"{model} is not known")

    for place in ("planner.api.load_model", "planner.readers.models.load_model"):
        monkeypatch.setattr(place, load_model)
    app = opened(model="gpt2-xl")
    app.button(key="fetch").click().run()
    assert not app.exception
    assert any("out of reach" in sentence for sentence in refusals(app))


def test_an_address_without_an_answer_says_so_alone() -> None:
    app = opened(model="Llama-9.9-8B")
    (sentence,) = refusals(app)
    assert "Llama-9.9-8B" in sentence.replace("\\", "")
    assert not (*app.success, *app.warning, *app.error)


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ({"seq": "abc"}, 'seq "abc"'),
        ({"batch": "-4"}, 'batch "-4"'),
        ({"method": "magic"}, 'method "magic"'),
        ({"bacth": "4"}, 'did you mean "batch"'),
        ({"v": "7"}, "schema 7"),
    ],
)
def test_what_an_address_asks_in_vain_is_said(query: dict[str, str], named: str) -> None:
    app = opened(**query)
    assert any(named in box.value for box in app.info), [box.value for box in app.info]
    assert verdict(app)


def test_a_control_changes_the_answer_without_a_button() -> None:
    app = opened()
    before = verdict(app)
    app.number_input(key="seq").set_value(8192).run()
    assert verdict(app) != before
    assert not app.button


def test_the_unit_switch_reaches_every_size() -> None:
    app = opened(unit="GB")
    shown = [verdict(app), *(caption.value for caption in app.caption), *app.table[0].value.to_csv().splitlines()]
    shown += [chart.proto.spec for chart in app.get("plotly_chart")]
    assert any(" GB" in text for text in shown)
    assert not [text[:200] for text in shown if "GiB" in text]


def test_the_plan_that_is_downloaded_gives_the_same_answer() -> None:
    from planner.writers.plan_document import plan_to_yaml

    app = opened(method="lora", seq="512", model="gpt2-medium")
    estimate = planner.estimate(
        {
            "model": "gpt2-medium",
            "method": {"name": "lora", "rank": 16, "targets": "all-linear"},
            "data": {"sequence_length": 512},
            "recompute": "full",
            "hardware": {"gpu": "rtx-4090"},
        }
    )
    again = planner.estimate(plan_from_text(plan_to_yaml(estimate.plan))).to_dict()
    assert again["memory"]["peak_allocated"] == estimate.to_dict()["memory"]["peak_allocated"]
    assert format_bytes(again["verdict"]["head_room_bytes"]) in verdict(app)
    labels = [button.label for button in app.get("download_button")]
    assert labels == ["Plan (YAML)", "Answer (JSON)"]


def test_every_chart_has_words_for_those_who_do_not_see_it() -> None:
    app = opened()
    for chart in app.get("plotly_chart"):
        assert "GiB" in chart.proto.alt


def test_the_serving_page_says_what_the_library_says() -> None:
    app = opened()
    app.switch_page("planner/ui/pages/serve.py").run()
    assert not app.exception, [error.value for error in app.exception]
    expected = planner.estimate(
        {
            "kind": "serving",
            "model": "Llama-3.1-8B",
            "requests": {"context_length": 8192, "concurrency": 8},
            "hardware": {"gpu": "rtx-4090"},
        }
    ).to_dict()
    assert format_bytes(abs(expected["verdict"]["head_room_bytes"])) in verdict(app)
    chart = json.loads(app.get("plotly_chart")[0].proto.spec)
    drawn = sum(trace["x"][0] for trace in chart["data"] if trace["type"] == "bar")
    assert drawn == expected["memory"]["device_used"]
    assert f"{expected['memory']['kv_token_capacity']:,}" in app.table[1].value.to_csv()

"""Routes beside the two that write: models, metrics, and places for pages."""

import pytest
from fake_engine import SAID, client_of, language_model
from fastapi import APIRouter, Depends
from prometheus_client.parser import text_string_to_metric_families

from openmythos.inference.server.schemas import Health, ModelCard, ModelList
from openmythos.inference.server.serving import Serving, length_limit, serving
from openmythos.model.halting import HALTING


def samples(client):
    page = client.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name, *(v for k, v in sorted(sample.labels.items()) if k != "model_name")): sample
        for family in text_string_to_metric_families(page.text)
        for sample in family.samples
    }


def test_the_model_is_listed_with_its_limits():
    with client_of(max_loops=9, max_length=50) as client:
        listed = ModelList.model_validate(client.get("/v1/models").json())
        (card,) = listed.data
        assert (card.id, card.max_model_len, card.mean_loops, card.max_loops) == ("mouse", 50, 3, 9)
        assert card.halting == [name for name in HALTING if name != "act"]  # it did not learn it
        assert ModelCard.model_validate(client.get("/v1/models/mouse").json()) == card


def test_metrics_count_tokens_loops_and_time():
    made = len(language_model().tokenizer.encode(SAID)) + 1
    with client_of() as client:
        for stream in (False, True):
            body = {"prompt": "a", "n": 2, "max_tokens": 40, "stream": stream}
            assert client.post("/v1/completions", json=body).status_code == 200
        client.get("/nowhere")
        values = {key: sample.value for key, sample in samples(client).items()}
    expected = {
        ("prompt_tokens_total",): 4,
        ("generation_tokens_total",): 4 * made,
        ("loops_total",): 4 * made * 3,
        ("prompt_loops_total",): 2 * 2 * 2,
        ("request_success_total", "stop"): 4,
        ("time_to_first_token_seconds_count",): 2,
        ("inter_token_latency_seconds_count",): 4 * (made - 1),
        ("e2e_request_latency_seconds_count",): 4,
        ("request_prompt_tokens_sum",): 4,
        ("request_generation_tokens_sum",): 4 * made,
        ("request_mean_loops_sum",): 4 * 3,
        ("http_requests_total", "/v1/completions", "200"): 2,
        ("http_requests_total", "other", "404"): 1,
        ("num_requests_running",): 2,
        ("num_requests_waiting",): 0,
        ("kv_cache_usage_perc",): 0.375,
        ("prefix_cache_queries_total",): 0,
        ("spec_decode_num_draft_tokens_total",): 0,
        ("spec_decode_num_accepted_tokens_total",): 0,
    }
    for (name, *labels), value in expected.items():
        assert values[(f"openmythos:{name}", *labels)] == value, name


def test_a_prompt_that_was_never_read_is_not_counted():
    with client_of(lambda run: run.finish("cancelled")) as client:
        assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 503
        assert samples(client)[("openmythos:prompt_tokens_total",)].value == 0
        # Nor how long it took: what is given up at once would look quick.
        assert samples(client)[("openmythos:e2e_request_latency_seconds_count",)].value == 0


def test_every_metric_of_the_model_bears_its_name():
    with client_of() as client:
        client.post("/v1/completions", json={"prompt": "a"})
        for (name, *_), sample in samples(client).items():
            if "http_requests" not in name:
                assert sample.labels["model_name"] == "mouse", name


def test_pages_are_added_by_routes_and_a_folder(tmp_path):
    (tmp_path / "index.html").write_text("<p>mouse</p>")
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1" / "models").write_text("hidden")
    router = APIRouter()

    @router.get("/name")
    def name(server: Serving = Depends(serving)):  # noqa: B008 - FastAPI's way
        return {"name": server.name}

    with client_of(routers=[router], static=tmp_path, api_key="k") as client:
        assert client.get("/").text == "<p>mouse</p>"
        assert client.get("/name").json() == {"name": "mouse"}
        headers = {"Authorization": "Bearer k"}
        assert client.get("/v1/models", headers=headers).json()["object"] == "list"
        assert client.get("/../../etc/passwd").status_code == 404
        assert client.get("/none.js").json()["error"]["code"] == "not_found"
        missing = client.post("/v1/embeddings", headers=headers)  # no file takes what is sent
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
        for method in ("GET", "PUT", "DELETE", "OPTIONS"):  # a route's, and no file of that name
            response = client.request(method, "/v1/completions", headers=headers)
            assert (response.status_code, response.headers["Allow"]) == (405, "POST")


ASKS = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}


def test_a_page_elsewhere_may_ask_only_where_it_was_allowed():
    with client_of(api_key="k", allowed_origins=("https://a.org",)) as client:
        for origin, allowed in [("https://a.org", "https://a.org"), ("https://b.org", None)]:
            # A browser sends no key with the question whether it may.
            before = client.options("/v1/completions", headers={"Origin": origin, **ASKS})
            assert before.status_code == (200 if allowed else 400)
            assert before.headers.get("Access-Control-Allow-Origin") == allowed
            asked = {"Origin": origin, "Authorization": "Bearer k"}
            for headers, status in [(asked, 200), ({"Origin": origin}, 401)]:
                answer = client.post("/v1/completions", json={"prompt": "a"}, headers=headers)
                assert answer.status_code == status
                assert answer.headers.get("Access-Control-Allow-Origin") == allowed
        allowed = client.options("/v1/models", headers={"Origin": "https://a.org", **ASKS}).headers
        assert allowed["Access-Control-Allow-Headers"] == "authorization"
    with client_of(allowed_origins=("*",)) as client:
        answer = client.get("/v1/models", headers={"Origin": "https://b.org"})
        assert answer.headers["Access-Control-Allow-Origin"] == "*"
    with client_of() as client:
        answer = client.options("/v1/models", headers={"Origin": "https://b.org", **ASKS})
        assert "Access-Control-Allow-Origin" not in answer.headers
        assert answer.status_code == 405


def test_the_interface_is_described_without_pages_from_elsewhere():
    with client_of() as client:
        described = client.get("/openapi.json").json()
        assert {"/v1/completions", "/v1/chat/completions", "/v1/models"} <= set(described["paths"])
        answers = described["paths"]["/v1/completions"]["post"]["responses"]
        for status in ("400", "401", "413", "422", "429", "503"):
            body = answers[status]["content"]["application/json"]["schema"]
            assert body == {"$ref": "#/components/schemas/ErrorBody"}
        assert client.get("/docs").status_code == client.get("/redoc").status_code == 404


def test_the_description_names_the_key_where_one_is_wanted():
    with client_of(api_key="k") as client:
        described = client.get("/openapi.json").json()
        (name,) = described["components"]["securitySchemes"]
        for path, operations in described["paths"].items():
            for operation in operations.values():
                wanted = [{name: []}] if path.startswith("/v1/") else None
                assert operation.get("security") == wanted, path
    with client_of() as client:
        assert "securitySchemes" not in client.get("/openapi.json").json()["components"]


def test_health_and_metrics_are_described_as_they_are():
    with client_of() as client:
        paths = client.get("/openapi.json").json()["paths"]
        for status in ("200", "503"):
            body = paths["/health"]["get"]["responses"][status]["content"]["application/json"]
            assert body["schema"] == {"$ref": "#/components/schemas/Health"}
        Health.model_validate(client.get("/health").json())
        assert client.head("/health").status_code == client.get("/health").status_code
        assert set(paths["/metrics"]["get"]["responses"]["200"]["content"]) == {"text/plain"}


def test_bodies_are_described_as_strictly_as_they_are_read():
    with client_of() as client:
        schemas = client.get("/openapi.json").json()["components"]["schemas"]
    for name in ("CompletionBody", "ChatBody", "ChatMessage", "StreamOptions", "JsonSchema"):
        assert schemas[name]["additionalProperties"] == {"type": "null"}, name
    assert schemas["ChatBody"]["properties"]["frequency_penalty"] == {"enum": [0, None]}
    assert schemas["ChatBody"]["properties"]["user"] == {}
    assert schemas["ChatMessage"]["required"] == ["role", "content"]
    assert {"type": "null"} not in schemas["ChatMessage"]["properties"]["content"]["anyOf"]
    assert schemas["TextPart"]["required"] == ["type", "text"]
    assert schemas["TextPart"]["properties"]["type"]["const"] == "text"


def test_the_length_is_the_models_or_less():
    assert length_limit(None, 64) == length_limit(64, 64) == 64
    assert length_limit(5, 64) == 5
    with pytest.raises(ValueError, match="max_model_len=65 must be at most the model's max_length"):
        length_limit(65, 64)

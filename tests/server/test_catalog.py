"""The routes that say what is served."""

from __future__ import annotations

from tests.server.conftest import LAYER, Server
from tests.support.models import D_MODEL
from tests.support.saes import D_SAE


def test_saes_are_listed_with_their_place_files_and_labels(server: Server) -> None:
    (sae,) = server.http.get("/v1/steering/saes").json()["data"]
    assert (sae["name"], sae["architecture"], sae["d_in"], sae["d_sae"]) == (
        "demo",
        "jumprelu",
        D_MODEL,
        D_SAE,
    )
    assert (sae["hook_point"], sae["layer"], sae["statistics"]) == (f"resid_post.{LAYER}", LAYER, False)
    assert set(sae["files"]) == {"cfg.json", "sae_weights.safetensors"}
    assert sae["labels"][0] == {"feature": 7, "label": "legal", "domain": "law", "f1": 0.9}


def test_labels_come_in_pages(server: Server) -> None:
    (sae,) = server.http.get("/v1/steering/saes", params={"limit": 1, "offset": 1}).json()["data"]
    assert ([label["label"] for label in sae["labels"]], sae["labels_total"]) == (["food"], 2)
    assert server.http.get("/v1/steering/saes", params={"limit": 10**9}).status_code == 400


def test_directions_are_listed(server: Server) -> None:
    (direction,) = server.http.get("/v1/steering/directions").json()["data"]
    assert direction == {
        "name": "french",
        "d_in": D_MODEL,
        "hook_point": f"resid_post.{LAYER}",
        "layer": LAYER,
    }


def test_capabilities_name_what_a_request_may_ask_for(server: Server) -> None:
    can = server.http.get("/v1/steering/capabilities").json()
    assert [op["op"] for op in can["ops"]] == ["clamp", "ablate", "scale", "add", "at_least", "at_most"]
    assert (can["model"], can["error_modes"]) == ("tiny", ["keep"])
    assert can["limits"]["interventions"] == 16
    assert {"/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"} <= set(can["routes"])
    assert "/cohere/v2/chat" not in can["routes"]


def test_the_routes_are_documented_with_types(server: Server) -> None:
    paths = server.http.get("/openapi.json").json()["paths"]
    schema = paths["/v1/steering/saes"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert schema["$ref"].endswith("/SaeList")

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.routing import compile_path

from steerserve.access.scopes import required_scope, runs_model
from steerserve.server.routing import CARRYING, path_of

OPEN = ["/health", "/ping", "/version", "/metrics", "/load"]
MODEL = [
    *CARRYING,
    "/classify",
    "/pooling",
    "/rerank",
    "/score",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
    "/v1/embeddings",
    "/v1/rerank",
    "/v1/score",
    "/v2/embed",
    "/v2/rerank",
]
PREPARING = [
    "/tokenize",
    "/detokenize",
    "/v1/chat/completions/render",
    "/v1/messages/count_tokens",
    "/v1/responses/resp_0aF-9/cancel",
]
DANGEROUS = [
    "/abort_requests",
    "/collective_rpc",
    "/fault_tolerance/apply",
    "/finish_weight_update",
    "/inference/v1/abort_requests",
    "/init_weight_transfer_engine",
    "/is_sleeping",
    "/pause",
    "/release_kv_cache_memory",
    "/reset_encoder_cache",
    "/reset_mm_cache",
    "/reset_prefix_cache",
    "/resume",
    "/scale_elastic_ep",
    "/server_info",
    "/sleep",
    "/start_profile",
    "/stop_profile",
    "/update_weights",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/wake_up",
    "/weight_checker",
]
TRICKS = [
    "",
    "/",
    "*",
    "//health",
    "//v1/chat/completions",
    "/%761/completions",
    "/./v1/completions",
    "/HEALTH",
    "/V1/completions",
    "/health\n",
    "/health/",
    "/health/../v1/steering",
    "/health;x",
    "/health?x",
    "/health\0",
    "/metrics/x",
    "/ping ",
    "/v1/chat/completions\n",
    "/v1/chat/completions/",
    "/v1/completions/../load_lora_adapter",
    "/v1/load_lora_adapter\n",
    "/v1/models/x",
    "/v1/responses/x/cancel\n",
    "/v1/responses/x/y/cancel",
    "/v1/steeringx",
    "/v1\\completions",
    "\\health",
    "health",
    "http://host/health",
    "/vⅠ/completions",
]


@pytest.mark.parametrize("path", OPEN)
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
def test_probes_are_open(method: str, path: str) -> None:
    assert required_scope(method, path) is None


@pytest.mark.parametrize("path", OPEN)
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "TRACE", "get", ""])
def test_probes_are_open_to_be_read_alone(method: str, path: str) -> None:
    assert required_scope(method, path) == "admin"


@pytest.mark.parametrize("path", MODEL)
def test_routes_that_run_the_model_need_infer_and_count(path: str) -> None:
    assert required_scope("POST", path) == "infer"
    assert runs_model("POST", path)
    assert required_scope("GET", path) == "admin"
    assert not runs_model("GET", path)


@pytest.mark.parametrize("path", PREPARING)
def test_routes_that_only_prepare_need_infer_and_do_not_count(path: str) -> None:
    assert required_scope("POST", path) == "infer"
    assert not runs_model("POST", path)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/responses/resp_0aF-9"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_what_a_client_reads_needs_infer(method: str, path: str) -> None:
    assert required_scope(method, path) == "infer"


@pytest.mark.parametrize(
    "path",
    ["/v1/steering", "/v1/steering/saes", "/v1/steering/policies/a", "/openapi.json", "/docs", "/redoc"],
)
def test_looking_needs_inspect_and_changing_needs_admin(path: str) -> None:
    assert {required_scope(method, path) for method in ("GET", "HEAD")} == {"inspect"}
    assert {required_scope(method, path) for method in ("PUT", "POST", "PATCH", "DELETE")} == {"admin"}


@pytest.mark.parametrize("path", DANGEROUS)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE"])
def test_routes_that_steer_the_server_need_admin(method: str, path: str) -> None:
    assert required_scope(method, path) == "admin"


@pytest.mark.parametrize("path", TRICKS)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
def test_a_path_that_is_spelled_otherwise_needs_admin(method: str, path: str) -> None:
    assert required_scope(method, path) == "admin"
    assert not runs_model(method, path)


def test_the_router_takes_a_line_feed_behind_a_path_so_rules_by_prefix_would_not_hold() -> None:
    pattern, *_ = compile_path("/v1/load_lora_adapter")
    assert pattern.match("/v1/load_lora_adapter\n")


@given(st.text(), st.text())
def test_whatever_is_not_listed_needs_admin(method: str, path: str) -> None:
    assert method == "OPTIONS" or required_scope(method, "/zz" + path) == "admin"
    assert required_scope("POST", "/v1/zz" + path) == "admin"


@pytest.mark.parametrize(
    ("path", "root", "scope"),
    [
        ("/api/health", "/api", None),
        ("/api/v1/load_lora_adapter", "/api", "admin"),
        ("/apihealth", "/api", "admin"),
        ("/api//health", "/api", "admin"),
        ("/health", "/api", None),
    ],
)
def test_the_prefix_of_a_mounted_server_is_left_out(path: str, root: str, scope: str | None) -> None:
    assert required_scope("GET", path_of({"path": path, "root_path": root})) == scope

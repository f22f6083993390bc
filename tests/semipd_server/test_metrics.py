import asyncio
import json
import re
from dataclasses import replace
from importlib.resources import files

import pytest
from openai_rig import openai_client, request, while_serving
from prometheus_client.parser import text_string_to_metric_families
from server_rig import Rig, Start

from semipd_server.front_end import FrontEnd
from semipd_server.settings import Settings

SECRET = "a prompt that nobody else may see"


async def scrape(rig: Rig) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Samples by name and labels."""
    reply = await request(rig, "GET", "/metrics")
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/plain")
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(reply.text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


def only(samples: dict[tuple[tuple[str, str], ...], float], **labels: str) -> float:
    [value] = [v for key, v in samples.items() if labels.items() <= dict(key).items()]
    return value


def test_metrics_are_vllms_and_add_up(start: Start):
    async def main():
        async with start() as rig, openai_client(rig) as client:
            create = client.completions.create
            await while_serving(rig, create(model="tiny", prompt=[5, 6, 7], max_tokens=4, n=2))
            with pytest.raises(Exception, match="top_p"):
                await create(model="tiny", prompt=[5], top_p=9)
            found = await scrape(rig)
            assert only(found["semipd:prompt_tokens_total"]) == 6
            assert only(found["semipd:generation_tokens_total"]) == 8
            success = found["semipd:request_success_total"]
            assert {dict(key)["finished_reason"]: value for key, value in success.items()} == {
                "length": 2,
                "stop": 0,
                "abort": 0,
                "error": 0,
            }
            assert only(found["semipd:request_refusals_total"], reason="invalid") == 1
            counts = {
                "time_to_first_token_seconds": 2,
                "inter_token_latency_seconds": 6,
                "request_time_per_output_token_seconds": 2,
                "e2e_request_latency_seconds": 2,
                "request_queue_time_seconds": 2,
                "request_prompt_tokens": 2,
                "request_generation_tokens": 2,
            }
            for name, count in counts.items():
                assert only(found[f"semipd:{name}_count"]) == count, name
                assert only(found[f"semipd:{name}_bucket"], le="+Inf") == count
                steps = [
                    v
                    for _, v in sorted(
                        (float(dict(key)["le"]), v)
                        for key, v in found[f"semipd:{name}_bucket"].items()
                    )
                ]
                assert steps == sorted(steps)
            assert only(found["semipd:num_requests_running"]) == 0
            assert only(found["semipd:kv_cache_usage_perc"]) == 0
            assert sum(found["semipd:kv_pages"].values()) == 100
            assert (
                only(found["semipd:cache_config_info"], block_size="16", num_gpu_blocks="100") == 1
            )
            assert only(found["semipd:up"]) == 1
            assert only(found["process_resident_memory_bytes"]) > 0
            labels = {dict(key).get("model_name") for name in found for key in found[name]}
            assert labels == {"tiny", None}

    asyncio.run(main())


def test_the_prefix_can_be_vllms(start: Start):
    async def main():
        settings = Settings(port=0, http_port=0, metrics_prefix="vllm")
        async with start(settings=settings) as rig:
            found = await scrape(rig)
            ours = {name for name in found if not name.startswith("process_")}
            assert "vllm:num_requests_waiting" in ours
            assert all(name.startswith("vllm:") for name in ours)

    asyncio.run(main())


def test_what_clients_send_makes_no_series_and_shows_nowhere(start: Start):
    async def main():
        async with start() as rig:
            before = (await request(rig, "GET", "/metrics")).text
            for i in range(5):
                body = {"prompt": f"{SECRET} {i}", "max_tokens": 1, "user": f"user-{i}"}
                await request(
                    rig, "POST", "/v1/completions", json=body, headers={"x-request-id": f"id-{i}"}
                )
                await request(rig, "GET", f"/no-such-route-{i}")
                await request(
                    rig, "POST", "/v1/completions", json={"model": f"m{i}", "prompt": "x"}
                )
            after = (await request(rig, "GET", "/metrics")).text
            assert len(before.splitlines()) == len(after.splitlines())
            assert not re.search("prompt that|user-|id-|no-such|m0", after)

    asyncio.run(main())


def test_a_scrape_without_an_engine_says_so(start: Start):
    async def main():
        starting = FrontEnd(Settings(port=0, http_port=0), max_model_len=64, max_calls=10)
        _, url = await starting.start()
        async with start() as rig:
            found = await scrape(replace(rig, url=url or ""))
            assert only(found["semipd:up"]) == 0
            assert "semipd:num_requests_running" not in found
        await starting.stop()

    asyncio.run(main())


def test_openmetrics_is_spoken_to_those_who_ask(start: Start):
    async def main():
        async with start() as rig:
            headers = {"accept": "application/openmetrics-text; version=1.0.0"}
            reply = await request(rig, "GET", "/metrics", headers=headers)
            assert reply.headers["content-type"].startswith("application/openmetrics-text")
            assert reply.text.endswith("# EOF\n")

    asyncio.run(main())


@pytest.mark.parametrize("version", ["abc", "2.x", "2.0.0", "1.0.0.a", "1.0.0;version=x", ""])
@pytest.mark.parametrize("kind", ["application/openmetrics-text", "text/plain"])
def test_who_asks_for_a_version_that_is_not_there_gets_plain_text(
    start: Start, kind: str, version: str
):
    async def main():
        async with start() as rig:
            headers = {"accept": f"{kind}; version={version}"}
            reply = await request(rig, "GET", "/metrics", headers=headers)
            assert reply.status_code == 200
            assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")

    asyncio.run(main())


def test_every_metric_of_the_dashboard_exists(start: Start):
    dashboard = json.loads(files("semipd_server").joinpath("grafana.json").read_text("utf-8"))
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    variables = {v["name"]: v["query"] for v in dashboard["templating"]["list"]}
    queries.append(variables["model"].replace(", ", "{").replace(")", "=~'.*'})"))
    assert all("${prefix}:" in query for query in queries)
    queries = [query.replace("${prefix}", variables["prefix"]) for query in queries]
    named = {name for query in queries for name in re.findall(r"\w+:\w+", query)}
    assert len(panels) >= 10
    assert named

    async def main():
        async with start() as rig, openai_client(rig) as client:
            create = client.completions.create(model="tiny", prompt=[5], max_tokens=1)
            await while_serving(rig, create)
            found = await scrape(rig)
            assert named <= found.keys(), named - found.keys()
            for query in queries:
                for name, labels in re.findall(r"(\w+:\w+)\{([^}]*)\}", query):
                    used = set(re.findall(r"(\w+)=", labels))
                    have = {label for key in found[name] for label, _ in key}
                    assert used <= have, (query, used - have)

    asyncio.run(main())

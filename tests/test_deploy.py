"""The manifests of deploy/: their flags are those of the servers' wheels, and a wrong one is noticed."""

from __future__ import annotations

import copy
import json

import pytest
import yaml

from deploy import memory
from deploy.check import FLAGS, HERE, MANIFESTS, check, containers, documents, fields_of, wrong_flags, wrong_shapes

KNOWN = json.loads(FLAGS.read_text())
SERVERS = {path.stem: next(filter(containers, documents(path))) for path in MANIFESTS if path.stem in KNOWN}


def test_the_manifests_are_good():
    assert set(SERVERS) == {"vllm", "sglang"} and list(check(KNOWN, shapes=False)) == []


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_both_serve_the_pair(name):
    [container] = containers(SERVERS[name])
    said = " ".join(container["args"])
    assert "google/gemma-4-26B-A4B-it" in said and "google/gemma-4-26B-A4B-it-assistant" in said
    assert not any(argument.startswith("--api-key=") and "$(" not in argument for argument in container["args"])


@pytest.mark.parametrize(
    "name, argument, said",
    [
        ("vllm", "--speculative-model=x", "--speculative-model is no flag of vllm"),
        ("vllm", "--num-speculative-tokens=3", "is no flag"),
        ("vllm", '--speculative-config={"drafter":"x"}', "there is no 'drafter'"),
        ("vllm", "--tool-call-parser=gemma5", "there is no parser 'gemma5'"),
        ("sglang", "--speculative-config={}", "is no flag of sglang"),
        ("sglang", "--reasoning-parser=gemma5", "there is no parser 'gemma5'"),
    ],
)
def test_a_wrong_flag_is_noticed(name, argument, said):
    container = copy.deepcopy(containers(SERVERS[name])[0])
    container["args"].append(argument)
    [found] = wrong_flags(container, KNOWN[name])
    assert said in found


def test_an_image_of_another_version_is_noticed():
    other = copy.deepcopy(KNOWN)
    other["vllm"]["version"] = "0.1"
    assert any("the image is of" in each for each in check(other, shapes=False))


def test_a_wrong_shape_is_noticed():
    pytest.importorskip("kubernetes_validate")
    document = copy.deepcopy(SERVERS["vllm"])
    assert list(wrong_shapes(document)) == []
    containers(document)[0]["arguments"] = []
    [found] = wrong_shapes(document)
    assert "arguments" in found


def test_flags_are_fields_of_their_classes():
    source = """
class A:
    one_flag: int = 1
    hidden: A[int, Arg(no_cli=True)] = 2
    def method(self): inner: int = 3
class B:
    other: str = ""
"""
    assert fields_of(source, {"A"}) == {"one_flag"} and fields_of(source, set()) == {"one_flag", "other"}


def test_the_autoscalers_ask_for_metrics_that_the_rules_offer():
    rules = yaml.safe_load(next(documents(HERE / "queue-metrics.yaml"))["data"]["config.yaml"])["rules"]
    offered = {rule["name"]["as"] for rule in rules}
    asked = {
        metric["pods"]["metric"]["name"]
        for path in MANIFESTS
        for document in documents(path)
        if document["kind"] == "HorizontalPodAutoscaler"
        for metric in document["spec"]["metrics"]
    }
    assert asked == offered == {"vllm_num_requests_waiting", "sglang_num_queue_reqs"}


def test_the_table_of_the_page_is_what_is_computed():
    root = HERE.parent
    assert memory.table(root / "tests" / "data" / "configs") in (root / "docs" / "deploy.md").read_text()

"""The image catalogue: which entry an image name means, and what a broken file is told."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from baton.cluster.node.images import Catalogue, CatalogueError


@pytest.mark.parametrize(
    ("image", "name"),
    [
        ("registry.example.com/team/docker-temp:0.3.4.post2-sglang0.4.10.post2-cuda12.8", "llm"),
        ("registry.example.com/ai/vllm:v0.10.0", "llm"),
        ("", "llm"),
        ("registry.example.com/ai/mooncake-store:v0.3.13", "mooncake"),
        ("registry.example.com/ac2/etcd:3.6.1", "etcd"),
        ("registry.example.com:5000/ac2/nats:2.11.5", "nats"),
        ("busybox", "shell"),
        ("busybox@sha256:0123", "shell"),
        ("docker.io/library/python:3.12-slim", "python"),
        ("example.com/unheard-of:1", "host"),
    ],
)
def test_image_names_are_matched(tmp_path: Path, image: str, name: str) -> None:
    assert Catalogue(tmp_path).find(image).name == name


def test_variables_are_filled_for_the_pod(tmp_path: Path) -> None:
    etcd = Catalogue(tmp_path).find("etcd:3").resolve("127.9.0.1")
    assert etcd.env["ETCD_LISTEN_CLIENT_URLS"] == "http://127.9.0.1:2379"
    llm = Catalogue(tmp_path).find("lmsysorg/sglang:latest").resolve("127.9.0.1")
    assert llm.rewrite(["/usr/bin/python3", "-m", "x"]) == (sys.executable, "-m", "x")
    assert (Path(llm.pythonpath[0]) / "sglang" / "launch_server.py").exists()


def test_the_users_entries_come_first_and_are_read_again(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path)
    file = tmp_path / "images.yaml"
    file.write_text("images: [{name: mine, match: ['*sglang*'], entrypoint: [run]}]")
    assert catalogue.find("sglang:1").name == "mine"
    file.write_text("images: [{name: other, match: ['*sglang*']}]")
    os.utime(file, (1, 1))
    assert catalogue.find("sglang:1").name == "other"
    file.unlink()
    assert catalogue.find("sglang:1").name == "llm"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("images: [{name: a}]", r"images\[0\].match: is required"),
        ("images: [{match: [a]}]", r"images\[0\].name: is required"),
        ("images: [{name: a, match: [a], entrypiont: [x]}]", r"images\[0\].entrypiont: unknown field"),
        ("images: [{name: a, match: a}]", r"images\[0\].match: wants a list of texts"),
        ("images: [{name: a, match: [a], env: {A: 1}}]", r"images\[0\].env: wants a mapping of texts"),
        ("images: [{name: a, match: [a], commands: {x: y}}]", r"images\[0\].commands.x: wants a list of texts"),
        ("images: [{name: a, match: [a], path: ['${NOPE}']}]", r"unknown variable \$\{NOPE\}"),
        ("images: 3", "wants one key, 'images'"),
        ("images: [\t", "images.yaml: while scanning"),
    ],
)
def test_a_broken_catalogue_names_file_and_field(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "images.yaml").write_text(text)
    with pytest.raises(CatalogueError, match=problem) as caught:
        Catalogue(tmp_path)
    assert str(tmp_path / "images.yaml") in str(caught.value)


def test_files_that_an_image_has_at_fixed_paths(tmp_path: Path) -> None:
    mounts = Catalogue(tmp_path).find("registry.example.com/ai/vllm:v0.10.0").resolve("127.9.0.1").mounts
    [(target, source)] = mounts.items()
    assert target == "/vllm-workspace/examples"
    assert os.access(Path(source) / "online_serving" / "multi-node-serving.sh", os.X_OK)

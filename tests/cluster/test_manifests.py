"""Reading manifests: every mistake is one line with file and line number, and does not hide what is beside it."""

from pathlib import Path

import pytest

from baton.cluster.apply import refusals
from baton.cluster.manifests import Manifest, Problem, load, parse
from baton.cluster_client import Invalid

GOOD = "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: good\n"


def only_problem(text: str) -> Problem:
    manifests, problems = parse(text, "f.yaml")
    assert [one.name for one in manifests] in ([], ["good"])
    assert len(problems) == 1, problems
    assert "\n" not in str(problems[0])
    return problems[0]


def test_a_tab_is_named_with_its_line_and_what_to_do_and_the_rest_is_read() -> None:
    text = GOOD + "---\napiVersion: v1\nkind: Pod\nmetadata:\n\tname: x\n---\n" + GOOD.replace("good", "last")
    manifests, problems = parse(text, "f.yaml")
    assert [one.name for one in manifests] == ["good", "last"]
    assert [str(one) for one in problems] == [
        "f.yaml:9: a tab is used to indent; YAML allows only spaces there: put spaces instead"
    ]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("kind: Pod\n", 1, "apiVersion: is missing"),
        ("apiVersion: v1\nmetadata: {name: x}\n", 1, "kind: is missing"),
        ("apiVersion: v1\nkind: 3\n", 2, "kind: is missing"),
        ("- a\n- b\n", 1, "no mapping"),
        ("apiVersion: v1\nkind: Pod\nmetadata:\n  name: x\n  name: y\n", 5, "metadata.name: given twice"),
        ("apiVersion: v1\nkind: Pod\nspec: a: b\n", 3, "not YAML: mapping values are not allowed here"),
        ("apiVersion: v1\nkind: [Pod\n", 3, "not YAML"),
    ],
)
def test_mistakes_point_at_their_line(text: str, line: int, words: str) -> None:
    problem = only_problem(GOOD + "---\n" + text)
    assert problem.line == line + GOOD.count("\n") + 1
    assert words in problem.text


def test_values_are_read_as_kubectl_reads_them() -> None:
    text = "apiVersion: v1\nkind: X\na: 2025-01-01\nb: 12:30\nc: 0644\nd: 1e3\ne: 0o17\nf: yes\ng: -5\nh: 1.5\ni: '08'\nj: 08\n"
    content = parse(text, "f.yaml")[0][0].content
    assert [content[key] for key in "abcdefghij"] == ["2025-01-01", "12:30", 420, 1000.0, 15, True, -5, 1.5, "08", 8]


def test_paths_of_a_server_lead_to_lines() -> None:
    text = "apiVersion: v1\nkind: X\nmetadata:\n  name: x\n  labels:\n    a.b/c: d\nspec:\n  roles:\n    - name: p\n      n: 1\n    - name: q\n"
    manifest = parse(text, "f.yaml")[0][0]
    cases = {
        "spec.roles[1].name": 11,
        "spec.roles[0].n": 10,
        "spec.roles[1].absent.deep": 11,
        "metadata.labels[a.b/c]": 6,
        "nothing": 1,
        "": 1,
    }
    assert {path: manifest.line_of(path) for path in cases} == cases


def test_a_list_is_its_items_with_their_own_lines() -> None:
    text = "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: A\n  metadata:\n    name: a\n- apiVersion: v1\n  kind: B\n  spec:\n    x: 1\n"
    first, second = parse(text, "f.yaml")[0]
    assert (first.kind, first.name, first.line_of("metadata.name")) == ("A", "a", 7)
    assert (second.kind, second.line_of("spec.x"), second.line_of("spec.y")) == ("B", 11, 10)


def test_files_that_cannot_be_read_are_named_and_directories_are_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text(GOOD.replace("good", "b"))
    (tmp_path / "a.yml").write_text(GOOD.replace("good", "a"))
    (tmp_path / "notes.txt").write_text("\t")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    manifests, problems = load([tmp_path / "none.yaml", tmp_path])
    assert [one.name for one in manifests] == ["a", "b"]
    assert [str(one) for one in problems] == [
        f"{tmp_path}/none.yaml: cannot be read: No such file or directory",
        f"{tmp_path}/empty.yaml: no object in it",
    ]


def test_a_refusal_is_one_line_for_each_field() -> None:
    manifest: Manifest = parse("apiVersion: v1\nkind: Pod\nmetadata:\n  name: x\nspec:\n  containers: 3\n", "f.yaml")[
        0
    ][0]
    causes = [
        {"field": "spec.containers", "message": "Invalid value: must be a list", "reason": "FieldValueInvalid"},
        {"field": "spec.nodeName", "message": "Forbidden: no", "reason": "FieldValueForbidden"},
    ]
    found = refusals(manifest, Invalid(422, "Invalid", "two things", details={"causes": causes}))
    assert [str(one) for one in found] == [
        "f.yaml:6: pod/x: spec.containers: Invalid value: must be a list",
        "f.yaml:5: pod/x: spec.nodeName: Forbidden: no",
    ]
    plain = refusals(manifest, Invalid(400, "BadRequest", "one\n  thing"))
    assert [str(one) for one in plain] == ["f.yaml:1: pod/x: one thing"]

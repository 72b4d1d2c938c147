"""Files for people and robots around the code: they parse, and the commands that they name are there."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
pytestmark = pytest.mark.skipif(not WORKFLOWS, reason="not a checkout")


def steps(workflow):
    for name, job in yaml.safe_load(workflow.read_text())["jobs"].items():
        for step in job["steps"]:
            yield name, job, step


@pytest.mark.parametrize(
    "path", [*ROOT.glob(".github/**/*.yml"), ROOT / ".pre-commit-config.yaml"], ids=lambda p: p.name
)
def test_yaml_is_a_mapping(path):
    assert isinstance(yaml.safe_load(path.read_text()), dict)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda p: p.name)
def test_workflows_use_pinned_actions_and_few_permissions(workflow):
    content = yaml.safe_load(workflow.read_text())
    assert content["permissions"] == {"contents": "read"}
    for name, job, step in steps(workflow):
        assert job["timeout-minutes"] <= 300, name
        if "uses" in step:
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", step["uses"]), step["uses"]
    for line in workflow.read_text().splitlines():
        if "uses:" in line:
            assert re.search(r"# v\d+\.\d+\.\d+$", line), f"{line.strip()} does not say which version"


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda p: p.name)
def test_commands_of_workflows_exist(workflow):
    for _, _, step in steps(workflow):
        for target in re.findall(r"\bmake ([a-z-]+)", step.get("run", "")):
            assert target in TARGETS
        for path in re.findall(r"\btests/[\w./]+", step.get("run", "")):
            assert (ROOT / path).is_file()


def test_python_versions_are_those_of_the_project():
    matrix = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["jobs"]["test"]["strategy"]["matrix"]
    tested = {entry["python"] for entry in matrix["include"]}
    prefix = "Programming Language :: Python :: "
    assert tested == {c.removeprefix(prefix) for c in PROJECT["classifiers"] if c.startswith(f"{prefix}3.")}
    assert PROJECT["requires-python"] == f">={min(tested)}"
    assert {entry["versions"] for entry in matrix["include"]} == {"lowest", "newest"}


def test_the_lowest_versions_are_those_of_the_project():
    lines = (ROOT / "tests/lowest.txt").read_text().splitlines()
    pinned = dict(line.removesuffix(".*").split("==") for line in lines if not line.startswith("#"))
    stated = dict(
        re.fullmatch(r"([\w-]+)>=([\d.]+)", line).groups() for line in PROJECT["dependencies"] if ">=" in line
    )
    assert pinned == {name: version for name, version in stated.items() if name != "pyyaml"}


def test_pre_commit_runs_what_dev_installs():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    tools = {hook["entry"].split()[0] for repo in config["repos"] for hook in repo["hooks"]}
    assert tools == {"ruff", "mypy", "codespell"}
    dev = " ".join(PROJECT["optional-dependencies"]["dev"])
    assert all(f"{tool}>=" in dev for tool in (*tools, "pre-commit"))


def test_make_help_explains_every_target():
    text = (ROOT / "Makefile").read_text()
    phony = set(re.search(r"^\.PHONY: (.*)$", text, flags=re.MULTILINE)[1].split())
    assert phony == TARGETS == set(re.findall(r"^([a-z-]+):.*## \S", text, flags=re.MULTILINE))


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "SECURITY.md", "README.md"])
def test_make_targets_and_files_that_pages_name(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"(?:^    |`)make ([a-z-]+)", text, flags=re.MULTILINE):
        assert target in TARGETS, target
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / link).exists(), link


def test_the_citation_names_every_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (
        citation["version"]
        == re.search(r'__version__ = "(.*)"', (ROOT / "src/timm_qkformer/__init__.py").read_text())[1]
    )
    cited = {reference["url"].rsplit("/", 1)[1] for reference in citation["references"]}
    named = re.findall(r"^- .*arxiv\.org/abs/(\d{4}\.\d{5})", (ROOT / "docs/models.md").read_text(), flags=re.MULTILINE)
    assert set(named) <= cited

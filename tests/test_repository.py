"""What outsiders meet first: the workflow, the citation, the issue templates."""

import re

import yaml
from fresh_process import ROOT

MAKEFILE = (ROOT / "Makefile").read_text()


def test_the_workflow_runs_commands_that_the_makefile_has():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    commands = [step["run"] for step in workflow["jobs"]["test"]["steps"] if "run" in step]
    assert "make test" in commands
    for command in commands:
        program, target = command.split()
        assert program == "make" and re.search(rf"^{target}:", MAKEFILE, re.MULTILINE)


def test_one_version(kernel):
    """The package's and the tools', whose first number is the Hub's."""
    tools = (ROOT / "tools" / "pyproject.toml").read_text()
    assert re.search(r'^version = "(.*)"$', tools, re.MULTILINE)[1] == kernel.__version__
    hub = re.search(r"^version = (\d+)$", (ROOT / "build.toml").read_text(), re.MULTILINE)[1]
    assert kernel.__version__.split(".")[0] == hub


def test_the_citation_has_the_packages_version(kernel):
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == kernel.__version__ and citation["license"] == "Apache-2.0"
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


def test_issue_templates_have_a_head():
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.md"):
        head = yaml.safe_load(path.read_text().split("---")[1])
        assert head.keys() == {"name", "about"}, path.name

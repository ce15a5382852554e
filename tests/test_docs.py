"""The pages: links lead somewhere, cited sections and named code exist, and README says what the report says."""

import ast
import re
from pathlib import Path

import pytest
import yaml

from series import claims, runner

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "data/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
SOURCES = sorted([*ROOT.glob("omniforcing_lib/**/*.py"), *ROOT.glob("notebooks/s*/*.py"), *ROOT.glob("tests/*.py")])
NUMBER = r"\d+(?:\.\d+)*"
CITED = re.compile(rf"\bspec(?:ification)?\s+({NUMBER}(?:(?:,| and)\s+{NUMBER})*)")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def headings(page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^#+ (.+)$", text, re.MULTILINE)


def anchor(heading: str) -> str:
    """The name that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_cited_section_of_the_specification_exists():
    there = {heading.split()[0] for heading in headings(ROOT / "docs" / "specification.md")}
    notebooks = sorted(ROOT.glob("notebooks/*.ipynb"))
    texts = {path: path.read_text(encoding="utf-8") for path in [*SOURCES, *notebooks, *PAGES]}
    cited = {
        (number, path.relative_to(ROOT).as_posix())
        for path, text in texts.items()
        for found in CITED.findall(text)
        for number in re.findall(NUMBER, found)
    }
    assert len({number for number, _ in cited}) > 30
    assert not sorted((number, path) for number, path in cited if number not in there)


@each_page
def test_every_relative_link_leads_to_a_file_and_a_heading(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, wanted = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), f"{page.name}: {link} leads to no file"
        assert not wanted or wanted in map(anchor, headings(target)), f"{page.name}: {link} leads to no heading"


@each_page
def test_pages_name_no_place_outside_the_repository(page):
    assert not re.search(r"(?<![\w.])/(work|home|tmp|root)/", page.read_text(encoding="utf-8"))


def defined(path: Path) -> set[str]:
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names.add(getattr(node, "name", ""))
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return names


@pytest.mark.parametrize("name", ["ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_files_and_functions_on_a_page_exist(name):
    """`folder/file.py` is a file; `module.name` and `module.Class.method` are defined in that module."""
    words = re.findall(r"`([^`\n]+)`", (ROOT / name).read_text(encoding="utf-8"))
    files = [word for word in words if re.fullmatch(r"[\w/]+\.(py|md|ipynb)", word) and "your_question" not in word]
    modules = {path.stem: path for path in SOURCES if path.parent.name != "tests"}
    dotted = [word.split(".", 1) for word in words if re.fullmatch(r"\w+(\.\w+){1,2}", word)]
    code = [(module, rest) for module, rest in dotted if module in modules]
    assert len(files) >= 4 and (code or name != "ARCHITECTURE.md")
    assert not [file for file in files if not (ROOT / file).exists()]
    assert not [f"{module}.{rest}" for module, rest in code if rest not in defined(modules[module])]


def test_readme_fits_two_screens_and_its_findings_are_the_reports():
    """Every finding in bold is the status of one of the claims that the row is about."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:3] for line in text.split("| the paper claims |")[1].split("\n\n")[0].splitlines()[2:]]
    answers = {int(row["#"]): row["status"] for row in claims.claim_rows(runner.stored().metrics)}
    about = [(1, 2, 3, 4), (5, 6), (7,), (8, 9, 10, 11), (12,), (13,)]
    assert len(text.splitlines()) <= 95 and len(rows) == len(about)
    for (_, found), numbers in zip(rows, about, strict=True):
        said = [word.lower() for word in re.findall(r"\*\*(.+?)\*\*", found)]
        assert said and not [word for word in said if not any(answers[n].startswith(word) for n in numbers)], found


def test_the_citation_names_the_project_and_the_paper():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    paper = cited["preferred-citation"]
    assert cited["title"] in (ROOT / "README.md").read_text(encoding="utf-8") and paper["title"] == "OmniForcing"
    assert paper["url"].endswith("2603.11647") and cited["authors"] and paper["authors"]
    assert not re.search(r"the authors of|todo|example", (ROOT / "CITATION.cff").read_text().lower())

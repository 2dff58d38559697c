"""README.md and docs/: links, commands, fields, packages and keys are those of the code."""

import ast
import contextlib
import csv
import dataclasses
import functools
import importlib.util
import inspect
import io
import json
import re
import shlex
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import tyro
from torch.distributed.run import get_args_parser as torchrun_parser

import eval
import export
import predict
import train
from nets.factory import BACKBONES
from utils.annotation.annotate import annotate
from utils.annotation.audit import SIMILAR_BY_NATURE
from utils.config.train_config import OPTIONAL_SWITCHES, SETTINGS, StageConfig, TrainConfig
from utils.runs.checkpoint import KEYS
from utils.system.cli import expand_switches

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("README*.md"), *ROOT.glob("docs/**/*.md")])
OTHER_PAGES = [
    *(ROOT / "CONTRIBUTING.md", ROOT / "model_data/vit_xs_4.md"),
    *(ROOT / name / "README.md" for name in ("benchmarks", "datasets", "img", "logs", "model_data")),
]
MAINS = {
    "train.py": train.main,
    "eval.py": eval.main,
    "predict.py": predict.main,
    "export.py": export.main,
    "txt_annotation.py": annotate,
}
PLACEHOLDER = "X"
"""Takes the place of `<...>` in commands."""
SHARED_BY_BENCHMARKS = ("measure", "trained_outputs")
"""Modules in benchmarks/ that aren't scripts."""
OTHER_FLAGS = {"--index-url", "--logdir", "--shm-size", "--ipc", "--signal", "--field", "--no-field"}
"""Flags of pip, TensorBoard, Docker and Slurm, and placeholders."""
OTHER_NAMES = {"field", "weights_only", "val_report"}
OTHER_NAMES |= {
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE",
    "OMP_NUM_THREADS",
    "HF_ENDPOINT",
    "HF_HUB_DISABLE_XET",
    "CUDA_VISIBLE_DEVICES",
    "WITH_BATCH_NORM",
}
"""What is neither a field nor in the code: placeholders, names of other libraries and tests, a folder of an example."""
NUMBERED = {f"{name}_{k}" for name in ("class", "probability") for k in range(1, 6)}
"""Columns of predictions."""
FIELDS = {field.name for kind in (TrainConfig, StageConfig) for field in dataclasses.fields(kind)}
PARAMETERS = {name for main in MAINS.values() for name in inspect.signature(main).parameters}
CONFIG_FILES = [file.read_text(encoding="utf-8") for file in (ROOT / "utils/config").glob("*.py")]
"""Their functions' parameters, too, are set in the text."""
PARAMETERS |= {node.arg for text in CONFIG_FILES for node in ast.walk(ast.parse(text)) if isinstance(node, ast.arg)}


def page_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


each_page = pytest.mark.parametrize("page", [*PAGES, *OTHER_PAGES], ids=page_name)


def split_code(text: str) -> tuple[str, list[tuple[str, str]]]:
    """The text without its fenced blocks, and each block's language and content."""
    fence = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", flags=re.M | re.S)
    return fence.sub("", text), [(language, textwrap.dedent(content)) for language, content in fence.findall(text)]


def read_page(page: Path) -> tuple[str, list[tuple[str, str]]]:
    return split_code(page.read_text(encoding="utf-8"))


def inline_code(page: Path) -> list[str]:
    prose, _ = read_page(page)
    return re.findall(r"(?<!`)`([^`]+)`(?!`)", prose)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    prose, _ = read_page(page)
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose, flags=re.M):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def section(page: str, title: str) -> str:
    text = (ROOT / page).read_text(encoding="utf-8")
    (found,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, flags=re.M | re.S)
    return found


def first_cells(text: str) -> list[str]:
    """The code in the first column of all tables."""
    rows = re.findall(r"^\| (.*?) \|", text, flags=re.M)
    return [code for cell in rows for code in re.findall(r"`([^`]+)`", cell)]


def second_cells(text: str) -> list[str]:
    """The code in the second column of all tables."""
    return first_cells(re.sub(r"^\|[^|]*\|", "|", text, flags=re.M))


@each_page
def test_links_and_anchors_exist(page):
    prose, _ = read_page(page)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target}: no such file"
        assert not anchor or anchor in anchors(file), f"{target}: no such heading in {page_name(file)}"


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each `python ...` command in blocks and in inline code, up to a redirection, pipe or comment; of
    `torchrun ...` those of the script."""
    _, blocks = read_page(page)
    lines = [line for language, content in blocks if not language for line in content.splitlines()]
    for line in [*lines, *(" ".join(code.split()) for code in inline_code(page))]:
        for part in re.split(r"\s&&\s|\s\|\s", re.sub(r"<[^>]*>", PLACEHOLDER, re.sub(r"\s+#\s.*", "", line))):
            match = re.match(r"(?:[A-Z_]+=\S+ |\$env:\S+; )*((?:python|torchrun) .+)", part.strip())
            if match:
                words = shlex.split(re.split(r"\s[<>]\s?", match[1])[0])
                if words[0] == "torchrun":
                    launched = torchrun_parser().parse_args(words[1:])
                    words = ["python", launched.training_script, *launched.training_script_args]
                yield words


@functools.cache
def known_flags(script: str) -> frozenset[str]:
    if script in MAINS:
        with contextlib.redirect_stdout(io.StringIO()) as shown, pytest.raises(SystemExit):
            tyro.cli(MAINS[script], args=["--help"])
        return frozenset(re.findall(r"--[a-z][\w-]*", shown.getvalue()))
    # Benchmarks and recipes import what need not be installed.
    tree = ast.parse((ROOT / script).read_text(encoding="utf-8"))
    (main,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    return frozenset({"--help"} | {"--" + argument.arg.replace("_", "-") for argument in main.args.args})


@each_page
def test_commands_name_scripts_and_their_flags(page):
    for words in commands(page):
        program, *arguments = words[1:]
        line = shlex.join(words)
        if program == "-c":
            ast.parse(arguments[0])
        elif program == "-m":
            assert arguments[0] == "venv" or importlib.util.find_spec(arguments[0]), f"{line}: no such module"
            paths = [word for word in arguments[1:] if word.startswith("tests/")]
            assert all((ROOT / path).exists() for path in paths), f"{line}: no such test"
        elif program != f"benchmarks/{PLACEHOLDER}.py":
            assert (ROOT / program).is_file(), f"{line}: no such script"
            arguments = expand_switches(arguments, [*OPTIONAL_SWITCHES, "deep"])
            flags = {word.partition("=")[0] for word in arguments if word.startswith("--")}
            assert flags <= known_flags(program), f"{line}: no such flag"
            if program in MAINS and "--help" not in flags:
                # Parsed as the command itself does, values and all, for a function that does nothing.
                tyro.cli(functools.wraps(MAINS[program])(lambda *args, **kwargs: None), args=arguments)


@each_page
def test_flags_in_the_text_are_flags_of_a_script(page):
    scripts = [
        *MAINS,
        *(page_name(path) for path in (ROOT / "benchmarks").glob("*.py") if path.stem not in SHARED_BY_BENCHMARKS),
    ]
    known = {flag for script in scripts for flag in known_flags(script)} | OTHER_FLAGS
    known |= set(torchrun_parser()._option_string_actions)
    assert {flag for code in inline_code(page) for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", code)} <= known


@each_page
def test_fields_that_are_set_in_the_text_exist(page):
    known = FIELDS | PARAMETERS | OTHER_NAMES
    found = {match[1] for code in inline_code(page) if (match := re.match(r"([a-z]\w*)=", code))}
    assert found <= known


@functools.cache
def words_of_the_code() -> frozenset[str]:
    files = [file for folder in ("nets", "utils", "benchmarks", "recipes") for file in (ROOT / folder).rglob("*.py")]
    words = re.findall(r"\w+", " ".join(file.read_text(encoding="utf-8") for file in [*files, *ROOT.glob("*.py")]))
    return frozenset([*words, *BACKBONES, *OTHER_NAMES, *NUMBERED])


@each_page
def test_names_in_the_text_occur_in_the_code(page):
    prose, _ = read_page(page)
    if page.name.startswith("README"):  # the first column has the names of another project
        prose = re.sub(r"^\|.*?\|", "", prose, flags=re.M)
    names = re.findall(r"(?<!`)`((?!test_)[A-Za-z]\w*_\w+)`(?!`)", prose)
    assert set(names) <= words_of_the_code()


@each_page
def test_paths_in_the_text_exist(page):
    folders = ("utils/", "nets/", "tests/", "benchmarks/", "docs/", "recipes/", "img/", ".ci/")
    paths = {code for code in inline_code(page) if code.startswith(folders) and not re.search(r"[*<\s]", code)}
    assert {path for path in paths if not (ROOT / path).exists()} == set()


@each_page
def test_python_blocks_compile_import_and_set_fields(page):
    _, blocks = read_page(page)
    for language, content in blocks:
        if language != "python":
            continue
        for node in ast.walk(ast.parse(content)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("utils", "nets"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                kinds = {"TrainConfig": TrainConfig, "StageConfig": StageConfig}
                if node.func.id in kinds:  # fields and values are checked as it is made
                    exec(compile(ast.Expression(node), page.name, "eval"), kinds)


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 200
    assert (ROOT / "docs/images/report.png").stat().st_size < 250_000


def test_every_page_is_linked_from_the_front_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {page_name(page) for page in (ROOT / "docs").glob("*.md")} <= set(re.findall(r"\]\((docs/\w+\.md)", text))


def test_the_chinese_pages_are_linked_and_link_their_originals():
    front = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")
    assert len(front.splitlines()) < 200
    for page in (ROOT / "docs/zh-CN").glob("*.md"):
        assert f"]({page_name(page)})" in front
        assert f"[English](../{page.name})" in page.read_text(encoding="utf-8")
    assert "[English](README.md)" in front
    assert "[中文](README.zh-CN.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_chinese_table_of_settings():
    text = (ROOT / "docs/zh-CN/settings.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` ?(\S*) \| `(.*?)` \| .+ \|$", text, flags=re.M)  # three columns, two of code
    marks = {name: "ᴿ" * known.by_recipe + "ᶜ" * known.resumable for name, known in SETTINGS.items()}
    plain = {name: json.dumps(p) if isinstance(p := known.plain, str) else str(p) for name, known in SETTINGS.items()}
    assert rows == [(name, marks[name], plain[name]) for name in SETTINGS]


def test_the_packages_of_the_architecture_are_the_folders():
    packages = [path.parent for folder in ("nets", "utils") for path in (ROOT / folder).rglob("__init__.py")]
    folders = {f"{path.relative_to(ROOT).as_posix()}/" for path in packages} - {"utils/"}
    scripts = {path.name for path in ROOT.glob("*.py")}
    assert set(second_cells(section("docs/architecture.md", "Floors"))) == folders | scripts
    drawing = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(Path(folder).name in drawing for folder in folders)


def test_the_keys_of_a_checkpoint():
    assert sorted(first_cells(section("docs/architecture.md", "Checkpoint format"))) == sorted(KEYS)


def test_every_backbone_is_in_its_table():
    assert set(BACKBONES) <= set(first_cells(section("docs/weights.md", "Backbones")))


def test_every_field_of_the_recipe_is_in_its_page():
    known = {field.name: field.metadata.get("setting") for field in dataclasses.fields(TrainConfig)}
    by_recipe = {name for name, setting in known.items() if setting and setting.by_recipe}
    assert by_recipe <= set(first_cells((ROOT / "docs/recipe.md").read_text(encoding="utf-8"))) | {"freeze_epoch"}


def test_the_kinds_of_findings_of_the_audit():
    trees = [ast.parse((ROOT / f"utils/annotation/{name}.py").read_text("utf-8")) for name in ("audit", "outliers")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "Finding"]
    kinds = {node.args[0].value for node in calls if isinstance(node.args[0], ast.Constant)} | {SIMILAR_BY_NATURE}
    places = ("across classes", "across splits", "within a class")
    kinds |= {f"{kind} {place}" for kind in ("duplicate", "near-duplicate") for place in places}
    assert set(first_cells(section("docs/data.md", "Audit"))) == kinds


@pytest.fixture
def evaluated(trained, tmp_path) -> Path:
    """A folder with everything that evaluation writes of one checkpoint, and of two."""
    eval.main(out=str(tmp_path), num_workers=0, device="cpu")
    eval.main(out=str(tmp_path), num_workers=0, device="cpu", compare=("logs", "logs"))
    return tmp_path


def test_the_keys_of_evaluation(evaluated):
    metrics = json.loads((evaluated / "metrics.json").read_text(encoding="utf-8"))
    documented = first_cells(section("docs/metrics.md", "metrics.json"))
    with_ood = {"ood", "ood_rejected", "top5"}
    keys = {*metrics, *metrics["per_class"][0], *metrics["rejection"], *with_ood}
    assert set(documented) - {"null", "rejection", "per_class"} == keys - {"rejection", "per_class"}
    corruptions = section("docs/metrics.md", "metrics.json").rpartition("`corruptions` are")[2]
    assert set(re.findall(r"`([^`]+)`", corruptions)) == set(metrics["corruptions"])
    comparison = json.loads((evaluated / "comparison.json").read_text(encoding="utf-8"))
    assert set(first_cells(section("docs/metrics.md", "comparison.json"))) == set(comparison)
    for file in ("predictions.csv", "flipped.csv"):
        with (evaluated / file).open(encoding="utf-8", newline="") as table:
            header = next(csv.reader(table))
        assert set(header) <= set(re.findall(r"`(\w+)`", section("docs/metrics.md", file)))


def test_the_keys_of_predictions(trained, command):
    documented = set(re.findall(r"`(\w+)`", section("docs/metrics.md", "predict.py --json")))
    shown = command("predict.py", "datasets/test", "missing.png", "--json", "--device", "cpu")
    lines = [json.loads(line) for line in shown.stdout.splitlines()]
    keys = {key for line in lines for key in line} | set(lines[0]["predictions"][0])
    assert keys | {"reason"} == documented - {"unknown"}


@pytest.mark.slow
def test_sixty_seconds(tmp_path):
    """The commands of the front page, in an empty folder."""
    _, ((_, block), *_) = split_code(section("README.md", "Sixty seconds"))
    for line in block.splitlines():
        script, *arguments = shlex.split(line, comments=True)[1:]
        subprocess.run([sys.executable, str(ROOT / script), *arguments], cwd=tmp_path, check=True)
    assert list(tmp_path.glob("logs/*/report.html"))

"""A stranger's backend: the template copied, renamed, built, installed and used, as authors do it.

Nothing of it is in this repository afterwards, and quantmill knows it by its entry point alone.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantmill.findings import QuantmillError
from quantmill.scaffold import new_plugin
from quantmill.testing import MethodConformance

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE, NOVELLA = ROOT / "template", ROOT / "models" / "novella"
WASTE = re.compile(r"__pycache__|_cache/")
Run = Callable[..., subprocess.CompletedProcess[str]]


def python(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        **options,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def texts(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text(encoding="utf-8")
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "LICENSE" and not WASTE.search(str(path))
    }


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The template under another name."""
    return new_plugin("mymethod", tmp_path_factory.mktemp("author")).folder


@pytest.fixture(scope="module")
def run(package: Path) -> Run:
    """Runs Python where the wheel of the package is installed."""
    dist, site = package.parent / "dist", package.parent / "site"
    python("-m", "build", "--wheel", "--no-isolation", "--outdir", dist, package)
    (wheel,) = dist.glob("quantmill_mymethod-0.1.0-*.whl")
    python("-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site, wheel)
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))

    def here(*arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYTHONPATH": path, **environment}
        return python(*arguments, env=env, cwd=package)

    return here


def test_a_new_package_shows_nothing_of_the_template(package: Path) -> None:
    found = texts(package)
    assert "src/quantmill_mymethod/plugin.py" in found
    assert ".github/workflows/test.yml" in found and ".gitignore" in found
    for name, text in found.items():
        assert not re.search(r"example|template", name + text, re.IGNORECASE), name
    project = tomllib.loads(found["pyproject.toml"])["project"]
    assert project["name"] == "quantmill-mymethod"
    assert project["entry-points"]["quantmill.plugins"] == {"mymethod": "quantmill_mymethod.plugin"}
    assert found["README.md"].startswith("# quantmill-mymethod\n")


def test_a_name_of_several_words_is_spelt_as_each_place_wants_it(tmp_path: Path) -> None:
    made = new_plugin("quantmill-my-example2", tmp_path)
    assert made.folder == tmp_path / "quantmill-my-example2"
    found = texts(made.folder)
    assert set(found) | {"LICENSE"} == set(made.files)
    plugin = found["src/quantmill_my_example2/plugin.py"]
    assert 'Preset("my-example2-4"' in plugin
    assert '"quantmill_my_example2.config:MyExample2Config"' in plugin
    assert "class MyExample2Config(MethodConfig)" in found["src/quantmill_my_example2/config.py"]
    assert '"QM-MYEXAMPLE2-001"' in found["src/quantmill_my_example2/codec.py"]
    assert "\nmy-example2 = " in found["pyproject.toml"]


@pytest.mark.parametrize("name", ["z", "a-name-of-forty-characters-is-the-longes"])
def test_a_new_package_is_clean_for_its_own_linter(tmp_path: Path, name: str) -> None:
    pytest.importorskip("ruff")
    folder = new_plugin(name, tmp_path).folder
    python("-m", "ruff", "check", "--no-cache", folder)


@pytest.mark.parametrize(
    "name",
    ["My-Method", "4bits", "a--b", "-a", "a-", "a b", "a/b", "../a", "a.b", "a_b", "é", "a" * 41,
     "example", "testing", "quantmill-"],
)  # fmt: skip
def test_a_name_that_can_be_no_package_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(QuantmillError) as caught:
        new_plugin(name, tmp_path)
    assert caught.value.findings[0].code == "QM-NEW-001" and caught.value.findings[0].fix
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "quantmill-mymethod").mkdir()
    (tmp_path / "file").write_text("x")
    for name, into, code in (
        ("mymethod", tmp_path, "QM-NEW-003"),
        ("mymethod", tmp_path / "file", "QM-NEW-003"),
        ("transformers", tmp_path, "QM-NEW-002"),
    ):
        with pytest.raises(QuantmillError) as caught:
            new_plugin(name, into)
        assert caught.value.findings[0].code == code
    assert sorted(item.name for item in tmp_path.iterdir()) == ["file", "quantmill-mymethod"]
    assert not list((tmp_path / "quantmill-mymethod").iterdir())


def test_the_commands_of_the_guide_lead_to_all_green(tmp_path: Path) -> None:
    """As they stand there, with wheels of the core and of a framework, and without a network."""
    guide = (ROOT / "docs" / "authors" / "index.md").read_text(encoding="utf-8")
    commands = re.search(r"## 1\..*?```sh\n(.*?)```", guide, re.DOTALL)
    assert commands is not None
    wheels = tmp_path / "wheels"
    for package in ("core", "integrations/transformers"):
        python("-m", "build", "--wheel", "--no-isolation", "--outdir", wheels, ROOT / package)
    # A new environment has what is installed here, but for the packages of quantmill.
    create, rest = commands[1].split("\n", 1)
    work = tmp_path / "work"
    work.mkdir()
    python("-m", "venv", work / ".venv")
    (site,) = (work / ".venv" / "lib").glob("python*/site-packages")
    for folder in map(Path, sys.path):
        if folder.name in ("site-packages", "dist-packages"):
            for item in folder.iterdir():
                ours = re.match(r"_*(editable_impl_)?quantmill|pip\b|.*\.pth$", item.name)
                if not ours and not (site / item.name).exists():
                    (site / item.name).symlink_to(item)
    # What pip puts there when it installs pytest.
    script = work / ".venv" / "bin" / "pytest"
    script.write_text(f"#!{script.with_name('python')}\nimport pytest\npytest.console_main()\n")
    script.chmod(0o755)
    assert create == "python -m venv .venv && . .venv/bin/activate"
    commands_here = f"set -e\n. .venv/bin/activate\n{rest}"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
        "PIP_NO_BUILD_ISOLATION": "false",  # pip reads this variable the other way round
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_CONFIG_FILE": os.devnull,
    }
    done = subprocess.run(
        ["bash", "-c", commands_here],
        cwd=work,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 3 * 40  # type: ignore[index]


def test_the_plugin_is_found_and_ok(run: Run) -> None:
    listed = run("-c", "from quantmill.cli import main; main()", "plugins", "--json").stdout
    (mine,) = [item for item in json.loads(listed)["plugins"] if item["name"] == "mymethod"]
    assert mine["status"] == "ok", mine["reason"]
    assert mine["distribution"] == "quantmill-mymethod"
    assert mine["provides"]["methods"] == ["mymethod"]


def test_its_own_tests_pass_without_a_framework(run: Run) -> None:
    # One of the classes: they differ in nothing that a framework is needed for.
    arguments = ("-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-k", "4", "tests")
    said = run(*arguments, QUANTMILL_DISABLE="transformers").stdout
    assert int(re.search(r"(\d+) passed", said)[1]) > 30  # type: ignore[index]
    assert "no framework is installed" in said


USE = """
import json, sys, torch, quantmill
from quantmill.evaluate import evaluate_model

novella, quantized = sys.argv[1:]
tokenizer = quantmill.load_tokenizer(novella)
text = open(f"{novella}/held.txt", encoding="utf-8").read()

def perplexity(model):
    return evaluate_model(model, tokenizer, text, context=256, max_windows=4).perplexity

model = quantmill.load(quantized)
ids = torch.tensor([tokenizer(text[:400])["input_ids"]])
with torch.inference_mode():
    mine = model(input_ids=ids).logits.float()
    result = {"kind": type(model.model.layers[0].mlp.up_proj).__name__,
              "perplexity": perplexity(model), "float": perplexity(quantmill.load(novella))}
    same = quantmill.dequantize(model)(input_ids=ids).logits.float()
print(json.dumps({**result, "off": float((mine - same).norm() / same.norm())}))
"""


def test_it_quantizes_a_real_model_that_loads_and_speaks(run: Run, tmp_path: Path) -> None:
    command = ("-c", "from quantmill.cli import main; main()", "quantize", "--quiet")
    run(*command, NOVELLA, tmp_path / "out", "mymethod-4")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "mymethod" and config["bits"] == 4
    found = json.loads(run("-c", USE, NOVELLA, tmp_path / "out").stdout)
    assert found["kind"] == "FormLinear"
    assert found["off"] < 0.01
    assert 1 < found["float"] < found["perplexity"] < 1.1 * found["float"]


PRETRAINED = """
import sys, torch, peft, quantmill_transformers
from transformers import AutoModelForCausalLM

source, saved = sys.argv[1:]
print(quantmill_transformers.activate())
model = AutoModelForCausalLM.from_pretrained(source, quantization_config="mymethod-4")
model.save_pretrained(saved)
again = AutoModelForCausalLM.from_pretrained(saved)
ids = torch.tensor([[5, 6, 7]])
with torch.inference_mode():
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
assert again.config.quantization_config.quant_method == "mymethod"
adapted = peft.get_peft_model(again, peft.LoraConfig(target_modules=["up_proj"]))
adapted(input_ids=ids, labels=ids).loss.backward()
"""


def test_transformers_and_peft_load_it_without_a_line_about_it(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    said = run("-c", PRETRAINED, ROOT / "tests" / "data" / "tiny-llama", tmp_path / "saved").stdout
    assert "mymethod" in said.partition("and adds")[2]


def test_the_documentation_names_every_promise() -> None:
    documented = (ROOT / "docs" / "authors" / "testing.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", documented))
    assert named == {name for name in dir(MethodConformance) if name.startswith("test_")}

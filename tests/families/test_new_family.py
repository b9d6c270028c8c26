"""What the README promises: a new file in `families/` gets its contract tests, and they notice when it is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

FAMILY = '''
"""{name}: a model type that tpcompress does not know; images of any size, one rectangle each."""

from transformers import AutoConfig, AutoModelForImageTextToText, Mistral3Config, Mistral3ForConditionalGeneration

from tpcompress.families import mistral3
from tpcompress.families.base import Family, Tiny
from tpcompress.families.layout import plain
from tpcompress.families.tiny import IMAGE, tiny_text, tiny_vision


class Config(Mistral3Config):
    model_type = "{name}"


class Model(Mistral3ForConditionalGeneration):
    config_class = Config


AutoConfig.register("{name}", Config)
AutoModelForImageTextToText.register(Config, Model)


def image_layouts(config, inputs, sizes):
    step = config.vision_config.patch_size * config.spatial_merge_size
    return [plain({grid}) for rows, cols in (inputs["image_sizes"] // step).tolist()]


def tiny_config():
    vision = tiny_vision("pixtral", image_size=128, head_dim=16)
    text = tiny_text("mistral", head_dim=16, sliding_window=None)
    return Config(text_config=text, vision_config=vision, image_token_index=IMAGE, spatial_merge_size=2)


FAMILY = Family(
    name="{name}",
    model_types=("{name}",),
    vision_tower="model.vision_tower",
    projector="model.multi_modal_projector",
    image_layouts=image_layouts,
    tiny=Tiny(
        tiny_config, mistral3.tiny_pixels, mistral3.tiny_run, ("image", "wide"), processor=mistral3.tiny_processor
    ),
)
'''

PLUGIN = """
import tpcompress.families
from tpcompress.families import list_families

tpcompress.families.__path__.append({folder!r})
list_families.cache_clear()
"""

TOYS = {"toyright": "rows, cols", "toyaskew": "cols, rows", "toyshort": "rows, cols - 1"}
"""A true layout, one that takes columns for rows, and one that misses a column."""

CHOSEN = "(toyright and (reference or identical or alone or parts or layouts or tables or batch)) or "
CHOSEN += "(toy and (corner or agree))"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """By toy: what came of each of its tests, run in one process of their own."""
    folder = tmp_path_factory.mktemp("toys")
    (folder / "families").mkdir()
    for name, grid in TOYS.items():
        (folder / "families" / f"{name}.py").write_text(FAMILY.format(name=name, grid=grid))
    (folder / "toy_plugin.py").write_text(PLUGIN.format(folder=str(folder / "families")))
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "toy_plugin", "-p", "no:cacheprovider", "-m", "", "-k", CHOSEN,
        f"--junitxml={folder / 'report.xml'}", "tests/matrix/test_forward.py", "tests/families/test_families.py",
        "tests/data/test_family_batches.py",
    ]  # fmt: skip
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    found: dict[str, dict[str, str]] = {name: {} for name in TOYS}
    for test in ElementTree.parse(folder / "report.xml").iter("testcase"):
        title = test.attrib["name"]
        (toy,) = [name for name in TOYS if name in title]
        found[toy][title.replace(toy, "")] = next((child.tag for child in test), "passed")
    return found


def test_a_file_gets_its_contract_tests(outcomes: dict[str, dict[str, str]]) -> None:
    right = outcomes["toyright"]
    assert len(right) >= 10
    assert any(title.startswith("test_equals_the_reference") for title in right)
    assert any(title.startswith("test_layouts_agree") for title in right)
    assert set(right.values()) == {"passed"}, right


def test_a_layout_that_takes_columns_for_rows_is_noticed(outcomes: dict[str, dict[str, str]]) -> None:
    assert outcomes["toyaskew"] == {
        "test_layouts_agree_with_the_encoders[]": "passed",
        "test_the_token_of_a_corner_sees_that_corner[]": "failure",
    }


def test_a_layout_that_misses_tokens_is_noticed(outcomes: dict[str, dict[str, str]]) -> None:
    assert outcomes["toyshort"]["test_layouts_agree_with_the_encoders[]"] == "failure"

"""Video rules on the frames of a real MP4, as the data package reads them and the processors prepare them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_rows import model_of, processor_of, row, tensors
from PIL import Image

from tpcompress.data import PromptCollator
from tpcompress.data.video import VideoSampling, open_video
from tpcompress.insertion.attach import attach, detach, record
from tpcompress.insertion.plan import PruningPlan, Stage
from tpcompress.pruners import list_pruners
from tpcompress.pruners.evs import retained_count

FAMILIES = ["qwen2_5_vl", pytest.param("llava_onevision", marks=pytest.mark.slow)]
RULES: list[dict[str, Any]] = [
    {"type": "evs"}, {"type": "evs", "rate": 0.7}, {"type": "vidcom2"}, {"type": "flashvid", "attention": "none"},
    {"type": "flashvid", "size": True},
]  # fmt: skip


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Still for half of its 16 frames; then a bright square moves over it."""
    av = pytest.importorskip("av")
    path = tmp_path_factory.mktemp("videos") / "moves.mp4"
    small = np.random.default_rng(0).integers(40, 120, (6, 8, 3), dtype=np.uint8)
    ground = Image.fromarray(small).resize((96, 64), Image.Resampling.BICUBIC)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 96, 64, "yuv420p", 4_000_000
        for number in range(16):
            image = ground.copy()
            if number >= 8:
                image.paste((255, 255, 255), (8 * (number - 8), 20, 8 * (number - 8) + 20, 44))
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_rules_on_an_mp4(family: str, clip: Path) -> None:
    frames, _ = open_video(str(clip), VideoSampling(num_frames=8))
    assert frames.shape == (8, 64, 96, 3)
    batch = PromptCollator(processor_of(family), video=VideoSampling(num_frames=8))(
        [row("<video>\nwhat moves?", "a square", videos=(str(clip),))]
    )
    inputs, model = tensors(batch), model_of(family)
    for rule in RULES:
        attach(model, PruningPlan([Stage(rule, 0, keep_ratio=0.3)]))
        try:
            with record(model) as trace, torch.no_grad():
                assert model(**inputs).logits.isfinite().all()
        finally:
            detach(model)
        stage = trace.stages[0]
        grids = [(grid.rows, grid.cols) for layout in stage.layouts[0] for grid in layout.grids]
        n, total = grids[0][0] * grids[0][1], stage.total[0]
        assert set(grids) == {grids[0]}
        by_frame = stage.retained_RV[0, : n * len(grids)].view(len(grids), n).sum(1).tolist()
        still, moving = by_frame[1 : len(grids) // 2], by_frame[len(grids) // 2 :]
        if rule["type"] == "evs":
            count = retained_count(n, len(grids), 0.7) if "rate" in rule else max(round(0.3 * total), 1)
            assert stage.vision_out == [count], "known before a pixel was read"
            assert by_frame[0] == min(n, count)
            assert sum(still) < sum(moving)
        else:
            assert stage.vision_out == [round(0.3 * total)]
            assert all(by_frame)
        assert list_pruners()[rule["type"]].group == "video"

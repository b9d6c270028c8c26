"""The rows of a comparison: each is made, scored and written before the next, so an interrupted one goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from tpcompress.data.benchmark import load_benchmark
from tpcompress.evaluation.compare.accuracy_figure import accuracy_figure
from tpcompress.evaluation.compare.report import Report, Row
from tpcompress.evaluation.downsample import downsampled, tokens_per_image
from tpcompress.evaluation.engine.plans import control_plan, key_of, recipe_plan
from tpcompress.evaluation.figures.position_bias import bias_figure
from tpcompress.evaluation.figures.retained import retained_figure, retained_masks
from tpcompress.evaluation.position_bias import PositionBias, RetentionMap
from tpcompress.evaluation.scoring.evaluate import Prepared, Scores, evaluate, learnt_families, prepare
from tpcompress.families import resolve
from tpcompress.insertion.attach import attach, detach, is_attached, plan_of
from tpcompress.insertion.encode import layouts_of
from tpcompress.insertion.plan import Budget, PruningPlan, Stage
from tpcompress.training.checkpoints.load import load_trained
from tpcompress.training.module import load_base, load_processor
from tpcompress.training.recipe.run import run_recipe

PICTURES = 4
"""Sample images of the figure of retained tokens."""


@dataclass
class Run:
    """A comparison under way.

    Attributes:
        folder: of all results.
        console: where progress goes.
        base: name of the base model.
        model: the base, dense.
        processor: of the base.
        data: held-out rows.
        packed: the same rows collated once.
        report: the rows so far.
        batch_size: sequences per evaluation call.
        vision_tokens: tokens of one image out of the projector.
        separate: one question per sequence, for pruners that read the prompt.
        controlled: the dense model after the same steps.
        shown: how to make the model of each pruner of the figure.
        biases: where its retention map is.
    """

    folder: Path
    console: Console
    base: str
    model: Any
    processor: Any
    data: Any
    packed: Prepared
    report: Report
    batch_size: int
    vision_tokens: int
    separate: Prepared | None = None
    controlled: nn.Module | None = None
    shown: dict[str, Callable[[], nn.Module]] = field(default_factory=dict)
    biases: dict[str, Path] = field(default_factory=dict)

    @classmethod
    def begin(cls, folder: Path, console: Console, base: str, num_images: int, seed: int, batch_size: int) -> Run:
        """Load base and data, and the report of an earlier attempt in the same folder.

        Raises:
            ValueError: the folder holds another comparison.
        """
        meta = {"base": base, "num_images": num_images, "seed": seed}
        path = folder / "report.json"
        report = Report.from_json(path.read_text()) if path.is_file() else Report(meta=dict(meta))
        if {key: report.meta.get(key) for key in meta} != meta:
            raise ValueError(f"{path} is of another comparison ({report.meta}); choose another --out or remove it.")
        (folder / "scores").mkdir(parents=True, exist_ok=True)
        model: Any = load_base(base)
        model.eval()
        processor = load_processor(base)
        with console.status(f"drawing {num_images} held-out pictures"):
            data = load_benchmark("test", num_images, seed)
            packed = prepare(processor, data, batch_size=batch_size)
        num_tokens = layouts_of(resolve(model), packed.batches[0])["image"][0].count
        return cls(folder, console, base, model, processor, data, packed, report, batch_size, num_tokens)

    # ------------------------------------------------------------------ rows

    def dense(self) -> None:
        """The base with all tokens, its blind baseline, and which families it has learnt."""
        if "learnt" not in self.report.meta:
            blind, scores = self._evaluate(self.model, blank=True), self._evaluate(self.model)
            self.report.meta |= {"learnt": learnt_families(scores, blind), "blind": blind.families}
        self._row("dense", None, 0, lambda: self.model)

    def downsampled(self, budget: Budget) -> None:
        """The base as it is on smaller pictures, without a pruner.

        Raises:
            ValueError: pictures of this family cannot be made smaller.
        """
        keep = budget.keep_ratio if budget.keep_tokens is None else budget.keep_tokens
        if self.report.find("downsample", None, keep) is not None:
            return
        with downsampled(self.model, self.processor, budget.count(self.vision_tokens)) as smaller:
            data = prepare(smaller.processor, self.data, batch_size=self.batch_size)
            scores = evaluate(self.model, smaller.processor, data, batch_size=self.batch_size)
        scores, count = scores.with_learnt(self.report.meta["learnt"]), tokens_per_image(self.model, data.batches)
        grid = "" if smaller.grid is None else f", {smaller.grid[0]} x {smaller.grid[1]}"
        row = Row.of(
            scores,
            arm="downsample",
            keep_tokens=keep,
            vision_tokens=self.vision_tokens,
            retained_tokens=count,
            layer_average=count,
            note=f"{count:g} tokens{grid}, of pictures with fewer pixels",
        )
        self._add(row, scores)

    def training_free(
        self, pruner: Any, layer: int, budget: Budget, seed: int | None, label: str | None = None
    ) -> None:
        """One pruner on the base as it is; `seed` goes to a pruner that takes one, `label` stands for its name."""
        config = {"type": pruner} if isinstance(pruner, str) else dict(pruner)
        if seed is not None:
            config["seed"] = seed
        plan = PruningPlan([Stage(config, layer, budget.keep_ratio, budget.keep_tokens)])
        self._row("training_free", plan, seed or 0, lambda: attach(self.model, plan), label)

    def control(self, recipe: str, trained: Sequence[tuple[str, Budget]]) -> None:
        """The dense model after the same extra steps: alone, and pruned without training as the aware rows are."""
        self._row("dense_ft", None, 0, lambda: self._controlled(recipe))
        for aware, budget in trained:
            plan = control_plan(recipe_plan(aware, budget))
            if plan is not None:
                self._row("dense_ft", plan, 0, partial(self._pruned_control, recipe, plan))

    def training_aware(self, recipe: str, budget: Budget, seed: int) -> None:
        """A recipe trained at a budget."""
        plan = recipe_plan(recipe, budget)
        self._row("training_aware", plan, seed, lambda: self._train(recipe, plan, seed))

    def finish(self) -> Report:
        """Print the table, write report and figures."""
        self.report.write(self.folder)
        self.report.print(self.console)
        accuracy_figure(self.report, self.folder / "accuracy.png")
        self._draw_retained()
        files = "report.json, report.csv, report.md, accuracy.png, retained.png"
        maps = {label: RetentionMap.load(path) for label, path in self.biases.items() if path.is_file()}
        if maps:
            bias_figure(maps, self.folder / "position_bias.png")
            files += ", position_bias.png"
        self.console.print(f"[bold]{self.folder}[/bold]: {files}", soft_wrap=True)
        return self.report

    def run_folder(self, pruner: str | None, layer: int, keep: float | None, seed: int) -> Path:
        """Where the training run of a row lives."""
        name = "dense" if pruner is None else f"{pruner}-l{layer}-{keep}"
        return self.folder / "train" / f"{name}-seed{seed}"

    # ------------------------------------------------------------------ how a row is made

    def _row(
        self, arm: str, plan: PruningPlan | None, seed: int, make: Callable[[], nn.Module], label: str | None = None
    ) -> None:
        """Make the model of a row, score it and write the report; a row that is there already costs nothing."""
        name, layer, keep = key_of(plan)
        pruner = label or name
        path = self._path("position_bias", arm, pruner, keep, layer, seed)
        if plan is not None and arm != "dense_ft":
            shown = f"{pruner}, trained" if arm == "training_aware" else str(pruner)
            self.shown.setdefault(shown, make)
            self.biases.setdefault(shown, path)
        if self.report.find(arm, pruner, keep, layer, seed) is not None:
            return
        start = time.perf_counter()
        model = make()
        seconds = time.perf_counter() - start
        bias = PositionBias()
        try:
            scores = self._evaluate(model, bias=bias).with_learnt(self.report.meta["learnt"])
        finally:
            if plan is not None and arm != "training_aware":
                detach(model)
        retained, average = self._retained(plan, bias)
        row = Row.of(
            scores,
            arm=arm,
            pruner=pruner,
            keep_tokens=keep,
            vision_tokens=self.vision_tokens,
            retained_tokens=retained,
            layer=layer,
            layer_average=average,
            seed=seed,
            seconds=round(seconds, 1) if arm in ("dense_ft", "training_aware") else None,
        )
        if arm == "training_aware" and plan is not None:
            row = self._against(row, scores, plan)
        maps = bias.maps()
        if maps:
            maps[-1].save(path)
            row = row.spread(*maps[-1].places, *maps[-1].thirds)
        self._add(row, scores)

    def _retained(self, plan: PruningPlan | None, bias: PositionBias) -> tuple[float, float]:
        """Tokens of an image behind the last stage and on the average layer; as counted where a rule counts itself."""
        total, depth = self.vision_tokens, len(resolve(self.model).layers)
        if plan is None:
            return total, total
        stage = plan.stages[-1]
        if len(plan.stages) == 1 and not stage.pruner.exact_count and bias.retained is not None:
            return bias.retained, (total * stage.layer + bias.retained * (depth - stage.layer)) / depth
        return plan.counts(total)[-1], plan.layer_average(total, depth)

    def _add(self, row: Row, scores: Scores) -> None:
        """Write a row and what it was made of, and say so."""
        scores.save(self._path("scores", *row.key))
        self.report.add(row)
        self.report.write(self.folder)
        what = " · ".join(str(part) for part in (row.arm, row.pruner, row.keep_tokens) if part is not None)
        self.console.print(f"  {what}: {100 * scores.score:.1f} % ± {100 * scores.ci95:.1f}", highlight=False)

    def _against(self, row: Row, scores: Scores, plan: PruningPlan) -> Row:
        """A trained row with its paired differences to the training-free one and to the control."""
        row = replace(row, gain=self._over(self.report.twin(row, "training_free"), scores))
        control = control_plan(plan)
        start = None if control is None else control.stages[-1].pruner.name
        same = self.report.find("dense_ft", start, row.keep_tokens, row.layer, 0)
        if start is None or same is None:
            return row
        note = "" if start == row.pruner else f"its control is {start}, which it equals before training"
        return replace(row, control_score=same.score, control_gain=self._over(same, scores), note=note)

    def _over(self, other: Row | None, scores: Scores) -> tuple[float, float, float] | None:
        """Paired difference to another row on the same images."""
        path = None if other is None else self._path("scores", *other.key)
        return scores.difference(Scores.load(path)) if path is not None and path.is_file() else None

    def _path(self, what: str, arm: str, pruner: str | None, keep: float | None, layer: int, seed: int) -> Path:
        """Of the scores of a row, or of its retention map."""
        return (
            self.folder / what / f"{arm}-{pruner or 'dense'}-l{layer}-{'all' if keep is None else keep}-seed{seed}.npz"
        )

    def _evaluate(self, model: nn.Module, blank: bool = False, bias: PositionBias | None = None) -> Scores:
        one_by_one = is_attached(model) and plan_of(model).reads_prompt
        if one_by_one and self.separate is None:
            self.separate = prepare(self.processor, self.data, batch_size=self.batch_size, pack=False)
        data = self.separate if one_by_one and self.separate is not None else self.packed
        watch = None if bias is None else lambda trace, meta: bias.add(trace, meta.rows)
        return evaluate(model, self.processor, data, batch_size=self.batch_size, blank=blank, watch=watch)

    def _controlled(self, recipe: str) -> nn.Module:
        if self.controlled is None:
            self.controlled = self._train(recipe, None, 0)
        return self.controlled

    def _pruned_control(self, recipe: str, plan: PruningPlan) -> nn.Module:
        return attach(self._controlled(recipe), plan)

    def _train(self, recipe: str, plan: PruningPlan | None, seed: int) -> nn.Module:
        """Train a recipe, or take the finished run of an earlier attempt, or go on with an interrupted one."""
        folder = self.run_folder(*key_of(plan), seed)
        last = folder / "checkpoints" / "last.ckpt"
        resume = []
        if last.is_file():
            try:
                return load_trained(folder).model
            except ValueError:  # unfinished; `fit` says so itself if it is damaged
                resume = ["--ckpt_path", str(last)]
        args = ["fit", "--config", recipe, "--model.base", self.base, "--seed_everything", str(seed)]
        args += ["--trainer.default_root_dir", str(folder), *resume]
        if plan is not None:
            args += ["--model.plan", json.dumps(plan.to_dict())]
        self.console.print(f"training {folder.name} …", highlight=False)
        run_recipe(args)
        return load_trained(folder).model

    # ------------------------------------------------------------------ figure

    def _draw_retained(self) -> None:
        """What every pruner, at its first budget, retains of some pictures."""
        rows = [self.data[i] for i in range(min(PICTURES, len(self.data)))]
        masks = {}
        for label, make in self.shown.items():
            model = make()
            masks[label] = retained_masks(model, self.processor, rows)
            if model is self.model:
                detach(model)
        if masks:
            retained_figure(masks, self.folder / "retained.png")

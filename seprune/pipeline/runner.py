"""One run: its stages in order, what each stands on, and what it leaves in the run folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from seprune.data import Data
from seprune.export import pruned_model
from seprune.importance.ablation import Sensitivity
from seprune.models import NO_CODE, ModelLoader
from seprune.pipeline import reporting, stages, timing
from seprune.pipeline.collection import collect
from seprune.pipeline.context import Bench
from seprune.pipeline.inputs import Subject, data_digests, open_both
from seprune.pipeline.journal import Record, stage_key
from seprune.pipeline.run_folder import RunFolder, keep_state_of
from seprune.pipeline.stage_cache import Sharing
from seprune.pruning.budget import Budget
from seprune.recipe import Recipe
from seprune.recovery.finetune import METRICS, Teacher, finetune
from seprune.report import Measurement, Report
from seprune.report.measurement import read as read_report
from seprune.runtime.distributed import first
from seprune.runtime.files import SUMS, remove_folders, write_json
from seprune.runtime.progress import Track
from seprune.runtime.reading import read_json
from seprune.statistics import GateStatistics
from seprune.statistics.result import FORMAT

SENSITIVITY = "sensitivity.json"
_UNFINISHED = "reconstructing-"
STATISTICS, TRAINED, PRUNED, FINETUNED = "statistics.safetensors", "trained", "pruned", "finetuned"


@dataclass
class Story:
    """One run: its folder, and what the stages have made so far."""

    recipe: Recipe
    folder: RunFolder
    track: Track
    loader: ModelLoader = NO_CODE
    sharing: Sharing | None = None
    measurements: list[Measurement] = field(default_factory=list)
    chapters: list[reporting.Chapter] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    slow: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    # -- what the stages stand on -----------------------------------------------------------------

    @cached_property
    def opened(self) -> tuple[Subject, Data]:
        return open_both(self.recipe, loader=self.loader, track=self.track)

    @property
    def crowded(self) -> bool:
        """Whether other runs work on this machine, so that times would be theirs too."""
        return self.sharing is not None and self.sharing.crowded

    @property
    def data(self) -> Data:
        return self.opened[1]

    @cached_property
    def subject(self) -> Subject:
        """The trained network: from the checkpoint, or trained here."""
        given = self.opened[0]
        if given.digest is not None or self.recipe.train is None:
            return given
        key = self.key("train", self.recipe.train)
        self.stage("train", key, lambda: self.train(given, key))
        model = pruned_model.load(self.folder.path / TRAINED, loader=self.loader)
        return Subject(model, given.architecture, given.shape, None, key, given.notes)

    @cached_property
    def bench(self) -> Bench:
        return Bench(self.recipe, self.subject, self.data, self.track)

    @cached_property
    def statistics(self) -> GateStatistics | None:
        if not self.bench.needs_statistics:
            return None
        said = self.recipe
        key = self.key("collect", said.collect, self.bench.gradients, said.importance.probe, FORMAT)
        path = self.folder.path / STATISTICS
        self.stage("collect", key, lambda: self.collect(path))
        return GateStatistics.load(path)

    @cached_property
    def sensitivity(self) -> Sensitivity | None:
        """What the dense network loses without a part of one group, where it is asked for."""
        if not self.bench.needs_sensitivity:
            return None
        recipe, path = self.recipe, self.folder.path / SENSITIVITY
        given = (recipe.sensitivity, recipe.importance, recipe.collect, self.bench.gradients)
        statistics = self.statistics

        def work() -> _Done:
            importance = first(lambda: stages.rank(self.bench, statistics))
            found = stages.sensitivity(self.bench, importance)
            first(lambda: write_json(path, found.plain()))
            return _Done([SENSITIVITY], {})

        self.stage("sensitivity", self.key("sensitivity", *given), work)
        return Sensitivity.of(read_json(path))

    # -- stages -----------------------------------------------------------------------------------

    def tell(self) -> None:
        """All stages, in order."""
        base = self.stage("baseline", self.key("baseline"), self.baseline)
        self.measurements.append(_measurement("baseline", None, base.facts))
        # mended if damaged, though all that was made of them may be finished
        _ = self.statistics, self.sensitivity
        budgets = self.recipe.plan.budgets()
        for budget in budgets:
            self.branch(budget, alone=len(budgets) == 1)

    def branch(self, budget: Budget, *, alone: bool) -> None:
        """Plan, prune, fine-tune and measure for one budget."""
        label = str(budget)
        home = self.folder.path if alone else self.folder.path / label.replace(" ", "-")
        sections = [self.recipe.importance, self.recipe.plan, self.recipe.prune]
        if self.recipe.plan.allocation == "sensitivity":
            sections.append(self.recipe.sensitivity)
        key = self.key("prune", *sections, label)
        made = self.stage(f"prune/{label}", key, lambda: self.prune(budget, home, key))
        recovered = {
            "none": None, "bn": "recalibrated", "refit": "refitted",
            "reconstruct": "reconstructed", "scratch": "drawn anew",
        }  # fmt: skip
        self.measurements.append(_measurement("pruned", label, made.facts["pruned"]))
        if (stage := recovered[self.recipe.prune.recover]) is not None:
            self.measurements.append(_measurement(stage, label, made.facts["recovered"]))
        self.chapters.append(reporting.Chapter(label, home, made.facts))
        if self.recipe.finetune.epochs or self.recipe.finetune.recalibrate:
            after = self.key("finetune", self.recipe.finetune, after=made.key)
            tuned = self.stage(f"finetune/{label}", after, lambda: self.tune(home, after))
            if self.recipe.report.last_epoch:
                self.measurements.append(_measurement("last epoch", label, tuned.facts["last"]))
            self.measurements.append(_measurement("fine-tuned", label, tuned.facts))
            self.chapters[-1] = replace(self.chapters[-1], tuning=tuned.facts["tuning"])

    def stage(self, name: str, key: str, work: Callable[[], _Done]) -> Record:
        """The committed record of a stage; done now unless it was done before."""

        def do() -> Record:
            start = time.monotonic()
            done = work()
            facts = {**done.facts, "seconds": time.monotonic() - start}
            return first(lambda: self.folder.commit(name, key, files=done.files, facts=facts))

        record = first(lambda: self.folder.committed(name, key))
        if record is None:
            if first(lambda: any(r.stage == name for r in self.folder.records())):
                self.notes.append(
                    f"stage {name} was made anew: its files, the images, the weights or the "
                    "version of seprune changed since it was finished"
                )
            record = self.sharing.once(self.folder, name, key, do) if self.sharing else do()
        self.seconds[name] = float(record.facts["seconds"])
        return record

    def key(self, stage: str, *parts: Any, after: str = "") -> str:
        """The hash of all that a stage depends on."""
        weights = "" if stage == "train" else self.subject.digest
        seed = None if stage == "baseline" and weights else self.recipe.seed  # nothing is drawn
        return stage_key(
            stage=stage,
            model=self.recipe.model.model_dump(exclude={"checkpoint"}),
            weights=weights,
            data=data_digests(self.data),
            seed=seed,
            parts=[p.model_dump() if hasattr(p, "model_dump") else p for p in parts],
            after=after,
        )

    def train(self, given: Subject, key: str) -> _Done:
        assert self.recipe.train is not None  # `subject` asked
        home = self.folder.path / TRAINED
        self.data.decode()  # the reporting images too, which are not looked at before the end
        first(lambda: keep_state_of(home, key))
        tuned = finetune(
            given.model,
            self.data,
            Bench(self.recipe, given, self.data).settings(self.recipe.train),
            folder=home,
            track=self.track,
        )
        first(lambda: pruned_model.save(tuned.model.cpu(), home, given.architecture))
        return _Done(self.files(home), {"best_epoch": tuned.best_epoch})

    def baseline(self) -> _Done:
        found = stages.measured(self.bench, self.subject.model)
        return _Done([], found | {"bytes": reporting.size_of(self.subject.model)})

    def collect(self, path: Path) -> _Done:
        statistics = collect(self.bench, self.folder.path / "collecting")
        first(lambda: statistics.save(path))
        return _Done([STATISTICS], {"images": statistics.samples})

    def prune(self, budget: Budget, home: Path, key: str) -> _Done:
        *early, last = stages.parts(self.bench, budget)
        bench, statistics, known = self.bench, self.statistics, self.sensitivity
        for number, part in enumerate(early, 1):
            bench = self.step(bench, statistics, part, home / f"step-{number}")
            known = None
            statistics = collect(bench) if bench.needs_statistics else None
        unfinished = home / f"{_UNFINISHED}{key[:12]}"
        cut = stages.cut(bench, statistics, last, known, unfinished)
        first(lambda: _write(cut, home))
        first(lambda: remove_folders(home, f"{_UNFINISHED}*"))
        pruned = stages.measured(self.bench, cut.pruned)
        same = cut.recovered is cut.pruned
        after = pruned if same else stages.measured(self.bench, cut.recovered)
        size = {"bytes": (home / PRUNED / pruned_model.WEIGHTS).stat().st_size}
        facts = {
            "pruned": pruned | size,
            "recovered": after | size,
            "plan": dict(cut.plan.facts),
            "laps": dict(cut.seconds),
        }
        own = self.own(home / "plan.json", home / "importance.csv")
        return _Done([*own, *self.files(home / PRUNED)], facts)

    def step(
        self,
        bench: Bench,
        statistics: GateStatistics | None,
        part: Budget,
        folder: Path,
    ) -> Bench:
        """One of several small cuts, kept and in the journal; the bench for the next one."""

        def work() -> _Done:
            cut = stages.cut(bench, statistics, part)
            first(lambda: pruned_model.save(cut.recovered.cpu(), folder, cut.architecture))
            return _Done(self.files(folder), {"plan": dict(cut.plan.facts)})

        sections = (self.recipe.importance, self.recipe.plan, self.recipe.prune, str(part))
        name = folder.relative_to(self.folder.path).as_posix()
        self.stage(f"prune/{name}", self.key("step", *sections, after=name), work)
        model = pruned_model.load(folder, loader=self.loader)
        return bench.after(model, pruned_model.read_architecture(folder))

    def tune(self, home: Path, key: str) -> _Done:
        section, into = self.recipe.finetune, home / FINETUNED
        first(lambda: keep_state_of(into, key))
        pruned = pruned_model.load(home / PRUNED, loader=self.loader)
        cut, dense = pruned_model.read_architecture(home / PRUNED), self.subject
        teacher = Teacher(dense.model, cut.plans[len(dense.architecture.plans) :])
        tuned = finetune(
            pruned,
            self.data,
            self.bench.settings(section),
            teacher=teacher if section.distill else None,
            folder=into,
            track=self.track,
        )
        first(lambda: pruned_model.save(tuned.model.cpu(), into, cut))
        found = stages.measured(self.bench, tuned.model)
        size = (into / pruned_model.WEIGHTS).stat().st_size
        facts: dict[str, Any] = {"bytes": size, "tuning": tuned.numbers()}
        if self.recipe.report.last_epoch:
            same = tuned.last is tuned.model
            last = found if same else stages.measured(self.bench, tuned.last)
            facts["last"] = last | {"bytes": size}
        return _Done(self.files(into), found | facts)

    def report(self, command: str) -> Report:
        """Put together once, and read from the folder from then on."""

        def work() -> _Done:
            if self.recipe.report.latency and not self.crowded:
                self.measure_latency()
            told = self.told(command)
            written = first(lambda: reporting.write(told, self.folder.path))
            return _Done(self.own(*written), {})

        self.stage("report", self.key("report", self.recipe.report, self.crowded), work)
        return read_report(self.folder.path)

    def measure_latency(self) -> None:
        baseline = self.subject.model
        networks: dict[tuple[str, str | None], torch.nn.Module] = {("baseline", None): baseline}
        for chapter in self.chapters:
            tuned = (chapter.home / FINETUNED / pruned_model.CONFIG).is_file()
            stage, name = ("fine-tuned", FINETUNED) if tuned else ("pruned", PRUNED)
            networks[stage, chapter.label] = pruned_model.load(
                chapter.home / name, loader=self.loader
            )
        bench = self.bench
        self.measurements = first(lambda: timing.with_latency(self.measurements, networks, bench))
        self.slow = first(lambda: timing.slow(self.measurements, networks, bench))

    def files(self, home: Path) -> list[Path]:
        """The files of a saved model and of its training; a card is the report's."""
        extra = sorted([*home.glob("plan*.json"), *home.glob(METRICS)])
        return self.own(
            home / pruned_model.CONFIG, home / pruned_model.WEIGHTS, home / SUMS, *extra
        )

    def own(self, *paths: Path) -> list[Path]:
        """Paths as the journal has them: relative to the run folder."""
        return [p.relative_to(self.folder.path) for p in paths]

    def told(self, command: str) -> reporting.Told:
        """Everything that the report is made of."""
        return reporting.Told(
            recipe=self.recipe,
            command=command,
            subject=self.subject,
            structure=self.bench.structure,
            data=self.data,
            statistics=self.statistics,
            measurements=tuple(self.measurements),
            chapters=tuple(self.chapters),
            seconds=dict(self.seconds),
            slow=tuple(self.slow),
            notes=tuple(self.notes),
            crowded=self.crowded,
            sensitivity=self.sensitivity,
        )


@dataclass(frozen=True)
class _Done:
    """What a stage wrote, and its numbers."""

    files: list[Any]
    facts: dict[str, Any]


def _write(cut: stages.Cut, home: Path) -> None:
    cut.plan.save(home / "plan.json")
    reporting.write_importance(cut, home / "importance.csv")
    pruned_model.save(cut.recovered.cpu(), home / PRUNED, cut.architecture)


def _measurement(stage: str, budget: str | None, facts: Mapping[str, Any]) -> Measurement:
    names = ("top1", "top5", "loss", "count", "nonfinite", "macs", "params", "bytes")
    return Measurement(stage=stage, budget=budget, **{n: facts.get(n) for n in names})  # type: ignore[arg-type]

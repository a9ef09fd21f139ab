# SPDX-License-Identifier: Apache-2.0
"""``affect compress``: methods of ``affect.compression`` on a trained model, a report per layer, and a new release."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from affect import export
from affect.commands import assembly, evaluate
from affect.commands.configuration import is_given
from affect.commands.export import parity_faces, predicted
from affect.commands.release import require_free
from affect.commands.run_folder import CONFIG
from affect.commands.train import quiet
from affect.compression.base import KEEPING, Chain, Data, Transform, backbone, relative_error, run_chain
from affect.compression.layers import CompressedConv2d, CompressedLinear
from affect.compression.report import Report, count_macs, stored_size, table
from affect.compression.structure import replace_layer, structure
from affect.compression.uniform import current_weight
from affect.data.batch import FaceBatch
from affect.data.datamodule import FaceDataModule
from affect.data.protocol import TRAIN, VALIDATION
from affect.errors import ConfigError, near
from affect.files import replacing
from affect.models.base import AffectModule
from affect.release import (
    CARD,
    COMPRESSION,
    FILES,
    QUANTIZATION,
    Release,
    build_model,
    build_tasks,
    check_config,
    read_plain,
    read_release,
    write_release,
)
from affect.report import write_json
from affect.tasks import Task

REPORT, LAYERS = "compression.json", "compression.md"
BLAMED = 3
"""Layers that are named where a chain loses more than its tolerance."""


def run(config: DictConfig) -> None:
    """Compress ``checkpoint`` and write the release, ``compression.json`` and ``compression.md`` to ``out``.

    Raises:
        ConfigError: If methods are missing, in the wrong order, or lack data; or a network cannot be treated.
        CheckpointError: If the checkpoint cannot be read.
    """
    quiet()
    pl.seed_everything(int(config.seed), verbose=False)
    console = Console()
    transforms = build_transforms(config)
    folder = Path(config.checkpoint).expanduser()
    trust = list(config.trust)
    release = read_release(folder, trust)
    if QUANTIZATION in release.config:
        raise ConfigError(
            f"checkpoint={folder} was quantized while it was trained: export it as it is, or compress a float run"
        )
    out = Path(config.out).expanduser() if config.out else folder / "compressed" / "-".join(t.name for t in transforms)
    require_free_of_others(out, bool(config.force))
    tasks = with_losses(release, trust)
    module = build_model(release, tasks)
    encoders = list(module.encoder_modules())
    if not encoders:
        raise ConfigError(f"a {type(module).__name__} has no encoder that could be compressed")
    require_protected(config.compression, [backbone(encoder) for _, encoder in encoders])
    image, shown = parity_faces(release.preprocess)
    require_losses(transforms, module, folder)
    expected = predicted(module, image)
    before = {"bytes": stored_size(module), "macs": model_macs(module, image)}
    images = None
    if any({"images", "losses", "train", "score"} & set(t.needs) for t in transforms):
        images = training_data(config, release, trust, tasks)
    reports = []
    warned: list[str] = []
    earlier = expected
    for name, encoder in encoders:
        of = f"{name}: " if len(encoders) > 1 else ""
        data = encoder_data(config, module, encoder, images)
        network = backbone(encoder).eval()
        chain = run_chain(network, transforms, data, encoder.normalise(image))  # type: ignore[operator]
        reports.append((name, chain))
        print_chain(console, name, chain)
        # What one encoder lost is not the next one's.
        now = predicted(module, image)
        parity, earlier = export.differences(earlier, now, tasks), now
        losing = {task: one for task, one in parity.items() if one.mean > float(config.tolerance) * one.scale}
        for task, one in losing.items():
            line = (
                f"{of}{task} changes by {one.mean:.3g} on average on {shown}, more than tolerance={config.tolerance} "
                f"of its scale {one.scale:.3g}"
            )
            warned.append(line)
            console.print(f"[bold]warning[/bold]: {line}", highlight=False)
        if losing:
            told = blame_text(transforms, chain, network, encoder.normalise(image))  # type: ignore[operator]
            warned += [of + line for line in told.splitlines()]
            console.print(told, highlight=False, markup=False)
    after = {"bytes": stored_size(module), "macs": model_macs(module, image)}
    found = predicted(module, image)
    parity = export.differences(expected, found, tasks)
    for task, one in parity.items():
        if not warned and one.mean > float(config.tolerance) * one.scale:
            warned.append(f"{task} changes by {one.mean:.3g} on average on {shown} by all encoders together")
            console.print(f"[bold]warning[/bold]: {warned[-1]}", highlight=False)
    written = {
        "methods": [t.name for t in transforms],
        "settings": OmegaConf.to_container(config.compression, resolve=True),
        "checkpoint": folder.resolve().name,  # a release tells no path of the machine
        "weights": evaluate.weights_hash(release),
        "before": before,
        "after": after,
        "compared_on": shown,
        "tolerance": float(config.tolerance),
        "warnings": warned,
        "differences": {k: one._asdict() for k, one in parity.items()},
        "encoders": {n: [r.plain() for r in chain.reports] for n, chain in reports},
    }
    write(out, release, module, written, [report for name, chain in reports for report in named(name, chain, reports)])
    check_written(out, trust, image, found)
    print_totals(console, before, after, parity, shown, float(config.tolerance))
    console.print(f"[bold]{out}[/bold]: a release, {REPORT}, {LAYERS}", soft_wrap=True)
    console.print(f"evaluate it: affect evaluate checkpoint={out}", markup=False, soft_wrap=True)


def build_transforms(config: DictConfig) -> list[Transform]:
    """Return the methods of ``compression`` in order.

    Raises:
        ConfigError: If there is none.
    """
    nodes = config.compression
    if not nodes:
        from affect.commands.configuration import config_directory

        known = sorted(path.stem for path in (config_directory() / "compression").glob("*.yaml"))
        raise ConfigError(f"name what to do: compression=[<method>,…]; there are {', '.join(known)}")
    return [assembly.make(node, f"compression.{name}") for name, node in nodes.items()]


def require_protected(nodes: Mapping[str, Any], networks: Sequence[nn.Module]) -> None:
    """Refuse names of layers to protect that none of the networks has: a misspelt one would not be protected.

    Raises:
        ConfigError: With the name and what is near it.
    """
    names = {name for network in networks for name, _ in network.named_modules() if name}
    for method, node in nodes.items():
        given = node.get("protect") or ()
        if isinstance(given, str):
            raise ConfigError(f"compression.{method}.protect={given}: give a list, [{given}]")
        for name in given:
            if str(name) not in names:
                raise ConfigError(f"compression.{method}.protect: no layer {name}; {near(str(name), names)}")


def require_losses(transforms: Sequence[Transform], module: AffectModule, folder: Path) -> None:
    """Refuse methods that need the losses of a model that has none.

    Raises:
        ConfigError: With the method, and where losses are.
    """
    asking = next((one.name for one in transforms if {"losses", "train", "score"} & set(one.needs)), None)
    if asking is not None and not module.losses:
        raise ConfigError(
            f"compression={asking} needs the losses that the model was trained with, which {folder} does not hold: "
            "give checkpoint=<folder of the run>, or compress with this method first"
        )


def require_free_of_others(out: Path, force: bool) -> None:
    """Refuse a folder that holds anything but a compressed release that is to be replaced."""
    if force and out.is_dir():
        for name in (REPORT, LAYERS):
            (out / name).unlink(missing_ok=True)
    held = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if held & {REPORT, LAYERS} and held <= {*FILES, REPORT, LAYERS}:
        raise ConfigError(f"out={out}: holds a release; force=true replaces it")
    require_free(out, force)


# -------------------------------------------------------------------------------------------------------- data


def with_losses(release: Release, trust: list[str]) -> dict[str, Task]:
    """Return the tasks of a release, with the losses of its run where it lies in one."""
    path = release.folder.parent / CONFIG
    loaded = read_plain(path) if path.is_file() else None
    nodes = loaded.get("task") if isinstance(loaded, dict) else None
    nodes = nodes if isinstance(nodes, dict) else {}
    added: dict[str, Any] = {}
    for name, node in release.config["task"].items():
        stored = nodes.get(name)
        losses = {k: stored[k] for k in ("loss", "target") if stored.get(k)} if isinstance(stored, dict) else {}
        check_config(losses, [*trust, "affect.losses"], str(path), f"task.{name}")
        added[str(name)] = {**node, **losses} if isinstance(node, dict) else node
    return build_tasks(replace(release, config={**release.config, "task": added}))


def training_data(config: DictConfig, release: Release, trust: list[str], tasks: Mapping[str, Task]) -> FaceDataModule:
    """Return the data of the run, whose training part methods look at."""
    settings = evaluate.data_settings(config, release, trust)
    stored = evaluate.stored_run(release, trust)
    recipe, _ = evaluate.crop_recipe(settings, release, stored, is_given("prepare"))
    sources = assembly.build_sources(settings, recipe, hold_out=True)
    datamodule = assembly.build_datamodule(settings, sources, dict(tasks), int(release.preprocess["image_size"]))
    datamodule.setup("fit")
    return datamodule


def encoder_data(config: DictConfig, module: AffectModule, encoder: nn.Module, source: FaceDataModule | None) -> Data:
    """Return what methods may use of a run's data, as far as the methods asked for any."""
    if not hasattr(encoder, "normalise"):
        raise ConfigError(f"a {type(encoder).__name__} cannot be compressed: it does not say how it normalises images")
    levels = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    low, high = encoder.normalise(levels).flatten(1).detach()
    if source is None:
        return Data(seed=int(config.seed), limits=(low, high))
    most = int(config.data.images)
    if most < 1:
        raise ConfigError(f"data.images={most}: at least one image is needed")
    batches = [encoder.normalise(batch.image) for batch in source.part_dataloader(TRAIN, most)]
    labelled = bool(module.losses)
    return Data(
        images=batches,
        losses=partial(training_losses, module, source) if labelled else None,
        train=partial(fine_tune, module, training_batches(source), config) if labelled else None,
        score=partial(validation_score, module, source) if labelled and len(source.part_rows(VALIDATION)) else None,
        remember=partial(remember_rest, module, encoder),
        seed=int(config.seed),
        limits=(low, high),
    )


def total_loss(module: AffectModule, batch: Any) -> Tensor:  # noqa: ANN401
    """Return the weighed loss of a batch through the inference path, with a graph."""
    terms = module.task_terms(module(batch), batch)
    weighed = list(module.weighting(terms).values())
    return torch.stack([value.sum() for value in weighed]).sum()


def training_losses(module: AffectModule, source: FaceDataModule, batches: int = 8) -> Iterator[Tensor]:
    """Yield the loss of the model as it is on the first batches of its training part, the same at every call."""
    loader = source.part_dataloader(TRAIN, batches * source.batch_size)
    for batch in itertools.islice(loader, batches):
        yield total_loss(module.eval(), batch)


@torch.no_grad()
def validation_score(module: AffectModule, source: FaceDataModule) -> float:
    """Return minus the mean loss on the validation part."""
    module.eval()
    total, count = 0.0, 0
    for batch in source.part_dataloader(VALIDATION):
        total += float(total_loss(module, batch)) * len(batch.image)
        count += len(batch.image)
    return -total / max(count, 1)


def remember_rest(module: AffectModule, encoder: nn.Module) -> Callable[[], None]:
    """Keep all tensors of a model but those of one encoder, and return what puts them back."""
    own = {id(tensor) for tensor in (*encoder.parameters(), *encoder.buffers())}
    rest = [tensor for tensor in (*module.parameters(), *module.buffers()) if id(tensor) not in own]
    kept = [tensor.detach().clone() for tensor in rest]

    @torch.no_grad()
    def put_back() -> None:
        for tensor, value in zip(rest, kept, strict=True):
            tensor.copy_(value)

    return put_back


def training_batches(source: FaceDataModule) -> Iterator[FaceBatch]:
    """Yield the batches of one training epoch after the other, without end.

    Methods train in short bursts: each goes on where the last one ended, or all of them would see the first batches.
    """
    loader = source.train_dataloader()
    for epoch in itertools.count():
        loader.order.set_epoch(epoch)
        yield from loader


def fine_tune(module: AffectModule, batches: Iterator[FaceBatch], config: DictConfig, steps: int) -> None:
    """Train the model in place for a number of steps, as its run did but at one small rate."""
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
    chosen = str(config.training.optimizer)
    if chosen not in kinds:
        raise ConfigError(f"training.optimizer={chosen}: {near(chosen, kinds)}")
    module.optimizer, module.scheduler = partial(kinds[chosen], lr=float(config.training.lr)), None
    trainer = pl.Trainer(
        max_steps=int(steps),
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
    )
    module.train()
    with warnings.catch_warnings():  # it is not validated here, on purpose, at every one of many short trainings
        warnings.filterwarnings("ignore", message=".*`validation_step` but have no `val_dataloader`.*")
        trainer.fit(module, train_dataloaders=itertools.islice(batches, steps))
    module.cpu().eval()


# ----------------------------------------------------------------------------------------------------- results


def model_macs(module: AffectModule, image: Tensor) -> int:
    """Return multiplications of one image through convolutions and linear layers."""
    return sum(count_macs(module, lambda: predicted(module, image[:1])).values())


@torch.no_grad()
def blame(floats: nn.Module, compressed: nn.Module, images: Tensor) -> list[tuple[str, float]]:
    """Return layers by how much each alone changes the output, the worst first.

    Each layer with codes, or with inputs on a grid, is put alone into the network as it was before any layer had them:
    with batch norms folded and channels removed, if the chain began with that. Layers that changed together with
    others since (merged) cannot be judged so and are left out.

    Args:
        floats: The network before; each layer is back in its place at the end.
        compressed: The same afterwards.
        images: Normalised images ``(B, 3, H, W)``.

    Returns:
        Names, and relative errors of the output ``|y' - y| / |y|``.
    """
    expected = floats(images)
    found = []
    after = dict(compressed.named_modules())
    for name, layer in list(floats.named_modules()):
        other = after.get(name)
        if not isinstance(layer, nn.Conv2d | nn.Linear | CompressedConv2d | CompressedLinear):
            continue
        if not isinstance(other, CompressedConv2d | CompressedLinear) or other.stored is other.inputs is None:
            continue
        if other.current_weight().shape != current_weight(layer).shape:
            continue
        replace_layer(floats, name, other)
        found.append((name, relative_error(expected, floats(images))))
        replace_layer(floats, name, layer)
    return sorted(found, key=lambda pair: -pair[1])


def blame_text(transforms: Sequence[Transform], chain: Chain, compressed: nn.Module, images: Tensor) -> str:
    """Return which method and which layers lose most."""
    grown = [after - before for before, after in itertools.pairwise([0.0, *chain.errors])]
    worst = max(range(len(grown)), key=lambda k: grown[k])
    told = [
        "the output has changed by "
        + ", ".join(f"{error:.1%} after {t.name}" for t, error in zip(transforms, chain.errors, strict=True))
    ]
    found = [] if chain.floats is None else blame(chain.floats, compressed, images)[:BLAMED]
    if found:
        each = ", ".join(f"{name} ({error:.1%} of the output)" for name, error in found)
        told.append(
            f"each alone, the layers that change the output most: {each}; "
            f"compression.<method>.protect=[{found[0][0]}] leaves one out"
        )
    shrunk = [one for one in chain.reports[worst].layers if one.bytes_before and one.bytes_after is not None]
    if transforms[worst].stage in (*KEEPING, "merge") and shrunk:
        most = sorted(shrunk, key=lambda one: one.bytes_after / one.bytes_before)[:BLAMED]  # type: ignore[operator]
        parts = ", ".join(f"{one.name} ({1 - one.bytes_after / one.bytes_before:.0%} of its bytes)" for one in most)  # type: ignore[operator]
        told.append(
            f"{transforms[worst].name} changes layers together; it took most of {parts}; "
            f"compression.{transforms[worst].name}.protect=[{most[0].name}] leaves one whole"
        )
    return "\n".join(told)


def write(out: Path, release: Release, module: AffectModule, written: dict[str, Any], reports: list[Any]) -> None:
    """Write the release, its report and the table of layers."""
    plain = build_model_as_configured(release)
    node: dict[str, dict[str, Any]] = {}
    for name, encoder in module.encoder_modules():
        for key, layers in structure(plain.get_submodule(name), encoder).items():
            node.setdefault(key, {}).update({f"{name}.{layer}": settings for layer, settings in layers.items()})
    config = {**{k: v for k, v in release.config.items() if k != COMPRESSION}, COMPRESSION: node}
    note = f"\nCompressed: {', '.join(written['methods'])}. The metrics above are those of the model before.\n"
    card = (release.folder / CARD).read_text(encoding="utf-8") if (release.folder / CARD).is_file() else ""
    metrics = {**release.metrics, "measured_before_compression": written["methods"]}
    with replacing(_made(out) / LAYERS) as part:
        warned = "".join(f"- {line}\n" for line in written["warnings"])
        lost = f"Beyond the tolerance of {written['tolerance']:g}:\n\n{warned}\n" if warned else ""
        part.write_text(lost + table(reports) + "\n", encoding="utf-8")
    write_json(out / REPORT, written)
    state = module.release_state()
    training = release.training or described_run(release)
    write_release(
        out, state, config, release.labels, release.preprocess, metrics, card + note, release.people, training
    )


def described_run(release: Release) -> dict[str, Any]:
    """Return what a published release says of its training, for one that lies in its run."""
    from affect.commands.release import describe_training, run_results

    folder = release.folder.parent
    return describe_training(folder, run_results(folder)) if (folder / CONFIG).is_file() else {}


def build_model_as_configured(release: Release) -> AffectModule:
    """Return the model that the node ``model`` builds, before any compression."""
    plain = {k: v for k, v in release.config.items() if k != COMPRESSION}
    if COMPRESSION not in release.config:
        return build_model(replace(release, config=plain), build_tasks(release))
    from hydra.utils import instantiate

    return instantiate(plain["model"], _partial_=True, _convert_="object")(tasks=build_tasks(release)).eval()


def check_written(out: Path, trust: list[str], image: Tensor, found: Mapping[str, Tensor]) -> None:
    """Read a release back and compare what it predicts."""
    release = read_release(out, trust, "out")
    again = predicted(build_model(release, build_tasks(release)), image)
    for name, value in found.items():
        if not torch.allclose(again[name], value, rtol=1e-4, atol=1e-5):
            raise RuntimeError(f"{out}: the written release predicts other values of {name} than the compressed model")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def print_chain(console: Console, name: str, chain: Chain) -> None:
    """Print what each method did."""
    shown = Table(title=name)
    for column in ("method", "layers", "totals", "change of the output"):
        shown.add_column(column, justify="left" if column in ("method", "totals") else "right")
    for report in chain.reports:
        totals = ", ".join(f"{key} {value:.4g}" for key, value in report.totals.items())
        shown.add_row(report.method, str(len(report.layers)), totals, f"{report.error:.2e}")
    console.print(shown)
    for note in (note for report in chain.reports for note in report.notes):
        console.print(f"note: {note}", highlight=False)


def named(name: str, chain: Chain, chains: Sequence[tuple[str, Chain]]) -> list[Report]:
    """Return the reports of an encoder, its layers with its name in front where there are others."""
    if len(chains) == 1:
        return chain.reports
    return [
        replace(report, layers=[replace(layer, name=f"{name}: {layer.name}") for layer in report.layers])
        for report in chain.reports
    ]


def print_totals(
    console: Console,
    before: Mapping[str, int],
    after: Mapping[str, int],
    parity: Mapping[str, Any],
    shown: str,
    tolerance: float,
) -> None:
    """Print bytes, multiplications, and how far the predictions moved and may move."""
    console.print(
        f"bytes {before['bytes']:,} → {after['bytes']:,} ({before['bytes'] / max(after['bytes'], 1):.2f} times fewer); "
        f"multiplications of an image {before['macs']:,} → {after['macs']:,}",
        highlight=False,
    )
    for name, one in parity.items():
        console.print(
            f"{name}: values move by {one.mean:.3g} on average on {shown}; tolerance={tolerance:g} allows "
            f"{tolerance * one.scale:.3g}",
            highlight=False,
        )

# SPDX-License-Identifier: Apache-2.0
"""What a run tells its loggers beside the curves that the model logs: settings, final numbers, figures.

Every logger gets the same scalars under the same names. Figures go to those that take pictures: TensorBoard, W&B and
MLflow; all of them keep them on this machine unless a configuration says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from affect.commands.configuration import leaves
from affect.commands.run_folder import LOGGED, effective, is_first_process
from affect.report import read_json, write_json


def log_settings(loggers: Sequence[Any], config: DictConfig) -> None:
    """Log every key that can change the result, by its dotted name; lists as text."""
    if not loggers or not is_first_process():
        return
    plain = effective(config)
    settings = {
        key: value if isinstance(value, str | int | float | bool) or value is None else str(value)
        for key, value in leaves(plain)
    }
    for logger in loggers:
        logger.log_hyperparams(settings)


def continued(nodes: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return nodes of loggers that go on with what they logged of the run in ``folder`` before it was interrupted.

    A node that names a run itself (``run_id``, ``id``) keeps it.
    """
    known = read_json(folder / LOGGED) if (folder / LOGGED).is_file() else {}
    found = dict(nodes)
    for name, before in known.items():
        node = found.get(name)
        if node and before["key"] in node and node[before["key"]] is None:
            plain = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else dict(node)
            found[name] = OmegaConf.create({**plain, before["key"]: before["value"]})
    return found


def note_logged(names: Sequence[str], loggers: Sequence[Any], folder: Path) -> None:
    """Write down under which names MLflow and W&B keep this run, for ``continued``."""
    if not loggers or not is_first_process():
        return
    found = {}
    for name, logger in zip(names, loggers, strict=True):
        kind = type(logger).__name__
        if kind == "MLFlowLogger":
            found[name] = {"key": "run_id", "value": str(logger.run_id)}
        elif kind == "WandbLogger":
            found[name] = {"key": "id", "value": str(logger.experiment.id)}
    if found:
        write_json(folder / LOGGED, found)


def final_scalars(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of the test part, e.g. ``test/au/f1/mean``; those of subgroups are left to the files."""
    records = [r for r in results["metrics"].get("test", ()) if not r.get("subgroup") and r["value"] is not None]
    found = {f"test/{record['task']}/{record['name']}": float(record["value"]) for record in records}
    headline = {f"test/{r['name']}": float(r["value"]) for r in results.get("headline") or () if r["value"] is not None}
    return found | headline


def log_results(loggers: Sequence[Any], folder: Path, results: Mapping[str, Any], step: int) -> None:
    """Log the numbers of the test part and every figure of a finished run, and let the loggers write."""
    if not loggers or not is_first_process():
        return
    scalars = final_scalars(results)
    pictures = sorted((folder / "figures").glob("*.png"))
    for logger in loggers:
        logger.log_metrics(scalars, step)
        for path in pictures:
            log_picture(logger, path, step)
        logger.save()
        logger.finalize("success")
        if type(logger).__name__ == "WandbLogger":
            logger.experiment.finish()  # or the next run of this process would write into this one


def log_picture(logger: Any, path: Path, step: int) -> None:  # noqa: ANN401
    """Hand a picture to a logger that takes pictures; others are left alone."""
    name = type(logger).__name__
    if name == "TensorBoardLogger":
        import numpy as np
        from PIL import Image
        from torch import from_numpy

        with Image.open(path) as image:
            pixels = from_numpy(np.asarray(image.convert("RGB")).copy())
        logger.experiment.add_image(f"figures/{path.stem}", pixels, step, dataformats="HWC")
    elif name == "WandbLogger":
        logger.log_image(f"figures/{path.stem}", [str(path)], step)
    elif name == "MLFlowLogger":
        logger.experiment.log_artifact(logger.run_id, str(path), "figures")

# SPDX-License-Identifier: Apache-2.0
"""DeCaFA as a module: what each stage is supervised by, faces with some schemes alone, what results tell of stages."""

from __future__ import annotations

import dataclasses
import math

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from affect import labels, losses, tasks
from affect.data.transforms import swap_mirrored
from affect.encoders import PlainConvolutions
from affect.errors import ConfigError
from affect.metrics import alignment
from affect.models.decafa import Decafa
from affect.models.decafa.module import stage_factors
from affect.models.decafa.reading import spread
from affect.tasks import to_fractions, to_pixels
from tests.models.decafa.parts import SIZE, landmarks, make, make_batch, make_tasks

NAMES = ("landmarks_98", "landmarks_68", "landmarks_5")


def total(terms) -> torch.Tensor:
    return sum(term.sum.sum() / term.count.sum().clamp(min=1) for term in terms.values())


# ---------------------------------------------------------------------------------------------- outputs


def test_every_scheme_is_predicted_for_every_face():
    model, batch = make().eval(), make_batch(known={"98": [0]})
    outputs = model(batch)
    assert list(outputs) == list(NAMES)
    for name, scheme in zip(NAMES, ("98", "68", "5"), strict=True):
        assert outputs[name].shape == (4, labels.SCHEMES[scheme].points, 2)
        assert ((outputs[name] > 0) & (outputs[name] < 1)).all()
    assert outputs["landmarks_98"].equal(model.predict_step(batch)["landmarks_98"])


def test_points_are_fractions_of_the_crop_as_the_task_defines_them():
    model, batch = make().eval(), make_batch()
    *_, last = model.run(batch)
    torch.testing.assert_close(to_pixels(model(batch)["landmarks_68"], SIZE, SIZE), last.points["68"])
    # A map that is one pixel says exactly that pixel: soft-argmax and crops share one convention.
    with torch.no_grad():
        for stage in model.cascade.stages:
            for layer in stage.transfer.values():
                layer.weight.zero_()
    centre = model(batch)["landmarks_5"]
    torch.testing.assert_close(centre, torch.full_like(centre, 0.5))


def test_schemes_are_chained_from_fine_to_coarse_whatever_the_order_of_tasks():
    given = make_tasks("5", "98", "68")
    model = make(given)
    assert list(model.cascade.schemes.items()) == [("98", 98), ("68", 68), ("5", 5)]
    assert list(model(make_batch())) == list(given)
    turned = make(given, order=["5", "68", "98"])
    assert [tuple(layer.weight.shape[:2]) for layer in turned.cascade.stages[0].transfer.values()] == [
        (5, 4), (68, 5), (98, 68),
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------- supervision


def test_the_loss_is_the_weighted_sum_over_stages_written_out():
    model, batch = make(stages=3, outside="keep"), make_batch()
    terms = model.training_terms(batch)
    with torch.no_grad():
        expected = 0.0
        for weight, output in zip([0.25, 0.5, 1.0], model.run(batch), strict=True):
            for scheme, points in output.points.items():
                error = (to_fractions(points, SIZE, SIZE) - batch.targets[f"landmarks_{scheme}"]).abs()
                expected += weight * float(error.mean())
    assert total(terms).item() == pytest.approx(expected, rel=1e-5)
    assert float(terms["landmarks_98"].count.sum()) == 4 * 98


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("doubling", (1 / 8, 1 / 4, 1 / 2, 1)),
        ("equal", (1, 1, 1, 1)),
        ("last", (0, 0, 0, 1)),
        ([0, 2, 0, 3], (0, 2, 0, 3)),
    ],
)
def test_stage_weights(weights, expected):
    assert stage_factors(weights, 4) == expected


def test_the_last_stage_alone_still_trains_the_first_one():
    model = make(stage_weights="last")
    total(model.training_terms(make_batch())).backward()
    first = model.cascade.stages[0]
    assert first.body.down[0][0].weight.grad.abs().max() > 0
    assert first.transfer["5"].weight.grad.abs().max() > 0, "through the attention"


@pytest.mark.parametrize("known", [{"98": range(4)}, {"5": [0]}, {}], ids=["98", "5", "none"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"chain": "separate", "detached": True},
        {"chain": "mixture", "attention": "fine"},
        {"chain": "separate", "fusion": ["image", "features"], "stage_weights": "last"},
        {"detached": True, "stage_weights": [0, 1]},
    ],
)
def test_every_weight_has_a_gradient_whatever_is_labelled_and_left_out(arguments, known):
    """It may be 0. Without it processes that train together would wait for each other, or stop with an error."""
    model = make(**arguments)
    total(model.training_terms(make_batch(known=known))).backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_a_batch_of_one_scheme_leaves_the_heads_of_the_others_alone():
    """Separate heads without attention: nothing but its own loss reaches a head. This is one dataset per batch."""
    model = make(chain="separate", fusion=["image", "features"])
    total(model.training_terms(make_batch(known={"68": range(4)}))).backward()
    for stage in model.cascade.stages:
        assert stage.transfer["68"].weight.grad.abs().max() > 0
        for name in ("98", "5"):
            grad = stage.transfer[name].weight.grad
            assert grad is None or not grad.any(), name
        assert stage.body.down[0][0].weight.grad.abs().max() > 0


def test_a_batch_of_coarse_points_trains_the_fine_head_through_the_chain_alone():
    for chain, expected in (("scores", True), ("separate", False)):
        model = make(chain=chain, fusion=["image", "features"])
        total(model.training_terms(make_batch(known={"5": range(4)}))).backward()
        grad = model.cascade.stages[-1].transfer["98"].weight.grad
        assert (grad is not None and bool(grad.any())) == expected, chain


def test_faces_are_supervised_where_they_are_labelled():
    """A batch of both kinds of faces has the terms of the two batches with one kind each."""
    known = {"98": [0, 1], "5": [2, 3]}
    batch = make_batch(known=known)
    model = make().eval()  # batch statistics would tie the faces of a batch
    terms = model.training_terms(batch)
    for name, rows in (("landmarks_98", slice(0, 2)), ("landmarks_5", slice(2, 4))):
        part = dataclasses.replace(
            batch,
            image=batch.image[rows],
            targets={key: value[rows] for key, value in batch.targets.items()},
            masks={key: value[rows] for key, value in batch.masks.items()},
        )
        alone = model.training_terms(part)[name]
        torch.testing.assert_close(terms[name].sum, alone.sum)
        torch.testing.assert_close(terms[name].count, alone.count)
    assert terms["landmarks_68"].sum.sum().item() == 0
    assert float(terms["landmarks_68"].count.sum()) == 0


def test_what_stands_in_unlabelled_points_changes_nothing():
    known = {"98": [0], "68": [1]}
    batch, model = make_batch(known=known), make().eval()
    expected = total(model.training_terms(batch))
    odd = {name: torch.where(batch.masks[name][..., None], value, torch.nan) for name, value in batch.targets.items()}
    found = total(model.training_terms(dataclasses.replace(batch, targets=odd)))
    torch.testing.assert_close(found, expected)
    found.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_batch_without_any_label_has_a_zero_gradient():
    model = make()
    loss = total(model.training_terms(make_batch(known={})))
    loss.backward()
    assert float(loss) == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("loss", [losses.MSE(), losses.Wing(), losses.SmoothL1(0.01)])
def test_other_distances_by_config(loss):
    model = make(make_tasks("68", "5", loss=loss), stages=1)
    batch = make_batch(schemes=("68", "5"))
    terms = model.training_terms(batch)
    expected = loss(model(batch)["landmarks_68"], *model.loss_targets("landmarks_68", batch))
    torch.testing.assert_close(terms["landmarks_68"].sum, expected.sum)


# ------------------------------------------------------------------------------------- points out of the crop


def far(outside: str):
    batch = make_batch(schemes=("5",))
    batch.targets["landmarks_5"][0, 0] = torch.tensor([-40.0, 0.3])
    batch.targets["landmarks_5"][0, 1] = torch.tensor([0.7, 1.001])
    model = make(make_tasks("5"), outside=outside)
    return model, batch, *model.loss_targets("landmarks_5", batch)


def test_points_outside_the_crop_are_supervised_by_the_nearest_place_that_a_map_reaches():
    model, batch, target, mask = far("nearest")
    half = 0.5 / SIZE
    torch.testing.assert_close(target[0, :2], torch.tensor([[half, 0.3], [0.7, 1 - half]]))
    assert mask.all()
    assert (model(batch)["landmarks_5"] >= half - 1e-6).all()
    inside = (batch.targets["landmarks_5"] > half).all(-1) & (batch.targets["landmarks_5"] < 1 - half).all(-1)
    torch.testing.assert_close(target[inside], batch.targets["landmarks_5"][inside], rtol=0, atol=0)
    assert float(total(model.training_terms(batch))) < 1.5, "however far away the point lies"


def test_points_outside_the_crop_can_be_left_out_or_kept():
    _, batch, target, mask = far("ignore")
    assert mask[0].tolist() == [False, False, True, True, True]
    assert mask[1:].all()
    model, batch, target, mask = far("keep")
    assert target.equal(batch.targets["landmarks_5"])
    assert float(total(model.training_terms(batch))) > 1.5


def test_metrics_count_points_outside_where_they_are():
    model, batch = make(make_tasks("5")).eval(), make_batch(schemes=("5",))
    batch.targets["landmarks_5"][:, 2] = torch.tensor([9.0, 9.0])
    model.validation_step(batch, 0)
    found = float(model.validation_metrics["landmarks_5"][0].compute()["nme"])
    values, target = (to_pixels(x, SIZE, SIZE) for x in (model(batch)["landmarks_5"], batch.targets["landmarks_5"]))
    expected = alignment.AlignmentError("5")
    expected.bind(model.tasks["landmarks_5"].outputs)
    assert found == pytest.approx(float(expected.score(values, target, batch.masks["landmarks_5"])["nme"]), rel=1e-5)
    assert found > 100


# ---------------------------------------------------------------------------------------------- learning


class Fixed(torch.utils.data.Dataset):
    def __init__(self, batch, count: int) -> None:
        self.batch, self.count = batch, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        return self.batch


def blobs(size: int = 8, seed: int = 0):
    """Return faces whose five points are bright squares of five different grey levels."""
    random = torch.Generator().manual_seed(seed)
    batch = make_batch(size, schemes=("5",))
    image = torch.zeros(size, 3, SIZE, SIZE, dtype=torch.uint8)
    points = torch.zeros(size, 5, 2)
    for k in range(size):
        cells = torch.randperm(16, generator=random)[:5]
        for p, cell in enumerate(cells.tolist()):
            y, x = 4 * (cell // 4) + 1, 4 * (cell % 4) + 1
            image[k, :, y : y + 2, x : x + 2] = 55 + 50 * p
            points[k, p] = torch.tensor([x + 0.5, y + 0.5])
    targets = {"landmarks_5": to_fractions(points, SIZE, SIZE)}
    return dataclasses.replace(batch, image=image, targets=targets)


def test_it_learns_where_things_are_and_the_trainer_runs_it():
    torch.manual_seed(0)
    batch = blobs()
    model = make(make_tasks("5"), widths=[8, 12], stages=2)
    before = float(total(model.eval().training_terms(batch)))
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    loader = DataLoader(Fixed(batch, 90), batch_size=None)
    trainer.fit(model.train(), loader)
    after = float(total(model.train().training_terms(batch)))
    assert after < before / 4


# ---------------------------------------------------------------------------------------------- what results tell


def test_numbers_of_every_stage_are_those_of_the_metric():
    model = make(stages=3).eval()
    batches = [make_batch(3, known={"98": [0, 1], "5": [0, 1, 2]}, seed=seed) for seed in (1, 2)]
    asked = []

    def loader(part: str):
        asked.append(part)
        return batches if part == "validation" else None

    found = model.examine(loader)["stages"]
    assert asked[:2] == ["test", "validation"]
    assert set(found) == {"landmarks_98", "landmarks_5"}, "nothing is told of a scheme without labels"
    assert found["landmarks_98"]["points"] == 4 * 98
    for name, scheme in (("landmarks_98", "98"), ("landmarks_5", "5")):
        for stage in range(3):
            values, widths, targets, masks = [], [], [], []
            for batch in batches:
                output = list(model.run(batch))[stage]
                values.append(output.points[scheme].detach())
                widths.append(spread(output.maps[scheme].detach()) / SIZE)
                targets.append(to_pixels(batch.targets[name], SIZE, SIZE))
                masks.append(batch.masks[name])
            given = [torch.cat(part) for part in (values, targets, masks)]
            metric = model.tasks[name].metrics[0]
            for number, value in metric.score(*given).items():
                assert found[name][number][stage] == pytest.approx(float(value), rel=1e-5, nan_ok=True), number
            mean = float(torch.cat(widths)[torch.cat(masks)].mean())
            assert found[name]["spread"][stage] == pytest.approx(mean, rel=1e-5)


def test_errors_of_stages_are_taken_in_pixels_of_the_stored_images():
    """The box normaliser is not that of a turned crop; the points have to be turned back first."""
    task = landmarks("5")
    task.metrics = [alignment.AlignmentError("5", "box")]
    model, batch = make({"landmarks_5": task}).eval(), make_batch(schemes=("5",))
    angle = math.radians(30)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle), 3.0], [math.sin(angle), math.cos(angle), -2.0]])
    turned = dataclasses.replace(batch, matrix=(turn * torch.tensor([[2.0, 2.0, 1.0]])).expand(4, 2, 3))
    found = model.examine(lambda part: [turned])["stages"]["landmarks_5"]["nme"][-1]

    def stored(points):
        return torch.einsum("ij,bpj->bpi", torch.linalg.inv(2 * turn[:, :2]), points - turn[:, 2])

    values, target = (to_pixels(x, SIZE, SIZE) for x in (model(batch)["landmarks_5"], batch.targets["landmarks_5"]))
    error = (stored(values) - stored(target)).norm(dim=2).mean(1)
    sides = stored(target).amax(1) - stored(target).amin(1)
    assert found == pytest.approx(float(100 * (error / sides.prod(1).sqrt()).mean()), rel=1e-4)


def test_spread_of_a_pixel_of_an_even_map_and_of_two_pixels():
    maps = torch.zeros(3, 6, 8)
    maps[0, 2, 3] = 1
    maps[1] = 1 / 48
    maps[2, 0, 1] = maps[2, 0, 5] = 0.5
    torch.testing.assert_close(spread(maps).float(), torch.tensor([0.0, math.sqrt((36 + 64 - 2) / 12), 2.0]))


# ---------------------------------------------------------------------------------------------- flips


@pytest.mark.parametrize("scheme", ["98", "68", "5"])
def test_a_mirrored_face_has_the_loss_of_the_mirrored_prediction(scheme):
    """Mirroring points twice is the identity, and the error of mirrored points to mirrored targets is the same."""
    points = torch.rand(3, labels.SCHEMES[scheme].points, 2, dtype=torch.float64)
    flipped = torch.ones(3, dtype=torch.bool).numpy()

    def mirrored(value):
        turned = torch.stack([1 - value[..., 0], value[..., 1]], -1)
        return torch.from_numpy(swap_mirrored(turned.numpy(), scheme, flipped))

    torch.testing.assert_close(mirrored(mirrored(points)), points)
    target = torch.rand_like(points)
    mask = torch.ones(points.shape[:2], dtype=torch.bool)
    expected = losses.MAE()(points, target, mask).sum.sum()
    torch.testing.assert_close(losses.MAE()(mirrored(points), mirrored(target), mask).sum.sum(), expected)


# ---------------------------------------------------------------------------------------------- bad settings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"order": ["98", "68"]}, "name each scheme of the tasks"),
        ({"order": ["98", "68", "5", "5"]}, "once, fine to coarse"),
        ({"order": ["98", "68", "49"]}, "no task has scheme 49"),
        ({"outside": "drop"}, "model.outside='drop'"),
        ({"stage_weights": "double"}, "did you mean doubling"),
        ({"stage_weights": [1.0]}, r"one number per stage \(2\)"),
        ({"stage_weights": [1.0, 0.0]}, "one more than 0"),
        ({"stage_weights": [-1.0, 1.0]}, "none negative"),
        ({"size": 18}, "must be a multiple of 4 px"),
    ],
)
def test_settings_that_cannot_be(arguments, message):
    with pytest.raises(ConfigError, match=message):
        make(**arguments)


def test_tasks_that_it_cannot_have():
    with pytest.raises(ConfigError, match="task valence_arousal has none; leave it out"):
        make({**make_tasks(), "valence_arousal": tasks.ValenceArousal(loss=losses.MSE())})
    with pytest.raises(ConfigError, match="tasks a and b both predict scheme 68"):
        make({"a": landmarks("68"), "b": landmarks("68")})
    with pytest.raises(ConfigError, match="use encoder=pixels"):
        Decafa(make_tasks(), PlainConvolutions(SIZE))

# SPDX-License-Identifier: Apache-2.0
"""Closed forms of the uncertainty weights, masks, and how they learn."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch
from torch import nn

from affect import losses
from affect.errors import ConfigError
from affect.losses.base import Terms
from affect.models.baseline import Baseline
from affect.models.weighting import FixedWeighting, UncertaintyWeighting
from tests.models.test_base import make_batch, make_module, make_tasks


def make(gaussian=("b",), **arguments) -> UncertaintyWeighting:
    weighting = UncertaintyWeighting(gaussian, **arguments)
    weighting.bind({"a": losses.BinaryCrossEntropy(), "b": losses.MSE()}, {"a": ("x", "y"), "b": ("v",)})
    return weighting


def terms(a=(0.3, 0.02), b=(4.0,), counts=(5.0, 2.0, 3.0)) -> dict[str, Terms]:
    count_a, count_b = torch.tensor(counts[:2]), torch.tensor(counts[2:])
    return {"a": Terms(torch.tensor(a) * count_a, count_a), "b": Terms(torch.tensor(b) * count_b, count_b)}


def test_it_starts_as_the_sum_of_means():
    found = make()(terms())
    assert float(found["a"]) == pytest.approx(0.32)
    assert float(found["b"]) == pytest.approx(0.5 * 4.0)


def test_it_converges_to_the_closed_forms():
    weighting = make()
    optimizer = torch.optim.LBFGS(weighting.parameters(), max_iter=200, tolerance_change=1e-12)

    def closure():
        optimizer.zero_grad()
        total = torch.stack(list(weighting(terms()).values())).sum()
        total.backward()
        return total

    optimizer.step(closure)
    learnt = {name: s.detach() for name, s in weighting.log_sigma.items()}
    wanted = torch.tensor([0.5 * math.log(2 * 0.3), 0.5 * math.log(2 * 0.02)])
    torch.testing.assert_close(learnt["a"], wanted, atol=1e-3, rtol=0)
    torch.testing.assert_close(learnt["b"], torch.tensor([0.5 * math.log(4.0)]), atol=1e-3, rtol=0)
    values = weighting(terms())
    assert float(values["b"]) == pytest.approx(0.5 + 0.5 * math.log(4.0), abs=1e-4)
    assert float(values["a"]) == pytest.approx(sum(0.5 + 0.5 * math.log(2 * loss) for loss in (0.3, 0.02)), abs=1e-4)


def test_at_the_optimum_the_scale_of_a_loss_does_not_matter():
    parameter = torch.tensor([0.7, 0.2], dtype=torch.float64, requires_grad=True)
    gradients = []
    for scale in (1.0, 100.0):
        weighting = make().double()
        loss = scale * (parameter**2).sum()
        weighting.log_sigma["b"].data.fill_(0.5 * math.log(float(loss.detach())))
        term = Terms(loss[None] * 3, torch.tensor([3.0], dtype=torch.float64))
        (gradient,) = torch.autograd.grad(weighting({"b": term})["b"], parameter)
        gradients.append(gradient)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=0)


def test_a_term_without_a_label_moves_nothing():
    weighting = make()
    raw = torch.ones(2, requires_grad=True)
    term = Terms(raw * torch.tensor([1.0, 0.0]), torch.tensor([4.0, 0.0]))
    found = weighting({"a": term, "b": Terms(raw[:1] * 0, torch.zeros(1))})
    torch.stack(list(found.values())).sum().backward()
    assert weighting.log_sigma["a"].grad[1] == 0
    assert weighting.log_sigma["a"].grad[0] != 0
    assert weighting.log_sigma["b"].grad[0] == 0
    assert raw.grad is not None


def test_frozen_at_zero_it_is_the_plain_loss_of_one_task():
    weighting = UncertaintyWeighting(train=False)
    weighting.bind({"e": losses.CrossEntropy()}, {"e": ("e",)})
    term = {"e": Terms(torch.tensor([6.0]), torch.tensor([4.0]))}
    assert float(weighting(term)["e"]) == float(FixedWeighting()(term)["e"])
    assert not any(p.requires_grad for p in weighting.parameters())


def test_it_is_clamped():
    weighting = make(limit=2.0)
    weighting.log_sigma["b"].data.fill_(-50.0)
    found = weighting(terms())["b"]
    assert float(found) == pytest.approx(0.5 * math.exp(4) * 4.0 - 2.0)
    assert weighting.findings()["sigma"]["b"]["v"] == pytest.approx(math.exp(-2))


@pytest.mark.parametrize(("start", "loss"), [(-2.5, 4.0), (2.5, 0.2)])
def test_what_left_the_range_comes_back_when_its_loss_changes(start, loss):
    """An optimiser's momentum carries s beyond the limit; there the loss has to be able to turn it round."""
    weighting = make(limit=2.0)
    weighting.log_sigma["b"].data.fill_(start)
    term = {"b": Terms(torch.tensor([3.0 * loss]), torch.tensor([3.0]))}
    optimizer = torch.optim.Adam([weighting.log_sigma["b"]], 0.05)
    for _ in range(200):
        optimizer.zero_grad()
        weighting(term)["b"].backward()
        optimizer.step()
    assert abs(float(weighting.log_sigma["b"].detach())) < 1.9


@pytest.mark.parametrize(("start", "loss"), [(-2.0, 1e-9), (2.0, 1e9)])
def test_beyond_the_limit_there_is_no_further_way_out(start, loss):
    weighting = make(limit=2.0)
    weighting.log_sigma["b"].data.fill_(start)
    weighting({"b": Terms(torch.tensor([loss]), torch.tensor([1.0]))})["b"].backward()
    assert weighting.log_sigma["b"].grad.tolist() == [0.0]


def test_squared_errors_are_gaussian_by_default():
    weighting = make(gaussian=None)
    assert weighting.gaussian == ("b",)
    with pytest.raises(ConfigError, match="no task 'c'"):
        make(gaussian=("c",))


def test_known_noise_is_recovered():
    torch.manual_seed(0)
    x = torch.randn(4000, 3)
    noise = torch.tensor([0.1, 1.0])
    y = x[:, :2] + noise * torch.randn(4000, 2)
    model, weighting = nn.Linear(3, 2), UncertaintyWeighting()
    weighting.bind({"t": losses.MSE()}, {"t": ("first", "second")})
    optimizer = torch.optim.Adam([*model.parameters(), *weighting.parameters()], 0.02)
    for _ in range(400):
        optimizer.zero_grad()
        term = losses.MSE()(model(x), y, torch.ones_like(y, dtype=torch.bool))
        weighting({"t": term})["t"].backward()
        optimizer.step()
    sigma = weighting.findings()["sigma"]["t"]
    assert sigma["first"] == pytest.approx(0.1, rel=0.1)
    assert sigma["second"] == pytest.approx(1.0, rel=0.1)


def errors_of_three_tasks(weighting: nn.Module, scales: tuple[float, float, float]) -> torch.Tensor:
    """Return the error of three related tasks on new data, relative to their spread, after joint training."""
    torch.manual_seed(0)
    x = torch.randn(1024, 6)
    shared = (1.5 * x @ torch.randn(6, 4) / 6**0.5).sin()
    truth = shared @ torch.randn(4, 3)
    truth = (truth - truth.mean(0)) / truth.std(0)
    units = torch.tensor(scales)
    y = (truth + 0.3 * torch.randn_like(truth)) * units
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    groups: list[dict] = [{"params": model.parameters()}]
    if isinstance(weighting, UncertaintyWeighting):
        weighting.bind({"t": losses.MSE()}, {"t": ("a", "b", "c")})
        groups.append({"params": weighting.parameters(), "lr": 0.05})
    # With a long memory Adam's steps stay as small as the first gradients were large, whatever the weights become.
    optimizer = torch.optim.Adam(groups, 0.02, betas=(0.9, 0.9))
    known = torch.ones(512, 3, dtype=torch.bool)
    for _ in range(300):
        optimizer.zero_grad()
        term = losses.MSE()(model(x[:512]) * units, y[:512], known)
        weighting({"t": term})["t"].backward()
        optimizer.step()
    return (model(x[512:]) - truth[512:]).square().mean(0).sqrt().detach()


def test_labels_on_a_large_scale_do_not_drown_the_other_tasks():
    alike, large = (1.0, 1.0, 1.0), (1.0, 1.0, 100.0)
    wanted = errors_of_three_tasks(FixedWeighting(), alike)
    fixed, learnt = (errors_of_three_tasks(w, large) for w in (FixedWeighting(), UncertaintyWeighting()))
    assert (fixed[:2] > 2 * wanted[:2]).all()
    assert (learnt[:2] < 1.6 * wanted[:2]).all()


class TestInAModel:
    def test_every_output_has_its_own(self):
        module = make_module(weighting=UncertaintyWeighting())
        assert {n: len(s) for n, s in module.weighting.log_sigma.items()} == {
            "au": 2,
            "valence_arousal": 2,
            "landmarks": 1,
        }
        module.training_step(make_batch(), 0).backward()
        assert all(s.grad is not None for s in module.weighting.parameters())
        assert set(module.findings()["weighting"]["sigma"]["au"]) == {"AU1", "AU2"}

    def test_they_have_a_rate_of_their_own_and_no_decay(self):
        module = make_module(weighting=UncertaintyWeighting(lr=0.07))
        optimizer = module.build_optimizer()
        group = next(g for g in optimizer.param_groups if g.get("name") == "weighting")
        assert (group["lr"], group["weight_decay"]) == (0.07, 0.0)
        assert len(group["params"]) == 3
        listed = [id(p) for g in optimizer.param_groups for p in g["params"]]
        assert len(listed) == len(set(listed))

    def test_a_batch_without_labels_changes_nothing(self):
        module = make_module(weighting=UncertaintyWeighting())
        batch = make_batch()
        batch = dataclasses.replace(batch, masks={name: torch.zeros_like(m) for name, m in batch.masks.items()})
        module.training_step(batch, 0).backward()
        assert all((p.grad == 0).all() for p in module.parameters() if p.grad is not None)

    def test_the_fixed_weight_of_a_task_is_a_factor_besides(self):
        found = {}
        for weight in (0.0, 1.0, 3.0):
            made = make_tasks()
            made["valence_arousal"].weight = weight
            torch.manual_seed(0)
            module = Baseline(made, make_module().encoder, weighting=UncertaintyWeighting())
            module.weighting.log_sigma["valence_arousal"].data.fill_(0.3)
            loss = module.training_step(make_batch(), 0)
            loss.backward()
            gradients = {name: s.grad.clone() for name, s in module.weighting.log_sigma.items()}
            found[weight] = loss.detach(), gradients
        own, others = found[1.0][0] - found[0.0][0], found[1.0][1]
        torch.testing.assert_close(found[3.0][0] - found[0.0][0], 3 * own)
        assert own.abs() > 1e-3
        assert (found[0.0][1]["valence_arousal"] == 0).all()
        torch.testing.assert_close(found[3.0][1]["valence_arousal"], 3 * others["valence_arousal"])
        torch.testing.assert_close(found[3.0][1]["au"], others["au"])

    def test_one_run_of_the_optimiser_moves_them(self):
        adam = functools.partial(torch.optim.AdamW, lr=1e-3)
        module = Baseline(make_tasks(), make_module().encoder, optimizer=adam, weighting=UncertaintyWeighting(lr=0.1))
        optimizer = module.build_optimizer()
        module.training_step(make_batch(), 0).backward()
        optimizer.step()
        assert all((s != 0).all() for s in module.weighting.parameters())


def test_known_deviations_are_weights_that_stay():
    weighting = make(train=False, initial={"a": {"y": 0.5}, "b": 3.0})
    found = weighting(terms())
    assert float(found["a"]) == pytest.approx(0.3 + 0.02 / 0.25 + math.log(0.5))
    assert float(found["b"]) == pytest.approx(0.5 * 4.0 / 9 + math.log(3))
    assert not any(parameter.requires_grad for parameter in weighting.parameters())
    sigma = weighting.findings()["sigma"]
    assert sigma["a"] == pytest.approx({"x": 1.0, "y": 0.5})
    assert sigma["b"] == pytest.approx({"v": 3.0})


@pytest.mark.parametrize(
    ("initial", "message"),
    [
        ({"c": 1.0}, r"weighting\.initial: no task 'c'"),
        ({"a": {"z": 1.0}}, r"weighting\.initial\.a: no output 'z'"),
        ({"b": 0.0}, r"weighting\.initial\.b: a standard deviation of 0"),
        ({"b": 1e9}, "weighting.limit=5"),
    ],
)
def test_initial_deviations_that_cannot_be_are_refused(initial, message):
    with pytest.raises(ConfigError, match=message):
        make(initial=initial)

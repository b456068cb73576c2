from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from blockcache.tools.demo import checkpoint, progress, train  # noqa: E402
from blockcache.tools.demo.config import CPU, UNetConfig  # noqa: E402
from blockcache.tools.demo.progress import Budget, learning_rate_factor  # noqa: E402
from blockcache.tools.demo.unet import noise_schedule  # noqa: E402
from blockcache.tools.demo.workers import Workers  # noqa: E402

TINY = replace(
    CPU,
    unet=UNetConfig(channels=(16, 32), transformer_layers=(1, 1), head_channels=16),
    train=replace(CPU.train, batch=4, piece=2, warmup_steps=1, workers=1),
)


def source():
    generator = torch.Generator().manual_seed(0)
    return train.Source(
        latents=torch.randn((6, 4, 16, 16), generator=generator),
        contexts=torch.randn((7, 20, 384), generator=generator).half(),
        weights=torch.ones(6, dtype=torch.float64),
        timestep_weights=timestep_weights(),
    )


def timestep_weights():
    return train.timestep_weights(noise_schedule().alphas_cumprod, 5.0)


def state(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_resumed_run_continues_like_the_uninterrupted_one(tmp_path):
    first = train.Trainer(TINY, tmp_path)
    batches = [source().draw(4, 0.1, "cpu") for _ in range(3)]
    for batch in batches[:2]:
        first.update(batch)
    first.save()
    second = train.Trainer(TINY, tmp_path)
    assert second.step == 2
    assert second.budget.spent_s >= first.budget.spent_s - 60
    for trainer in (first, second):
        trainer.budget = Budget(TINY.train.minutes)
        trainer.update(batches[2])
    assert torch.allclose(state(first), state(second), atol=1e-6)
    averages = [torch.cat([p.flatten() for p in t.ema.parameters()]) for t in (first, second)]
    assert torch.allclose(*averages, atol=1e-6)


def test_no_checkpoint_means_a_fresh_start(tmp_path):
    assert train.Trainer(TINY, tmp_path).step == 0
    assert checkpoint.Progress() == checkpoint.Progress(step=0, spent_s=0.0)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_workers_give_the_gradient_of_the_mean(count):
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 1)
    pieces = [torch.randn(3, 5) for _ in range(4)]
    workers = Workers(model, count, lambda m, x: m(x).square().mean())
    for _ in range(2):
        model.zero_grad()
        mean = workers.accumulate(pieces)
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    expected = model(torch.cat(pieces)).square().mean()
    expected.backward()
    assert mean == pytest.approx(float(expected.detach()), rel=1e-5)
    for parameter, gradient in zip(model.parameters(), found, strict=True):
        assert torch.allclose(parameter.grad, gradient, atol=1e-6)


def test_helpers_see_the_weights_the_optimizer_moved():
    model = torch.nn.Linear(1, 1, bias=False)
    workers = Workers(model, 2, lambda m, x: m(x).sum())
    pieces = [torch.ones(1, 1), torch.ones(1, 1)]
    for weight in (2.0, 5.0):
        with torch.no_grad():
            model.weight.fill_(weight)
        assert workers.accumulate(pieces) == pytest.approx(weight)


def test_nearly_clean_samples_are_drawn_less_often():
    weights = timestep_weights()
    assert float(weights[-1]) == 1
    assert float(weights[0]) < 0.01
    assert bool((weights.diff() >= 0).all())


def test_learning_rate_warms_up_and_ends_with_the_budget():
    factors = [learning_rate_factor(step, 10, 0.0) for step in range(12)]
    assert np.all(np.diff(factors[:10]) > 0)
    assert learning_rate_factor(100, 10, 0.5) == pytest.approx(0.505)
    assert learning_rate_factor(100, 10, 1.0) == pytest.approx(0.005)


def test_budget_counts_steps_but_not_pauses(monkeypatch):
    now = iter([100.0, 101.0, 103.0, 5000.0, 5000.0])
    clock = SimpleNamespace(monotonic=lambda: next(now))
    monkeypatch.setattr(progress, "time", clock)
    budget = Budget(minutes=1, spent_s=7.0)
    spent = []
    for _ in range(3):
        budget.tick()
        spent.append(budget.spent_s)
    assert spent == [8.0, 10.0, 10.0 + progress.PAUSE_S]
    assert budget.fraction == pytest.approx(20 / 60)
    assert Budget(minutes=0).fraction == 1


def test_average_follows_the_weights_at_every_fourth_step(tmp_path):
    trainer = train.Trainer(TINY, tmp_path)
    seen = []
    for _ in range(train.AVERAGE_EVERY):
        trainer.update(source().draw(4, 0.1, "cpu"))
        seen.append(torch.cat([p.flatten() for p in trainer.ema.parameters()]))
    assert all(torch.equal(seen[0], average) for average in seen[:-1])
    assert not torch.equal(seen[-1], seen[0])


def test_captions_are_dropped_to_the_empty_one():
    batch = source().draw(64, 1.0, "cpu")
    empty = source().contexts[-1].float()
    assert bool((batch.contexts == empty).all())

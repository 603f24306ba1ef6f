"""The divergence from a teacher, by blocks, against whole logits, autograd and TRL."""
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from fira.loss import head
from fira.loss.distill import distillation_loss, forward, jensen_shannon, reverse
from fira.loss.head import IGNORED
from tests.models import build, tiny_spec

STUDENT, TEACHER = tiny_spec("fira"), tiny_spec("fira2", vocab_size=37, d_model=24)
DIVERGENCES = {"forward": (forward, 0.0), "reverse": (reverse, 1.0),
               "jsd 0.5": (jensen_shannon(0.5), 0.5), "jsd 0.1": (jensen_shannon(0.1), 0.1)}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Five rows a block, which do not divide the rows below."""
    monkeypatch.setitem(head.BLOCK, "cpu", 5 * STUDENT.vocab_size)


def models_and_batch():
    ids = torch.randint(STUDENT.vocab_size, (3, 9), generator=torch.Generator().manual_seed(4))
    targets = ids[:, 1:].clone()
    targets[0, :5] = IGNORED
    return (build(STUDENT, seed=0).eval(), build(TEACHER, seed=1).eval(),
            SimpleNamespace(tokens_BT=ids[:, :-1], targets_BT=targets))


def taught(teacher):
    def teach(batch):
        with torch.no_grad():
            return teacher.features(batch.tokens_BT), *teacher.head_weights()
    return teach


def whole(student_NV, teacher_NV, beta):
    """The divergences as they are defined, from logits."""
    log_q, log_p = student_NV.log_softmax(-1), teacher_NV.log_softmax(-1)
    kl = lambda a, b: (a.exp() * (a - b)).sum(-1)  # noqa: E731
    if beta in (0.0, 1.0):
        return kl(log_p, log_q) if beta == 0 else kl(log_q, log_p)
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("temperature, ce", [(1.0, 0.0), (2.0, 0.3), (1.0, 1.0)])
def test_values_and_gradients_equal_those_of_whole_logits(name, temperature, ce):
    student, teacher, batch = models_and_batch()
    divergence, beta = DIVERGENCES[name]
    ours, found = distillation_loss(taught(teacher), divergence, temperature, ce)(student, batch)
    logits, scored = student(batch.tokens_BT), batch.targets_BT != IGNORED
    other = teacher(batch.tokens_BT).detach()[..., :STUDENT.vocab_size]
    apart = temperature ** 2 * whole(logits / temperature, other / temperature, beta)[scored].mean()
    entropy = F.cross_entropy(logits.flatten(0, 1), batch.targets_BT.flatten())
    plain = (1 - ce) * apart + ce * entropy
    agreement = (logits.argmax(-1) == other.argmax(-1))[scored].float().mean()
    torch.testing.assert_close([ours, *found.values()], [plain, apart, entropy, agreement])
    parameters = list(student.parameters())
    torch.testing.assert_close(*(torch.autograd.grad(loss, parameters, allow_unused=True)
                                 for loss in (3 * ours, 3 * plain)), rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_it_is_the_number_of_trl_times_the_squared_temperature(name, temperature):
    trainer = pytest.importorskip("trl.experimental.gkd.gkd_trainer").GKDTrainer
    student, teacher, batch = models_and_batch()
    divergence, beta = DIVERGENCES[name]
    ours, _ = distillation_loss(taught(teacher), divergence, temperature)(student, batch)
    labels = batch.targets_BT
    theirs = trainer.generalized_jsd_loss(
        student(batch.tokens_BT), teacher(batch.tokens_BT)[..., :STUDENT.vocab_size], labels,
        beta, temperature)
    torch.testing.assert_close(ours, temperature ** 2 * theirs)


@pytest.mark.parametrize("divergence", [one for one, _ in DIVERGENCES.values()], ids=DIVERGENCES)
def test_probabilities_too_small_for_a_float_leave_it_finite(divergence):
    logs = torch.tensor([[0.0, -300.0, -400.0]])
    cost, gradient = divergence(logs, logs[:, [1, 0, 2]])
    assert cost.isfinite().all() and gradient.isfinite().all()
    assert float(cost) == pytest.approx(300.0) or float(cost) < 1

"""The policy gradient of packed answers is GRPO without its biases as written: whole logits, one
row for each answer; and TRL gives the same number."""
from unittest import mock

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from fira.data.conversations import Row
from fira.loss.policy import PolicyBatch, policy_loss
from fira.model import build_meta
from fira.model.router import Watch
from fira.parallel.layout import Layout, read
from fira.parallel.mesh import Mesh
from fira.stages.rollouts import Rollout, pack_rollouts
from tests.models import build, tiny_spec

SPECS = {"fira2": tiny_spec("fira2"), "fira": tiny_spec("fira"),
         "dense": tiny_spec("fira2", num_experts=1, top_k=1)}
SIZES = [(3, 2), (5, 1), (7, 3), (4, 2), (4, 1), (6, 5), (9, 4)]  # ids, and those of the answer
RANDOM = np.random.default_rng(3)
ADVANTAGES = [0.5, -0.5, 0.75, -0.25, -0.25, -0.25, 0.0]
ROLLOUTS = [Rollout(Row(RANDOM.integers(0, 31, size).astype(np.int32),
                        np.arange(size) >= size - answer),
                    RANDOM.normal(-3, 0.5, answer).astype(np.float32), None, "", False)
            for size, answer in SIZES]


def plain_logs(model):
    """The log-probabilities of each answer's tokens."""
    found = []
    for one in ROLLOUTS:
        ids = torch.from_numpy(one.row.ids).long()[None]
        logs_T = model(ids[:, :-1]).log_softmax(-1).gather(2, ids[:, 1:, None]).flatten()
        found.append(logs_T[-len(one.logs_A):])
    return found


def plain_loss(model, reference, clip, kl):
    """A sum over answers and tokens, divided once, and how many tokens have no gradient."""
    total, clipped = torch.zeros(()), 0
    for logs_A, before_A, one, advantage in zip(plain_logs(model), plain_logs(reference), ROLLOUTS,
                                                ADVANTAGES, strict=True):
        for log_p, log_reference, log_q in zip(logs_A, before_A.detach(), one.logs_A, strict=True):
            ratio = torch.exp(log_p - float(log_q))
            gain = ratio * advantage
            if clip is not None and (ratio > 1 + clip if advantage > 0 else ratio < 1 - clip):
                clipped += advantage != 0
                gain = (1 + clip if advantage > 0 else 1 - clip) * torch.tensor(advantage)
            d = log_reference - log_p
            total = total - gain + kl * (torch.exp(d) - d - 1)
    tokens = sum(answer for _, answer in SIZES)
    return total / tokens, clipped / tokens


@pytest.mark.parametrize("clip, kl", [(None, 0.0), (0.2, 0.0), (0.2, 0.3)])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_loss_and_gradients_equal_whole_logits_over_micro_batches_and_trl(spec, clip, kl):
    model, reference = (build(spec, seed, 0.2).eval() for seed in (1, 2))
    fields = pack_rollouts(ROLLOUTS, ADVANTAGES, 12)
    fields[5] = torch.zeros_like(fields[3])
    for sequence, one in enumerate(zip(*(field.split(1) for field in fields), strict=True)):
        batch = PolicyBatch(*one)
        logits = read(reference, batch)(batch.tokens_BT).log_softmax(-1)
        fields[5][sequence] = logits.gather(2, batch.targets_BT.clamp(0)[..., None])[0, :, 0].data
    batches = [PolicyBatch(*one) for one in zip(*(field.split(1) for field in fields), strict=True)]
    assert len({batch.weight for batch in batches}) > 1
    layout = Layout(Mesh(), build_meta(spec))
    layout.model.eval().load_state_dict(model.state_dict())  # without the routers' own losses
    loss, metrics = layout.forward_backward(batches, policy_loss(clip, kl))
    plain, clipped = plain_loss(model, reference, clip, kl)
    plain.backward()
    assert loss == pytest.approx(plain.item(), rel=1e-5, abs=1e-6)
    assert metrics.get("clipped", 0) == pytest.approx(clipped) and (clip is None or clipped > 0)
    sampled = np.concatenate([one.logs_A for one in ROLLOUTS])
    assert metrics["gap_max"] == pytest.approx(
        np.abs(torch.cat(plain_logs(model)).detach().numpy() - sampled).max())
    for (name, ours), theirs in zip(layout.model.named_parameters(), model.parameters(),
                                    strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=name)
    if clip is not None:
        assert loss == pytest.approx(trl_loss(model, reference, clip, kl), rel=1e-5,
                                     abs=1e-6)


def trl_loss(model, reference, clip, kl):
    """TRL's number, from the same log-probabilities."""
    trainer = pytest.importorskip("trl").GRPOTrainer
    logs, before, sampled = (pad_sequence(rows, batch_first=True).detach() for rows in (
        plain_logs(model), plain_logs(reference), [torch.from_numpy(one.logs_A)
                                                   for one in ROLLOUTS]))
    mask = pad_sequence([torch.ones(answer) for _, answer in SIZES], batch_first=True)
    self = mock.MagicMock(
        loss_type="dapo", importance_sampling_level="token", beta=kl, epsilon_low=clip,
        epsilon_high=clip, top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
        _entropy_bonus_enabled=False, aux_loss_enabled=False)
    self.args.delta, self.args.use_bias_correction_kl, self.model.training = None, False, False
    self.accelerator.num_processes, self.accelerator.gather = 1, lambda tensor: tensor
    self._get_per_token_logps_and_entropies.return_value = logs, torch.zeros_like(logs), None
    ids = torch.zeros_like(mask).long()
    return float(trainer._compute_loss(self, None, {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids,
        "completion_mask": mask, "advantages": torch.tensor(ADVANTAGES),
        "old_per_token_logps": sampled, "ref_per_token_logps": before,
        "num_items_in_batch": mask.sum()}))


def test_a_batch_with_experts_is_processed_by_them_and_counted():
    spec = SPECS["fira2"]
    model, other = build(spec, 1).eval(), build(spec, 2)
    batch = PolicyBatch(*pack_rollouts(ROLLOUTS, ADVANTAGES, 12, layers=2, top_k=2))
    with Watch(other) as watch:
        read(other, batch)
    theirs = torch.stack(watch.experts, 1).view(*batch.tokens_BT.shape, 2, 2)
    theirs[:, :3] = -1  # not known: the router chooses
    with Watch(model) as own:
        read(model, batch)
        chosen = torch.stack(own.experts, 1).view_as(theirs)
        model.train()
        read(model, batch._replace(experts_BTLK=theirs))
        replayed = torch.stack(own.experts, 1).view_as(theirs)
    assert torch.equal(replayed[:, 3:], theirs[:, 3:]) and not torch.equal(replayed, chosen)
    assert torch.equal(replayed[:, :3, 0], chosen[:, :3, 0])
    assert [int(block.moe.router.load_count_E.sum()) for block in model.blocks] == [theirs[
        :, :, 0].numel()] * 2

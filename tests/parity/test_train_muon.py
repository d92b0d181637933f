"""Muon: what it makes of a matrix, and its steps against torch's own.

Its bits on any number of stages, and across a resume, are in `test_train_resume`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ray_ministral.config import OptimizerConfig
from ray_ministral.errors import InputError
from ray_ministral.training.muon import orthogonalised
from ray_ministral.training.restore import load_stage
from tests.parity.test_train_resume import save
from tests.parity.train_reference import HuggingFaceLoop, mean_loss
from tests.parity.train_runs import CLIP_NORM, THREE, make_batch, run

MUON = OptimizerConfig(name="muon", weight_decay=0.1, adam_eps=1e-6)
STEPS, RATE = 6, 1e-3


@pytest.mark.parametrize("shape", [(24, 24), (24, 60), (60, 24), (1, 24)])
def test_a_matrix_becomes_nearly_orthogonal(shape: tuple[int, int]) -> None:
    """The same singular vectors, and singular values that differ by little, whatever they were."""
    rows, columns = min(shape), max(shape)
    u, _ = torch.linalg.qr(torch.randn(rows, rows, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(columns, rows, dtype=torch.float64))
    sizes = torch.logspace(0, -1.5, rows, dtype=torch.float64)
    wide = (u * sizes) @ v.mT
    found = orthogonalised((wide if shape == wide.shape else wide.mT).float()).double()
    assert found.shape == shape
    found = found if shape == wide.shape else found.mT
    turned = u.mT @ found @ v
    assert torch.allclose(turned, turned.diag().diag(), atol=1e-4)
    assert turned.diag().min() > 0.5
    assert turned.diag().max() < 1.3


def test_a_matrix_without_a_gradient_stays() -> None:
    assert not orthogonalised(torch.zeros(3, 4)).any()


def torch_muon(loop: HuggingFaceLoop, rate: float) -> list[torch.optim.Optimizer]:
    """The Muon of torch for each of Hugging Face's matrices but embedding and output layer; AdamW for the rest."""
    plain = {n: p for n, p in loop.parameters.items() if p.ndim == 2 and "embed_tokens" not in n and "lm_head" not in n}
    rest = [p for n, p in loop.parameters.items() if n not in plain]
    decay, eps = MUON.weight_decay, MUON.adam_eps
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [
        torch.optim.Muon(list(plain.values()), lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=rate, betas=(MUON.adam_beta1, MUON.adam_beta2), eps=eps),
    ]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_steps_are_torchs(tied: bool, directory: Any, reference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor's way. Query, key and value orthogonalised as one would be far off."""
    monkeypatch.setattr(Tensor, "bfloat16", lambda tensor: tensor.float().clone())  # what torch's iteration works in
    loop = HuggingFaceLoop(reference(tied=tied))
    start = loop.weights()
    optimizers = torch_muon(loop, RATE)
    expected = []
    for step in range(STEPS):
        loss = mean_loss(loop.model, make_batch(step))
        loss.backward()
        expected.append((loss.item(), torch.nn.utils.clip_grad_norm_(loop.parameters.values(), CLIP_NORM).item()))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    pipeline = THREE.pipeline(directory(tied=tied), optimizer=MUON)
    schedule = THREE.make_schedule(pipeline)
    for (loss, norm), step in zip(expected, range(STEPS), strict=True):
        batch = make_batch(step)
        found = pipeline.step(schedule, batch.microbatches, *batch.blocks, learning_rate=RATE, clip_norm=CLIP_NORM)
        assert found == pytest.approx((loss, norm), rel=1e-3)
    weights = pipeline.weights()
    for name, theirs in loop.weights().items():
        way = off_by(theirs, start[name])
        assert way > 0
        assert off_by(weights[name], theirs) < 1e-2 * way, name


def off_by(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm())


def test_a_checkpoint_of_another_optimizer_is_refused(directory: Any, tmp_path: Path) -> None:
    model_dir = directory(tied=True)
    first = THREE.pipeline(model_dir)
    run(first, THREE, range(1))
    checkpoint = save(first, tmp_path, 1, model_dir)
    second = THREE.pipeline(model_dir, optimizer=MUON)
    with pytest.raises(InputError, match=r"momentum_buffer.*--optimizer"):
        load_stage(second.stages[0], checkpoint)

"""Chunked, gathered log-probs against transformers' own full logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlsys.models.loading import load_causal_lm
from rlsys.models.logprobs import PolicyModel, ValueModel, response_logprobs

PROMPTS, RESPONSES, TEMPERATURE = [5, 1, 9, 3], [7, 12, 1, 4], 0.7


@pytest.fixture(scope="module")
def model(tiny_model: Path):
    model = load_causal_lm(tiny_model, torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # an untrained model is near uniform; make its distributions differ
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    prompts, responses = torch.tensor(PROMPTS), torch.tensor(RESPONSES)
    width = int((prompts + responses).max())
    ids = torch.randint(2, 90, (len(PROMPTS), width), generator=torch.Generator().manual_seed(1))
    return ids, prompts, responses


def full(model, rows, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Row by row, token by token, from the full logits of an unpadded row."""
    ids, prompts, responses = rows
    logprobs = torch.zeros(len(ids), int(responses.max()))
    entropies = torch.zeros_like(logprobs)
    for b, (p, r) in enumerate(zip(prompts.tolist(), responses.tolist(), strict=True)):
        row = ids[b, : p + r]
        distribution = torch.distributions.Categorical(logits=model(input_ids=row[None]).logits[0] / temperature)
        logprobs[b, :r] = distribution.log_prob(row.roll(-1))[p - 1 : p + r - 1]
        entropies[b, :r] = distribution.entropy()[p - 1 : p + r - 1]
    return logprobs, entropies


@pytest.mark.parametrize("packing", ["padded", "packed", "shared"])
@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_equal_to_full_logits(model, rows, packing: Any, chunk: int) -> None:
    wanted, wanted_entropy = full(model, rows, TEMPERATURE)
    got, entropy = response_logprobs(model, *rows, chunk=chunk, temperature=TEMPERATURE, entropy=True, packing=packing)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, wanted_entropy, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("packing", ["padded", "packed", "shared"])
@pytest.mark.parametrize("chunk", [3, 1000])
def test_gradients_equal_to_full_logits(model, rows, packing: Any, chunk: int) -> None:
    def gradient(logprobs: torch.Tensor, entropies: torch.Tensor) -> torch.Tensor:
        model.zero_grad()
        (logprobs.square().sum() + 3 * entropies.sum()).backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    wanted = gradient(*full(model, rows, TEMPERATURE))
    got = gradient(
        *response_logprobs(model, *rows, chunk=chunk, temperature=TEMPERATURE, entropy=True, packing=packing)
    )
    assert (got - wanted).norm() <= 1e-5 * wanted.norm()


def test_logits_of_one_chunk_are_all_that_is_held(model, rows) -> None:
    """Of everything that autograd keeps for the backward pass, nothing is as large as two chunks of logits."""
    vocabulary, chunk = model.config.vocab_size, 4
    kept: list[torch.Size] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        response_logprobs(model, *rows, chunk=chunk, temperature=1.0, entropy=True)
    assert not any(vocabulary in shape for shape in kept if shape[0] != vocabulary)


def test_names_are_those_of_the_checkpoint(model) -> None:
    assert set(PolicyModel(model).hf_names.values()) == set(dict(model.named_parameters()))


def test_values_start_at_zero_and_use_the_state_before_the_token(model, rows) -> None:
    critic = ValueModel(model)
    ids, prompts, responses = rows
    arguments = {"width": int(responses.max()), "packing": "padded"}
    assert not critic(*rows, **arguments).any()
    torch.nn.init.ones_(critic.head.weight)
    before = critic(*rows, **arguments)
    assert not before[2, 1:].any(), "row 2 has one response token"
    changed = ids.clone()
    changed[0, int(prompts[0]) + 3] = 1  # response token 3 of row 0: values up to its own do not know it
    after = critic(changed, prompts, responses, **arguments)
    torch.testing.assert_close(before[0, :4], after[0, :4])
    assert (before[0, 4:7] != after[0, 4:7]).all()
    torch.testing.assert_close(critic(*rows, width=arguments["width"], packing="packed"), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("packing", ["padded", "packed", "shared"])
def test_curvature_is_that_of_the_output_projection(model, rows, packing: Any) -> None:
    """|h|^2 |u|^2 is the squared norm of the gradient by the projection; the spread is from the full matrix."""
    ids, prompts, responses = rows
    policy = PolicyModel(model)
    lengths = {"width": int(responses.max()), "chunk": 3, "temperature": TEMPERATURE, "entropy": False}
    with torch.no_grad():
        logprobs, found = policy(ids, prompts, responses, **lengths, packing=packing, curvature=True)
        same, _ = policy(ids, prompts, responses, **lengths, packing=packing)
    torch.testing.assert_close(logprobs, same)
    assert found is not None
    assert found.shape == (*logprobs.shape, 3)
    head = model.get_output_embeddings().weight.detach()
    for b, (p, r) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        row = ids[b, : p + r]
        with torch.no_grad():
            hidden = model.base_model(input_ids=row[None]).last_hidden_state[0, p - 1 : -1]
        for t, (state, token) in enumerate(zip(hidden, row[p:].tolist(), strict=True)):
            weight = head.clone().requires_grad_()
            logits = weight @ state / TEMPERATURE
            (gradient,) = torch.autograd.grad(logits.log_softmax(0)[token], weight)
            probability = logits.detach().softmax(0)
            u = torch.nn.functional.one_hot(torch.tensor(token), len(probability)) - probability
            spread = u @ (probability.diag() - probability[:, None] * probability) @ u
            norm, square, curved = found[b, t].tolist()
            assert norm * square == pytest.approx(float(gradient.square().sum()), rel=1e-4)
            assert square == pytest.approx(float(u.square().sum()), rel=1e-4)
            assert curved == pytest.approx(float(spread), rel=1e-3, abs=1e-6)
        assert (found[b, r:] == 0).all()

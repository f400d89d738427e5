"""Log-probabilities, entropies and values of response tokens, without ever holding the logits of a whole batch.

Shapes: B rows (prompt then response, padded on the right), L their padded length, T the longest response, N all
response tokens of the rows in row order, H hidden size, V vocabulary.

Three ways to feed the rows to the backbone, with equal results:

- padded: one row each. Attention is causal and padding is on the right, so no real token sees it and no mask is needed.
- packed: all rows in one, with position ids that restart; `transformers` makes the attention block-diagonal for that.
- shared: rows of one prompt as a prefix tree, in which what they begin with in common stands once, and every token sees
  those above it. States, log-probs and gradients of shared tokens are computed once (Liu et al. 2025, Prefix Grouper,
  arXiv:2506.05433, for groups; here for any tree).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlsys.models.prefixes import forest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Packing = Literal["padded", "packed", "shared"]


def response_mask(response_lengths: Tensor, width: int) -> Tensor:
    """bool [B, T], True on the response tokens of each row; `width` is T."""
    return torch.arange(width, device=response_lengths.device)[None, :] < response_lengths[:, None]


def states(
    backbone: nn.Module, input_ids: Tensor, prompt_lengths: Tensor, response_lengths: Tensor, packing: Packing
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states [U, H] from which response tokens were predicted, their ids [U], and where each of the N is.

    The last is int64 [N], places in U; None: they are the N themselves.
    """
    if packing == "shared":
        arrays = (tensor.cpu().numpy() for tensor in (input_ids, prompt_lengths, response_lengths))
        found = forest(*arrays)
        device = input_ids.device
        ids, positions, mask, before, targets, index = (
            torch.from_numpy(array).to(device)
            for array in (found.ids, found.positions, found.mask, found.before, found.targets, found.index)
        )
        output = backbone(input_ids=ids, position_ids=positions, attention_mask=mask[:, None], use_cache=False)
        return output.last_hidden_state.flatten(0, 1)[before], targets, index
    mask = response_mask(response_lengths, int(response_lengths.max()))
    columns = prompt_lengths[:, None] + torch.arange(mask.shape[1], device=input_ids.device)[None, :]
    targets = input_ids.gather(1, columns.clamp(max=input_ids.shape[1] - 1))[mask]
    hidden = _hidden(backbone, input_ids, prompt_lengths, response_lengths, packed=packing == "packed")
    return hidden, targets, None


def _hidden(
    backbone: nn.Module, input_ids: Tensor, prompt_lengths: Tensor, response_lengths: Tensor, packed: bool
) -> Tensor:
    """[N, H]."""
    lengths = prompt_lengths + response_lengths - 1  # the last token predicts nothing
    width = int(lengths.max())
    columns = torch.arange(width, device=input_ids.device)[None, :]
    fed = columns < lengths[:, None]  # [B, width]
    predicts = fed & (columns >= prompt_lengths[:, None] - 1)
    if not packed:
        hidden = backbone(input_ids=input_ids[:, :width], use_cache=False).last_hidden_state
        return cast(Tensor, hidden[predicts])
    positions = columns.expand(len(lengths), -1)[fed]
    ids = input_ids[:, :width][fed]
    hidden = backbone(input_ids=ids[None], position_ids=positions[None], use_cache=False).last_hidden_state
    return cast(Tensor, hidden[0, predicts[fed]])


class ChunkedHead(nn.Module):
    """The output projection, applied to `chunk` tokens at a time.

    With gradients, each chunk is recomputed in the backward pass, so that the logits of one chunk are all that is held.
    """

    def __init__(self, lm_head: nn.Module) -> None:
        super().__init__()
        self.lm_head = lm_head

    def curvature(self, hidden: Tensor, targets: Tensor, *, chunk: int, temperature: float) -> Tensor:
        """What the gradient and curvature of each token's log-prob in this projection alone come to, float32 [N, 3].

        With u = e_y - p, p the probabilities at `temperature`, and h the hidden state over it, the gradient is the
        outer product of u and h. The three numbers are |h|^2, |u|^2 and u^T (diag(p) - p p^T) u.
        """
        parts = [
            self._curvature(part, wanted, temperature)
            for part, wanted in zip(hidden.split(chunk), targets.split(chunk), strict=True)
        ]
        return torch.cat(parts)

    def _curvature(self, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
        p = (self.lm_head(hidden).float() / temperature).softmax(dim=-1)
        chosen = p.gather(-1, targets[:, None]).squeeze(-1)
        squares, cubes = p.square().sum(-1), p.pow(3).sum(-1)
        spread = chosen - 2 * chosen.square() + cubes - (chosen - squares).square()
        norm = (hidden.float() / temperature).square().sum(-1)
        return torch.stack([norm, 1 - 2 * chosen + squares, spread], dim=-1)

    def _chunk(
        self, hidden: Tensor, targets: Tensor, temperature: float, entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        logits = self.lm_head(hidden).float()
        if temperature != 1.0:
            logits = logits / temperature
        log_softmax = logits.log_softmax(dim=-1)
        logprobs = log_softmax.gather(-1, targets[:, None]).squeeze(-1)
        return logprobs, -(log_softmax.exp() * log_softmax).sum(-1) if entropy else None

    def forward(
        self, hidden: Tensor, targets: Tensor, *, chunk: int, temperature: float, entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs [N] of `targets` [N] and entropies [N] (None unless asked for), float32."""
        if len(targets) <= chunk:
            return self._chunk(hidden, targets, temperature, entropy)
        parts = [
            checkpoint(self._chunk, part, wanted, temperature, entropy, use_reentrant=False)
            for part, wanted in zip(hidden.split(chunk), targets.split(chunk), strict=True)
        ]
        logprobs = torch.cat([part[0] for part in parts])
        return logprobs, torch.cat([part[1] for part in parts]) if entropy else None


class PolicyModel(nn.Module):
    """A causal language model as the learner sees it: rows in, log-probs of the response tokens out.

    Parameters are shared with `model`, not copied; `hf_names` gives their names in the Hugging Face checkpoint.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.backbone = model.base_model
        self.head = ChunkedHead(cast(nn.Module, model.get_output_embeddings()))
        # identity is what survives every way of wrapping; tied parameters appear once, under the embedding's name
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.hf_names = {name: names[id(parameter)] for name, parameter in self.named_parameters()}

    def forward(
        self,
        input_ids: Tensor,
        prompt_lengths: Tensor,
        response_lengths: Tensor,
        *,
        width: int,
        chunk: int,
        temperature: float,
        entropy: bool,
        packing: Packing,
        curvature: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Natural log-probs at `temperature` and entropies, float32 [B, width], 0 after each response.

        `input_ids` int64 [B, L]; lengths int64 [B], prompts at least one token long. With `curvature` the second is
        [B, width, 3] of `ChunkedHead.curvature` instead, which is without a gradient.
        """
        mask = response_mask(response_lengths, width)
        hidden, targets, index = states(self.backbone, input_ids, prompt_lengths, response_lengths, packing)
        logprobs, entropies = self.head(hidden, targets, chunk=chunk, temperature=temperature, entropy=entropy)
        if index is not None:
            logprobs, entropies = logprobs[index], None if entropies is None else entropies[index]
        if curvature:
            with torch.no_grad():
                found = self.head.curvature(hidden, targets, chunk=chunk, temperature=temperature)
                found = found if index is None else found[index]
            numbers = [_scatter(column.contiguous(), mask) for column in found.unbind(-1)]
            return _scatter(logprobs, mask), torch.stack(numbers, dim=-1)
        return _scatter(logprobs, mask), None if entropies is None else _scatter(entropies, mask)


class ValueModel(nn.Module):
    """A backbone with a scalar value head: the critic. The head starts at zero, and so does every value."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.backbone = model.base_model
        width = cast(nn.Linear, model.get_output_embeddings()).weight.shape[1]
        self.head = nn.Linear(width, 1, dtype=model.dtype)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(
        self, input_ids: Tensor, prompt_lengths: Tensor, response_lengths: Tensor, *, width: int, packing: Packing
    ) -> Tensor:
        """Value before each response token, float32 [B, width], 0 after each response."""
        hidden, _, index = states(self.backbone, input_ids, prompt_lengths, response_lengths, packing)
        values = self.head(hidden).squeeze(-1).float()
        return _scatter(values if index is None else values[index], response_mask(response_lengths, width))


def response_logprobs(
    model: PreTrainedModel,
    input_ids: Tensor,
    prompt_lengths: Tensor,
    response_lengths: Tensor,
    *,
    chunk: int = 4096,
    temperature: float = 1.0,
    entropy: bool = False,
    packing: Packing = "padded",
) -> tuple[Tensor, Tensor | None]:
    """`PolicyModel.forward` for a plain model, with T the longest response."""
    width = int(response_lengths.max())
    result: tuple[Tensor, Tensor | None] = PolicyModel(model)(
        input_ids,
        prompt_lengths,
        response_lengths,
        width=width,
        chunk=chunk,
        temperature=temperature,
        entropy=entropy,
        packing=packing,
    )
    return result


def _scatter(values: Tensor, mask: Tensor) -> Tensor:
    """[N] to [B, T], 0 where `mask` is False."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)
